"""Traffic: the car-following law in numbers, right of way, closed loop with the ego, causality."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from rlhf_drive.scenes.expert import WHEEL_BASE_M, Expert, speed_cap
from rlhf_drive.scenes.geometry import path_from_points
from rlhf_drive.scenes.roads import CrossSection, bending_road, corridor, lane_path
from rlhf_drive.scenes.traffic import idm_acceleration, simulate
from rlhf_drive.scenes.world import NOW, STEPS, Actor, Driver, Shift, StopLine, World, Yield

DRIVER = Driver(
    desired=12.0,
    headway=1.5,
    min_gap=2.5,
    accel=1.5,
    decel=2.0,
    lateral_accel=2.5,
    reaction_steps=3,
    wander=0.0,
    wander_length=60.0,
    wander_phase=0.0,
    bias=0.0,
)
SECTION = CrossSection(1, 1, 3.5, 0.5)


def street(actors: tuple[Actor, ...] = (), bends: tuple[tuple[float, float, float], ...] = (), **more: object) -> World:
    reference = bending_road(list(bends), -90.0, 210.0)
    road = corridor(reference, SECTION, 13.9, [-60.0, 190.0])
    paths = (lane_path(reference, SECTION, 0), lane_path(reference, SECTION, -1))
    values: dict[str, object] = {"driver": DRIVER, "speed": 10.0, "limit": 13.9, **more}
    return World(road, paths, actors, **values)  # type: ignore[arg-type]


def one(value: float) -> np.ndarray:
    return np.array([value])


def idm(speed: float, gap: float, lead: float) -> float:
    pairs = (np.array([[gap]]), np.array([[lead]]))
    return float(idm_acceleration(one(speed), one(15.0), one(1.5), one(2.0), one(1.5), one(2.0), *pairs)[0])


def test_idm_on_a_free_road() -> None:
    assert idm(10.0, np.inf, 0.0) == pytest.approx(1.5 * (1 - (10 / 15) ** 4))


def test_idm_rests_at_its_equilibrium_gap() -> None:
    gap = (2.0 + 1.5 * 10.0) / np.sqrt(1 - (10 / 15) ** 4)
    assert idm(10.0, gap, 10.0) == pytest.approx(0.0, abs=1e-9)
    assert idm(10.0, gap + 2.0, 10.0) > 0 > idm(10.0, gap - 2.0, 10.0)


def test_idm_does_not_panic_when_somebody_cuts_in_at_the_same_speed() -> None:
    assert idm(12.0, 5.0, 12.0) == pytest.approx(-1.2)


def test_idm_brakes_for_a_standing_obstacle_at_least_as_hard_as_needed() -> None:
    assert idm(12.0, 26.0, 0.0) <= -(12.0**2) / (2 * 26.0)


def gap_to(recording_pose: np.ndarray, front: int, back: int, half_lengths: float) -> np.ndarray:
    return np.hypot(*(recording_pose[:, front, :2] - recording_pose[:, back, :2]).T) - half_lengths


def test_follower_keeps_its_gap_to_the_braking_ego() -> None:
    stop = Actor(0, 40.0, 0.0, 0.0, 0.1, steady=True)
    follower = Actor(0, -33.0, 0.0, 10.0, 13.0, length=4.6)
    recording = simulate(street((stop, follower)))
    behind = gap_to(recording.pose, 0, 2, 0.5 * (5.176 + 4.6))
    before = gap_to(recording.pose, 1, 0, 0.5 * (5.176 + 4.7))
    assert recording.ego[-1, 3] < 3.0
    assert behind.min() > 1.5
    assert 1.5 < before.min() < 8.0


def test_ego_does_not_brake_for_the_next_lane() -> None:
    beside = Actor(1, -35.0, 0.0, 0.0, 0.1, steady=True)
    alone, passed = simulate(street()), simulate(street((beside,)))
    np.testing.assert_array_equal(alone.ego, passed.ego)


def test_ego_slows_for_somebody_who_is_drifting_into_its_lane() -> None:
    stays = Actor(0, 2.0, 3.5, 8.0, 8.0)
    comes = dataclasses.replace(stays, shift=(-0.5, 24.0, 0.0))
    free, cut = simulate(street((stays,))), simulate(street((comes,)))
    assert free.ego[-1, 3] > cut.ego[-1, 3] + 2.0
    assert np.abs(np.diff(cut.ego[1:, 5])).max() == pytest.approx(0.7)  # 7 m/s³ for 0.1 s
    assert gap_to(cut.pose, 1, 0, 0.5 * (5.176 + 4.7))[-1] > 3.0


def test_red_light_holds_until_it_opens() -> None:
    red = np.ones((1, STEPS), dtype=bool)
    held = simulate(street(stop_lines=(StopLine(0, 30.0, 0),), red=red))
    front = held.pose[:, 0, 0] + 2.588
    assert front.max() < 30.0
    assert front[-1] > 25.0
    opens = red.copy()
    opens[0, 40:] = False
    assert simulate(street(stop_lines=(StopLine(0, 30.0, 0),), red=opens)).ego[-1, 0] > held.ego[-1, 0] + 2.0


def test_yield_waits_for_the_crossing_road_user_and_then_goes() -> None:
    world = street()
    crossing = path_from_points(np.array([[24.0, -60.0], [24.0, 60.0]]), -58.25)
    walker = Actor(2, -6.0, 0.0, 1.5, 1.5, 0.6, 0.6, steady=True)
    rule = Yield(0, 20.0, (22.0, 26.0), 1, (-2.0, 2.0))
    waits = simulate(dataclasses.replace(world, paths=(*world.paths, crossing), actors=(walker,), yields=(rule,)))
    goes = simulate(world)
    surprised = simulate(dataclasses.replace(world, paths=(*world.paths, crossing), actors=(walker,)))
    assert waits.ego[NOW, 3] < surprised.ego[NOW, 3] - 1.0
    # the walker reaches the lane (s = -2) 2.7 s and leaves it (s = 2) 5.3 s after the start, t = 1.2 ... 3.8 s
    during = slice(NOW + 12, NOW + 38)
    assert (waits.pose[during, 0, 0] + 2.588).max() < 24.0 - 0.3
    assert goes.pose[NOW + 30, 0, 0] > 26.0


def test_detour_passes_beside_what_stands_in_the_lane() -> None:
    box = Actor(0, 30.0, -1.4, 0.0, 0.1, 4.0, 1.6, steady=True)
    shift = Shift(2.0, 20.0, 36.0, 55.0, 1.1, 8.0)
    recording = simulate(street((box,), shifts=(shift,)))
    beside = np.abs(recording.ego[:, 0] - 29.0) < 3.0
    lateral = recording.ego[beside, 1] - (-1.75)
    assert lateral.min() == pytest.approx(1.1, abs=0.25)
    assert recording.ego[-1, 0] > 40.0


def test_speed_cap_foresees_the_bend() -> None:
    path = bending_road([(20.0, 60.0, 20.0)], -80.0, 100.0)
    cap = speed_cap(path, 2.0, 1.5)
    bend = np.sqrt(2.0 * 20.0)
    assert cap[80 + 40] == pytest.approx(bend, rel=0.01)
    # 26 m of full curvature away: v^2 = bend^2 + 2 * 1.5 * 26, and the eased entry costs a little
    assert cap[80] == pytest.approx(np.sqrt(bend**2 + 2 * 1.5 * 25.0), rel=0.04)


def test_expert_moves_as_a_kinematic_bicycle_within_comfort() -> None:
    recording = simulate(street(bends=((5.0, 50.0, 30.0),), lateral=0.3, heading_error=0.03))
    ego = recording.ego
    np.testing.assert_allclose(ego[:, 9], ego[:, 3] * np.tan(ego[:, 7]) / WHEEL_BASE_M, atol=1e-12)
    assert (ego[:, [4, 6]] == 0.0).all()
    np.testing.assert_allclose(np.diff(ego[:, 2]), 0.1 * ego[:-1, 9], atol=1e-9)
    assert np.abs(np.diff(ego[1:, 5])).max() <= 0.7 + 1e-9
    assert ego[:, 5].max() <= DRIVER.accel + 1e-9
    assert np.abs(ego[:, 9] * ego[:, 3]).max() < 3.2


def test_expert_stays_near_its_line_in_a_bend() -> None:
    world = street(bends=((0.0, 60.0, 25.0),))
    recording, route = simulate(world), world.paths[0]
    assert max(abs(route.nearest(p)[1]) for p in recording.ego[:, :2]) < 0.35
    assert Expert(world).cap.min() == pytest.approx(np.sqrt(2.5 * 26.75), rel=0.05)


def test_the_past_does_not_know_the_future() -> None:
    calm = Actor(0, 8.0, 0.0, 10.0, 12.0)
    hard = dataclasses.replace(calm, brake=(0.1, 6.0, 0.0))
    a, b = simulate(street((calm,))), simulate(street((hard,)))
    np.testing.assert_array_equal(a.pose[: NOW + 1], b.pose[: NOW + 1])
    np.testing.assert_array_equal(a.ego[: NOW + 1], b.ego[: NOW + 1])
    assert a.ego[-1, 0] > b.ego[-1, 0] + 5.0
