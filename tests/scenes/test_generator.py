"""Generated scenes: determinism, variety, physics, what may be seen, and what simple planners score."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest

from rewards.pdm_closed import plan_pdm_closed
from rewards.pdms import score_pdms
from rewards.prepare import prepare_scene
from rlhf_drive.errors import DataError, UnknownNameError
from rlhf_drive.scenes import AgentType, Command, MapElement, MapLayer, Observation, Scene, to_ego_frame, to_world_frame
from rlhf_drive.scenes.generator import SITUATION_KINDS, SITUATIONS, generate_scenes, observation_of
from rlhf_drive.scenes.geometry import box_corners, boxes_overlap, points_in_polygon
from rlhf_drive.scenes.observe import command_ahead
from rlhf_drive.scenes.roads import bending_road
from rlhf_drive.scenes.traffic import simulate
from rlhf_drive.scenes.world import NOW, World

EGO = np.array([5.176, 2.297])


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return list(generate_scenes(10 * len(SITUATION_KINDS), seed=23))


def same(a: object, b: object) -> bool:
    return all(np.array_equal(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))  # type: ignore[arg-type]


def center(pose: np.ndarray) -> np.ndarray:
    """Box centre of the ego from its rear axle."""
    ahead = np.stack([np.cos(pose[..., 2]), np.sin(pose[..., 2]), 0.0 * pose[..., 2]], axis=-1)
    return pose + 1.461 * ahead


def test_scene_depends_on_seed_and_index_alone() -> None:
    long, short = list(generate_scenes(14, seed=5)), list(generate_scenes(3, seed=5))
    other = next(generate_scenes(1, seed=6))
    for a, b in zip(long, short, strict=False):
        assert a.token == b.token
        assert same(a.reference, b.reference)
        assert same(a.observation, b.observation)
    assert not np.array_equal(long[0].reference.human_poses, other.reference.human_poses)
    assert long[12].kind == long[0].kind
    assert not np.array_equal(long[0].reference.human_poses, long[12].reference.human_poses)


def test_kinds_take_turns(scenes: list[Scene]) -> None:
    assert len(SITUATION_KINDS) == 12
    assert Counter(s.kind for s in scenes) == dict.fromkeys(SITUATION_KINDS, 10)
    assert len({s.token for s in scenes}) == len({s.cluster for s in scenes}) == len(scenes)
    subset = generate_scenes(4, seed=1, kinds=["merge", "red_light"])
    assert [s.kind for s in subset] == ["merge", "red_light"] * 2


def test_wrong_requests_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'roundabout'"):
        next(generate_scenes(1, seed=0, kinds=["roundabut"]))
    with pytest.raises(DataError, match="got -1"):
        next(generate_scenes(-1, seed=0))


def test_nobody_overlaps_now_and_the_human_hits_nobody(scenes: list[Scene]) -> None:
    hits = 0
    for scene in scenes:
        ref = scene.reference
        now, size = ref.agent_pose[:, 0], ref.agent_size
        first, second = np.triu_indices(len(now), 1)
        bulky = size[first, 0] + size[second, 0] > 2.5
        assert not (boxes_overlap(now[first], size[first], now[second], size[second]) & bulky).any(), scene.token
        human = center(to_world_frame(ref.human_poses, ref.ego_init))
        hits += int(boxes_overlap(human[:, None], EGO, ref.agent_pose[:, 5:41:5].transpose(1, 0, 2), size).any())
    assert hits == 0


def test_human_stays_on_the_road(scenes: list[Scene]) -> None:
    off = 0
    drivable = {MapLayer.ROADBLOCK, MapLayer.INTERSECTION, MapLayer.CARPARK_AREA}
    for scene in scenes:
        ref = scene.reference
        corners = box_corners(center(to_world_frame(ref.human_poses, ref.ego_init)), EGO).reshape(-1, 2)
        inside = np.zeros(len(corners), dtype=bool)
        for k in np.flatnonzero(np.isin(ref.map_layer, list(drivable))):
            inside |= points_in_polygon(corners, ref.map_xy[ref.map_offsets[k] : ref.map_offsets[k + 1]])
        off += int(not inside.all())
    assert off <= 0.02 * len(scenes)


def test_states_are_bounded_and_consistent(scenes: list[Scene]) -> None:
    for scene in scenes:
        ref = scene.reference
        past = ref.past_states
        np.testing.assert_array_equal(past[-1], ref.ego_init)
        np.testing.assert_array_equal(past[2], ref.prev_ego_init)
        assert np.diff(ref.past_times_us).tolist() == [500_000] * 3
        assert (ref.t0_us, ref.prev_t0_us) == (ref.past_times_us[3], ref.past_times_us[2])
        np.testing.assert_allclose(past[:, 9], past[:, 3] * np.tan(past[:, 7]) / 3.089, atol=1e-12)
        assert (past[:, [4, 6]] == 0.0).all()
        assert 0.0 <= past[:, 3].min() <= past[:, 3].max() < 20.0
        assert np.abs(past[:, 7]).max() < 0.6
        speed = np.hypot(ref.agent_velocity[..., 0], ref.agent_velocity[..., 1])
        assert speed.max() < 25.0
        moved = np.hypot(*(ref.agent_pose[:, 1:, :2] - ref.agent_pose[:, :-1, :2]).transpose(2, 0, 1))
        assert np.abs(moved - 0.05 * (speed[:, 1:] + speed[:, :-1])).max() < 0.12


def test_agents_are_three_to_twenty_of_several_sorts(scenes: list[Scene]) -> None:
    rng = np.random.default_rng(0)
    counts = [len(draw(rng).actors) for draw in SITUATIONS.values() for _ in range(40)]
    assert 3 <= min(counts) <= max(counts) <= 20
    sorts = set(np.concatenate([s.reference.agent_type for s in scenes]).tolist())
    assert sorts == {int(t) for t in AgentType}


def test_starts_vary(scenes: list[Scene]) -> None:
    speed = np.array([s.reference.ego_init[3] for s in scenes])
    assert speed.min() < 1.0
    assert speed.max() > 14.0
    assert {s.observation.command for s in scenes} == {int(c) for c in Command}
    offset = []
    for s in scenes:
        line, here = s.reference.centerline, s.reference.ego_init[:3]
        k = int(np.argmin(np.hypot(*(line[:, :2] - here[:2]).T)))
        offset.append(to_ego_frame(here[None], line[k])[0, 1])
    assert 0.05 < np.std(offset) < 0.8
    origin = np.array([s.reference.ego_init[:3] for s in scenes])
    assert np.hypot(*origin[:, :2].T).max() > 2000.0
    assert np.std(origin[:, 2]) > 1.0


def test_centerline_starts_behind_and_reaches_400_m_ahead(scenes: list[Scene]) -> None:
    for scene in scenes:
        local = to_ego_frame(scene.reference.centerline, scene.reference.ego_init)
        nearest = int(np.argmin(np.hypot(local[:, 0], local[:, 1])))
        steps = np.hypot(*np.diff(local[:, :2], axis=0).T)
        assert steps[:nearest].sum() >= 5.0
        assert steps[nearest:].sum() >= 400.0
        assert steps.max() < 1.1
        turn = np.angle(np.exp(1j * (np.arctan2(*np.diff(local[:, :2], axis=0).T[::-1]) - local[:-1, 2])))
        assert np.abs(turn).max() < 0.15


def test_route_lanes_hold_the_centerline(scenes: list[Scene]) -> None:
    for scene in scenes:
        ref = scene.reference
        local = to_ego_frame(ref.centerline, ref.ego_init)
        nearest = int(np.argmin(np.hypot(local[:, 0], local[:, 1])))
        points = ref.centerline[nearest : nearest + 60, :2]
        inside = np.zeros(len(points), dtype=bool)
        for k in np.flatnonzero(ref.map_on_route):
            inside |= points_in_polygon(points, ref.map_xy[ref.map_offsets[k] : ref.map_offsets[k + 1]])
        assert inside.mean() > 0.9, scene.token
        assert set(ref.map_layer[ref.map_on_route].tolist()) <= {int(MapLayer.LANE), int(MapLayer.LANE_CONNECTOR)}


def test_observation_is_the_reference_seen_from_the_ego(scenes: list[Scene]) -> None:
    for scene in scenes:
        seen, ref = scene.observation, scene.reference
        local = to_ego_frame(ref.agent_pose[:, 0], ref.ego_init)
        near = local[np.hypot(local[:, 0], local[:, 1]) < 90.0]
        np.testing.assert_allclose(seen.agents[:, -1, :2], near[:, :2], atol=1e-4)
        assert seen.agents_valid[:, -1].all()
        past = to_ego_frame(ref.past_states[:, :3], ref.ego_init)
        np.testing.assert_allclose(seen.ego_history[:, :3], past, atol=1e-4)
        np.testing.assert_allclose(seen.ego_history[:, 3], ref.past_states[:, 3], atol=1e-5)
        away = np.hypot(*seen.route_xy[0].astype(float))
        assert away < 1.5
        assert np.hypot(*np.diff(seen.route_xy, axis=0).T).sum() == pytest.approx(90.0, abs=0.5)
        assert seen.map_xy[:, 0].min() >= -40.0
        assert seen.map_xy[:, 0].max() <= 80.0


def test_lights_seen_are_the_lights_now(scenes: list[Scene]) -> None:
    red = [s for s in scenes if s.kind == "red_light"]
    for scene in red:
        seen, ref = scene.observation, scene.reference
        assert seen.map_red.any() == ref.red_active[:, 0].any()
        on_route = seen.map_red & seen.map_on_route
        assert on_route.any() == (ref.red_active[:, 0] & ref.red_on_route).any()
        assert (seen.map_type[seen.map_red] == MapElement.LANE_CONNECTOR_CENTER).all()
    shown = [bool((s.observation.map_red & s.observation.map_on_route).any()) for s in red]
    assert {True, False} == set(shown)


def test_command_follows_the_route() -> None:
    left = bending_road([(10.0, 30.0, 20.0)], -10.0, 100.0)
    assert command_ahead(left, 0.0, 8.0) == Command.LEFT
    assert command_ahead(left, 40.0, 8.0) == Command.STRAIGHT
    right = bending_road([(30.0, 60.0, -20.0)], -10.0, 100.0)
    assert command_ahead(right, 0.0, 12.0) == Command.RIGHT
    assert command_ahead(right, 0.0, 3.0) == Command.STRAIGHT  # the bend is beyond the next 20 m


def seen_by(world: World) -> tuple[Observation, np.ndarray]:
    recording = simulate(world)
    return observation_of(world, recording), recording.ego


@pytest.mark.parametrize("kind", SITUATION_KINDS)
def test_observation_does_not_know_the_future(kind: str) -> None:
    world = SITUATIONS[kind](np.random.default_rng(4))
    late_red = world.red.copy()
    late_red[:, NOW + 1 :] = ~late_red[:, NOW + 1 :]
    changed = tuple(
        dataclasses.replace(a, brake=(0.05, 5.0, 0.0), shift=a.shift or (0.05, 8.0, 2.0)) for a in world.actors
    )
    other = dataclasses.replace(world, actors=changed, red=late_red)
    before, future = seen_by(world)
    after, otherwise = seen_by(other)
    assert same(before, after)
    np.testing.assert_array_equal(future[: NOW + 1], otherwise[: NOW + 1])


def test_human_drives_well_and_simple_planners_do_not(scenes: list[Scene]) -> None:
    rows = []
    for scene in scenes[:72]:
        plan = plan_pdm_closed(scene.reference, version="v1")
        reference = scene.with_reference(pdm_reference_v1=plan.reference).reference
        straight = np.zeros((8, 3))
        straight[:, 0] = reference.ego_init[3] * np.arange(1, 9) * 0.5
        result = score_pdms(prepare_scene(reference), np.stack([reference.human_poses, straight, np.zeros((8, 3))]))
        rows.append(np.stack([result.pdms, result.nc * result.dac, result.ep, result.c]))
    mean = np.mean(rows, axis=0)
    human, constant, stand = mean[0]
    assert 0.87 <= human <= 0.98
    assert constant < 0.6
    assert stand < 0.7
    assert mean[1, 0] >= 0.97
    assert 0.8 <= mean[2, 0] <= 1.0
    assert mean[3, 0] == 1.0
