"""What the planner expects of the others, worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from oracles.straight_road import agent, rectangle, straight_road

from rewards.pdm_forecast import build_forecast
from rlhf_drive.scenes import AgentType


@pytest.mark.parametrize(
    ("heading", "velocity", "direction"),
    [(0.0, (3.0, 4.0), 1.0), (0.0, (-3.0, 4.0), -1.0), (np.pi / 2, (4.0, 3.0), 1.0), (0.0, (0.0, 0.0), 1.0)],
    ids=["drifting", "drifting backwards", "north", "standing"],
)
def test_the_whole_speed_goes_along_the_box(heading: float, velocity: tuple[float, float], direction: float) -> None:
    forecast = build_forecast(straight_road([agent(30.0, 5.0, heading, velocity=velocity)]))
    speed = np.hypot(*velocity)
    assert forecast.shapes.speed[0] == pytest.approx(speed)
    travelled = 3.0 * speed * direction  # sample 15 is at 3.0 s
    expected = [30.0 + travelled * np.cos(heading), 5.0 + travelled * np.sin(heading), heading]
    np.testing.assert_allclose(forecast.pose[0, 15], expected, atol=1e-12)


def test_boxes_follow_their_pose() -> None:
    forecast = build_forecast(straight_road([agent(30.0, velocity=(10.0, 0.0), size=(4.0, 2.0))]))
    # Sample 25 is at 5.0 s: the centre has moved 50 m.
    np.testing.assert_allclose(forecast.shapes.vertices[25, 0], [82.0, 1.0], atol=1e-12)
    np.testing.assert_allclose(forecast.shapes.centroid[25, 0], [80.0, 0.0], atol=1e-12)


def test_static_objects_do_not_move_even_with_a_velocity() -> None:
    forecast = build_forecast(straight_road([agent(30.0, velocity=(5.0, 0.0), kind=AgentType.STATIC)]))
    assert forecast.shapes.speed[0] == 0.0
    assert forecast.pose[0, 25, 0] == pytest.approx(30.0)


def test_objects_beyond_100_m_of_the_ego_centre_are_unseen() -> None:
    # The box centre is 1.461 m ahead of the rear axle.
    forecast = build_forecast(straight_road([agent(101.4), agent(101.5), agent(-98.5), agent(-98.6)]))
    assert forecast.agent.tolist() == [0, 2]


@pytest.mark.parametrize(
    ("kind", "limit"),
    [(AgentType.VEHICLE, 50), (AgentType.PEDESTRIAN, 25), (AgentType.BICYCLE, 10), (AgentType.STATIC, 50)],
)
def test_only_the_nearest_of_each_type_are_kept(kind: AgentType, limit: int) -> None:
    far_to_near = [agent(70.0 - i, kind=kind, size=(0.5, 0.5)) for i in range(limit + 5)]
    forecast = build_forecast(straight_road(far_to_near))
    assert forecast.agent.tolist() == list(range(5, limit + 5))


def test_who_is_not_there_at_t0_is_unseen() -> None:
    scene = straight_road([agent(30.0), agent(40.0)])
    valid = scene.agent_valid.copy()
    valid[0, 0] = False
    assert build_forecast(replace(scene, agent_valid=valid)).agent.tolist() == [1]


def test_whoever_overlaps_the_ego_at_t0_is_ignored() -> None:
    # The ego box reaches from -1.127 to 4.049 m; a car of 4 m touches it up to a centre of 6.049 m.
    forecast = build_forecast(straight_road([agent(6.0), agent(6.1)]))
    assert forecast.shapes.ignored.tolist() == [True, False]


def test_a_red_connector_is_ignored_only_around_the_whole_ego() -> None:
    around, under_the_front = rectangle(-5.0, 20.0, -2.0, 2.0), rectangle(3.0, 20.0, -2.0, 2.0)
    forecast = build_forecast(straight_road(red=[around, under_the_front]))
    assert forecast.shapes.ignored.tolist() == [True, False]
    assert forecast.shapes.red.tolist() == [True, True]
    np.testing.assert_allclose(forecast.shapes.centroid[:, 1], np.tile([11.5, 0.0], (26, 1)))


def test_red_lights_count_on_the_route_and_at_t0_alone() -> None:
    scene = straight_road(red=[rectangle(20.0, 30.0, -2.0, 2.0)] * 3)
    active = scene.red_active.copy()
    active[0, 0] = False
    active[2, 1:] = False
    forecast = build_forecast(replace(scene, red_active=active, red_on_route=np.array([True, False, True])))
    assert forecast.red_row.tolist() == [2]
    assert forecast.shapes.vertices.shape == (26, 4, 2)
    np.testing.assert_allclose(forecast.shapes.vertices[25], forecast.shapes.vertices[0])


def test_the_frame_of_the_world_plays_no_part() -> None:
    people = [agent(30.0, 2.0, 0.3, velocity=(5.0, 1.0)), agent(15.0, kind=AgentType.STATIC)]
    red = [rectangle(40.0, 60.0, -2.0, 2.0)]
    here = build_forecast(straight_road(people, red=red)).shapes
    there = build_forecast(straight_road(people, red=red, origin=(664_000.0, 3_998_000.0, 2.5))).shapes
    np.testing.assert_allclose(there.vertices, here.vertices, atol=1e-8)
    np.testing.assert_allclose(there.centroid, here.centroid, atol=1e-8)
    np.testing.assert_allclose(there.heading[:2], here.heading[:2], atol=1e-12)


def test_an_empty_road_has_no_shape() -> None:
    assert build_forecast(straight_road()).shapes.vertices.shape == (26, 0, 2)
