"""How the planner rates its proposals, on states written by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from oracles.straight_road import agent, rectangle, straight_road

from rewards.kernels.collisions import AgentBoxes, RedLights
from rewards.pdm_forecast import build_forecast
from rewards.pdm_scoring import ProposalScores, Version, forecast_agents, forecast_lights, score_proposals
from rewards.prepare import prepare_road
from rlhf_drive.scenes import SceneReference


def driving(*speeds: float, y: float = 0.0) -> NDArray[np.float64]:
    """States ``[B, 41, 11]`` that go straight on at constant speed."""
    states = np.zeros((len(speeds), 41, 11))
    states[..., 0] = np.outer(speeds, 0.1 * np.arange(41))
    states[..., 1] = y
    states[..., 3] = np.array(speeds)[:, None]
    return states


def score(scene: SceneReference, states: NDArray[np.float64], version: Version) -> ProposalScores:
    forecast = build_forecast(scene)
    agents: AgentBoxes = forecast_agents(forecast, scene)
    lights: RedLights = forecast_lights(forecast)
    return score_proposals(prepare_road(scene), agents, lights, states, version)


def test_boxes_are_held_for_two_steps_and_follow_the_forecast() -> None:
    scene = straight_road([agent(6.0), agent(30.0, velocity=(10.0, 0.0))])
    boxes = forecast_agents(build_forecast(scene), scene)
    # The first agent overlaps the ego at t=0 and is left out.
    np.testing.assert_allclose(boxes.pose[0, :6, 0], [30.0, 30.0, 32.0, 32.0, 34.0, 34.0])
    np.testing.assert_allclose(boxes.pose[0, -1, 0], 80.0)
    assert boxes.pose.shape[:2] == (1, 51)
    assert not boxes.stopped[0]


def test_the_log_is_not_read() -> None:
    scene = straight_road([agent(30.0, velocity=(10.0, 0.0))])
    scene.agent_pose[0, 1:] = 0.0
    scene.agent_valid[0, 1:] = False
    boxes = forecast_agents(build_forecast(scene), scene)
    np.testing.assert_allclose(boxes.pose[0, 20, 0], 50.0)
    assert boxes.valid.all()


@pytest.mark.parametrize(("version", "rest", "weights"), [("v1", 5.0 + 2.0, 12.0), ("v2", 5.0 + 2.0 + 2.0, 14.0)])
def test_progress_is_relative_to_the_best(version: Version, rest: float, weights: float) -> None:
    scores = score(straight_road(), driving(10.0, 5.0, 0.0), version)
    np.testing.assert_allclose(scores.ep, [1.0, 0.5, 0.0], atol=1e-12)
    np.testing.assert_allclose(scores.total, (5.0 * scores.ep + rest) / weights, atol=1e-12)


def test_nobody_gets_beyond_5_m() -> None:
    states = np.concatenate([driving(1.0, 0.5), driving(1.2, y=20.0)])
    np.testing.assert_array_equal(score(straight_road(), states, "v1").ep, [1.0, 1.0, 0.0])
    np.testing.assert_array_equal(score(straight_road(), states, "v2").ep, [1.0, 1.0, 1.0])


def test_a_proposal_off_the_road_does_not_raise_the_bar() -> None:
    # It gets twice as far; v1 masks its progress, v2 clips it.
    states = np.concatenate([driving(5.0), driving(10.0, y=20.0)])
    v1, v2 = score(straight_road(), states, "v1"), score(straight_road(), states, "v2")
    np.testing.assert_allclose(v1.ep, [1.0, 0.0])
    np.testing.assert_allclose(v2.ep, [1.0, 1.0])
    np.testing.assert_allclose([v1.total[1], v2.total[1]], 0.0)


def test_v2_rates_red_lights_and_v1_does_not() -> None:
    scene = straight_road(red=[rectangle(30.0, 50.0, -2.0, 2.0)])
    states = driving(10.0, 5.0)
    np.testing.assert_allclose(score(scene, states, "v1").total, [1.0, 9.5 / 12.0], atol=1e-12)
    # The faster one crosses the connector: total 0, and the bar is the slower one's progress.
    v2 = score(scene, states, "v2")
    np.testing.assert_allclose(v2.total, [0.0, 1.0], atol=1e-12)


def test_a_red_light_that_holds_the_ego_is_not_forgiven() -> None:
    scene = straight_road(red=[rectangle(-5.0, 20.0, -2.0, 2.0)])
    np.testing.assert_array_equal(score(scene, driving(10.0, 0.0), "v2").total, 0.0)


@pytest.mark.parametrize(("version", "ttc"), [("v1", 0.0), ("v2", 1.0)])
def test_v2_starts_no_projection_after_3_1_s(version: Version, ttc: float) -> None:
    # At 10 m/s the front is at 4.049 + 10 t; looking 0.9 s ahead it meets a box at x0 from t = (x0 - 13.049) / 10 on,
    # here from 3.3 s: within the start steps of v1 (to 4.0 s), beyond those of v2 (to 3.1 s).
    scene = straight_road([agent(13.049 + 32.5 + 2.0, size=(4.0, 2.0))])
    scores = score(scene, driving(10.0), version)
    assert scores.metrics.ttc[0] == ttc
    assert scores.metrics.nc[0] == 1.0


def test_v2_rates_lane_keeping() -> None:
    # 0.6 m beside the centreline for 41 steps, more than the 20 allowed.
    scores = score(straight_road(), np.concatenate([driving(10.0), driving(10.0, y=0.6)]), "v2")
    np.testing.assert_allclose(scores.total, [1.0, 12.0 / 14.0], atol=1e-12)
    v1 = score(straight_road(), np.concatenate([driving(10.0), driving(10.0, y=0.6)]), "v1")
    np.testing.assert_allclose(v1.total, [1.0, 1.0], atol=1e-12)


def test_v2_multiplies_driving_direction_and_v1_does_not() -> None:
    # No lane is on the route: more than 6 m in a second against it.
    scene = replace(straight_road(), map_on_route=np.array([False, False]))
    np.testing.assert_allclose(score(scene, driving(10.0), "v1").total, 1.0)
    np.testing.assert_array_equal(score(scene, driving(10.0), "v2").total, 0.0)


def test_v1_rates_comfort_and_v2_does_not() -> None:
    states = driving(10.0)
    states[..., 5] = 3.0  # above 2.4 m/s^2
    np.testing.assert_allclose(score(straight_road(), states, "v1").total, 10.0 / 12.0, atol=1e-12)
    np.testing.assert_allclose(score(straight_road(), states, "v2").total, 1.0, atol=1e-12)
