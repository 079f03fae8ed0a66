"""The frame before: geometry of the observation 0.5 s ago."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rlhf_drive.errors import DataError
from rlhf_drive.scenes import Scene, to_ego_frame, to_world_frame
from rlhf_drive.scenes.generator import generate_scenes
from rlhf_drive.scenes.previous import human_previous, previous_observation, previous_scene


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return list(generate_scenes(24, seed=5))


def test_last_row_is_the_origin_and_earlier_rows_keep_their_distances(scenes: list[Scene]) -> None:
    for scene in scenes:
        now, then = scene.observation.ego_history, previous_observation(scene.observation).ego_history
        np.testing.assert_allclose(then[3, :3], 0.0, atol=1e-5)
        np.testing.assert_array_equal(then[1:, 3:], now[:3, 3:])
        gaps = [np.linalg.norm(np.diff(rows[:, :2], axis=0), axis=1) for rows in (now[:3], then[1:])]
        np.testing.assert_allclose(gaps[0], gaps[1], atol=1e-4)


def test_agents_and_map_stay_where_they_are_in_the_world(scenes: list[Scene]) -> None:
    seen = 0
    for scene in scenes:
        now, then = scene.observation, previous_observation(scene.observation)
        origin = now.ego_history[2, :3].astype(np.float64)
        kept = now.agents_valid[:, 2]
        world = to_world_frame(then.agents[:, 1:, :3], origin)
        valid = then.agents_valid[:, 1:]
        np.testing.assert_allclose(world[valid][:, :2], now.agents[kept, :3, :2][valid], atol=1e-3)
        velocity = to_world_frame(np.concatenate([then.agents[:, 1:, 3:], 0 * valid[..., None]], 2), [0, 0, origin[2]])
        np.testing.assert_allclose(velocity[valid][:, :2], now.agents[kept, :3, 3:][valid], atol=1e-3)
        assert not then.agents_valid[:, 0].any()
        flat = np.concatenate([then.map_xy, np.zeros((len(then.map_xy), 1))], axis=1)
        np.testing.assert_allclose(to_world_frame(flat, origin)[:, :2], now.map_xy, atol=1e-3)
        seen += int(valid.sum())
    assert seen > 100


def test_agent_that_was_not_there_is_left_out(scenes: list[Scene]) -> None:
    observation = next(s.observation for s in scenes if len(s.observation.agents) >= 2)
    valid = observation.agents_valid.copy()
    valid[0, 2] = False
    then = previous_observation(replace(observation, agents_valid=valid))
    assert len(then.agents) == int(valid[:, 2].sum()) < len(observation.agents)


def test_row_of_two_seconds_ago_is_carried_back(scenes: list[Scene]) -> None:
    history = scenes[0].observation.ego_history.copy()
    # 10 m/s with 2 m/s2 at -1.5 s: 9 m/s half a second before, 0.5 * (10 + 9) * 0.5 = 4.75 m behind on a straight line
    history[:, :3] = [[-18.0, 0, 0], [-12.5, 0, 0], [-6.5, 0, 0], [0, 0, 0]]
    history[:, 3:] = [10.0, 0, 2.0, 0, 0.0]
    then = previous_observation(replace(scenes[0].observation, ego_history=history)).ego_history
    np.testing.assert_allclose(then[0], [-18.0 - 4.75 + 6.5, 0, 0, 9.0, 0, 2.0, 0, 0], atol=1e-5)
    history[:, 3], history[:, 5] = 0.5, 4.0  # braking back would reverse: it stands instead, 0.125 m behind
    then = previous_observation(replace(scenes[0].observation, ego_history=history)).ego_history
    np.testing.assert_allclose(then[0, [0, 3]], [-18.0 - 0.125 + 6.5, 0.0], atol=1e-5)


def test_route_begins_beside_the_ego(scenes: list[Scene]) -> None:
    moved = 0
    for scene in scenes:
        now, then = scene.observation, previous_observation(scene.observation)
        if np.hypot(*now.ego_history[2, :2]) < 0.1:
            assert len(then.route_xy) == len(now.route_xy)
            continue
        moved += 1
        assert len(then.route_xy) == len(now.route_xy) + 1
        beside = np.hypot(*now.route_xy[0])
        assert np.hypot(*then.route_xy[0]) == pytest.approx(beside, abs=1e-3)
    assert moved > 10


def test_human_plan_of_the_previous_frame(scenes: list[Scene]) -> None:
    for scene in scenes:
        plan, reference = human_previous(scene), scene.reference
        world = to_world_frame(plan, reference.prev_ego_init[:3])
        np.testing.assert_allclose(world[0, :2], reference.ego_init[:2], atol=1e-9)
        later = to_ego_frame(world[1:], reference.ego_init[:3])
        np.testing.assert_allclose(later[:, :2], reference.human_poses[:-1, :2], atol=1e-9)


def test_scene_keeps_its_reference_under_another_token(scenes: list[Scene]) -> None:
    before = previous_scene(scenes[0])
    assert before.token == scenes[0].token + "@prev"
    assert before.reference is scenes[0].reference


def test_human_plan_needs_the_human() -> None:
    scene = next(iter(generate_scenes(1, seed=0)))
    with pytest.raises(DataError, match="does not hold what the human drove"):
        human_previous(replace(scene, reference=_without_human(scene)))


def _without_human(scene: Scene) -> object:
    reference = scene.reference
    copy = object.__new__(type(reference))
    copy.__dict__.update(vars(reference) | {"human_poses": np.zeros((0, 3))})
    return copy
