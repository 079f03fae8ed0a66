"""The driver model and the unrolling of proposals, step by step."""

from __future__ import annotations

import numpy as np
import pytest
from oracles.straight_road import ROAD_START_M, agent, rectangle, straight_road

from rewards.pdm_forecast import build_forecast
from rewards.pdm_leaders import Surroundings, find_surroundings
from rewards.pdm_paths import build_paths
from rewards.pdm_proposals import Proposals, continue_proposal, drive, unroll_proposals
from rlhf_drive.scenes import AgentType, SceneReference

START = -ROAD_START_M


def unroll(scene: SceneReference) -> tuple[Surroundings, Proposals]:
    around = find_surroundings(build_paths(scene.centerline), build_forecast(scene).shapes, scene.speed_limit)
    speed = float(scene.ego_init[3])
    return around, unroll_proposals(around, initial_speed=speed, speed_limit=scene.speed_limit)


def test_acceleration_has_exponent_ten() -> None:
    # v = 8, target 10, leader 1000 m ahead at the same speed: s* = 1 + 12 + 0 = 13 m,
    # a = 1.5 (1 - 0.8^10 - (13 / 1000)^2) = 1.5 (1 - 0.1073741824 - 0.000169) = 1.3386852264.
    position, speed = drive(0.0, 8.0, 10.0, np.array([1000.0, 8.0, 0.0]))
    assert speed == pytest.approx(8.13386852264, abs=1e-11)
    assert position == pytest.approx(0.8)


def test_gap_counts_from_the_rear_length_and_never_falls_below_one_metre() -> None:
    # v = 1, lead at rest: s* = 1 + 1.5 + 1 / (2 sqrt 4.5) = 2.7357; with a gap of 2 m, a = 1.5 (1 - 1e-10 - 1.8710).
    wanted = 2.5 + 1.0 / (2.0 * np.sqrt(4.5))
    for lead, rear, gap in ((4.588, 2.588, 2.0), (0.5, 0.0, 1.0), (-50.0, 0.0, 1.0)):
        speed = drive(0.0, 1.0, 10.0, np.array([lead, 0.0, rear]))[1]
        expected = max(1.5 * (1.0 - 1e-10 - (wanted / gap) ** 2), -3.0)
        assert speed == pytest.approx(1.0 + 0.1 * expected, abs=1e-14)


def test_braking_is_clipped_and_speed_may_turn_negative() -> None:
    assert drive(0.0, 10.0, 10.0, np.zeros(3))[1] == pytest.approx(9.7)
    # v = 0.1 against an oncoming leader at 20 m/s: s* = 1 + 0.15 + 0.1 * 20.1 / (2 sqrt 4.5) = 1.6238, gap 1.
    wanted = 1.15 + 2.01 / (2.0 * np.sqrt(4.5))
    speed = drive(0.0, 0.1, 10.0, np.array([1.0, -20.0, 0.0]))[1]
    assert speed == pytest.approx(0.1 + 0.15 * (1.0 - 1e-20 - wanted**2), abs=1e-14)
    assert speed < 0.0


def test_a_leader_that_draws_away_fast_still_brakes() -> None:
    # s* is not clamped at 0: v = 1, lead at 30 m/s: s* = 2.5 - 29 / (2 sqrt 4.5) = -4.3353, squared over a gap of 10 m.
    wanted = 2.5 - 29.0 / (2.0 * np.sqrt(4.5))
    speed = drive(0.0, 1.0, 10.0, np.array([10.0, 30.0, 0.0]))[1]
    assert speed == pytest.approx(1.0 + 0.15 * (1.0 - 1e-10 - (wanted / 10.0) ** 2), abs=1e-14)
    assert speed < 1.13


def test_position_moves_with_the_old_speed() -> None:
    assert drive(5.0, 10.0, 10.0, np.zeros(3))[0] == pytest.approx(6.0)


def test_every_proposal_brakes_at_the_first_step() -> None:
    _, out = unroll(straight_road(ego_speed=10.0))
    np.testing.assert_array_equal(out.lead[:, :2], 0.0)
    np.testing.assert_allclose(out.idm[:, 1], np.tile([START + 1.0, 9.7], (15, 1)))


def test_row_zero_is_the_ego_on_the_path() -> None:
    _, out = unroll(straight_road())
    np.testing.assert_allclose(out.poses[::5, 0], [[0, 0, 0], [0, -1, 0], [0, 1, 0]], atol=1e-12)


def test_the_leader_is_looked_up_at_every_second_step() -> None:
    _, out = unroll(straight_road([agent(30.0, velocity=(6.0, 0.0))]))
    np.testing.assert_array_equal(out.lead[:, 3:41:2], out.lead[:, 2:40:2])
    # At t=2 the ego is where it was at t=1 (1 m on) and the car where it will be at 0.2 s (1.2 m on).
    np.testing.assert_allclose(out.lead[4, 2], [START + 1.2 + 28.0 - 1.461 - 2.588, 6.0, 0.0], atol=1e-12)


def test_who_is_passed_between_two_steps_leads_for_one_more() -> None:
    # All brake at 3 m/s^2 for a long box centred 8.3 m ahead, and run into it: s = n - 0.015 n (n - 1) is 7.92 m after
    # 9 steps and 8.65 m after 10. At step 10 the centroid is still ahead, so step 11 keeps the leader of step 10 (at a
    # distance of 0) although it has been passed by then; step 12 looks again and sees the path's end.
    _, out = unroll(straight_road([agent(8.3, size=(4.0, 2.0), kind=AgentType.STATIC)], ego_speed=10.0))
    np.testing.assert_allclose(out.idm[:5, 9:11, 0], np.tile([START + 7.92, START + 8.65], (5, 1)), atol=1e-12)
    np.testing.assert_allclose(out.lead[:5, 10:13, 0], np.tile([START + 7.92, START + 7.92, 520.0], (5, 1)), atol=1e-12)


def test_target_speeds_are_fractions_of_the_limit() -> None:
    # From 8 m/s with nobody ahead but the end of the path, step 2 depends on the target alone (lead 520 m, at rest).
    _, out = unroll(straight_road(ego_speed=8.0, speed_limit=10.0))
    v = 7.7
    wanted = 1.0 + 1.5 * v + v * v / (2.0 * np.sqrt(4.5))
    gap = 520.0 - 2.588 - (START + 0.8)
    for fraction, got in zip((0.2, 0.4, 0.6, 0.8, 1.0), out.idm[:5, 2, 1], strict=True):
        acceleration = 1.5 * (1.0 - (v / (10.0 * fraction)) ** 10 - (wanted / gap) ** 2)
        assert got == pytest.approx(v + 0.1 * np.clip(acceleration, -3.0, 1.5), abs=1e-12)


def test_speed_of_a_slower_proposal_leaks_into_a_faster_one() -> None:
    # A walker comes diagonally from the left, 1.5 m/s at -45 degrees, and enters the corridor of the left path alone at
    # 3.2 s, ahead of the slower proposals and behind the fastest: this one sees nobody, takes the path's end as its
    # leader, and inherits the walker's speed along the path.
    along = 1.5 * np.sqrt(0.5)
    walker = agent(22.6, 5.8, -np.pi / 4, velocity=(along, -along), size=(0.4, 0.4), kind=AgentType.PEDESTRIAN)
    around, out = unroll(straight_road([walker], ego_speed=10.0))
    assert np.flatnonzero(around.in_corridor[2, :, 0])[0] == 16
    assert out.idm[13, 31, 0] < around.progress[2, 16, 0] < out.idm[14, 31, 0]
    assert (out.lead[10:14, 32, 0] < START + 30.0).all()
    np.testing.assert_allclose(out.lead[10:14, 32, 1:], np.tile([along, 0.0], (4, 1)), atol=1e-12)
    np.testing.assert_allclose(out.lead[14, 32], [520.0, along, 2.588])
    # Two steps before, and on the other paths, nobody left a speed behind: the vector starts at zero every time.
    np.testing.assert_allclose(out.lead[14, 30], [520.0, 0.0, 2.588])
    np.testing.assert_allclose(out.lead[4, 32], [520.0, 0.0, 2.588])
    # The speed still leaks at 4.0 s. Carried on alone, the fastest proposal inherits nothing.
    np.testing.assert_allclose(out.lead[14, 40], [520.0, along, 2.588])
    longer = continue_proposal(around, out, 14, speed_limit=10.0)
    np.testing.assert_allclose(longer.lead[14, 41:43], [[520.0, along, 2.588], [520.0, 0.0, 2.588]])


def test_a_red_light_stops_every_proposal_a_metre_before_it() -> None:
    _, out = unroll(straight_road(red=[rectangle(25.0, 45.0, -3.0, 3.0)], ego_speed=8.0))
    front = out.poses[:, 40, 0] + 1.461 + 2.588
    assert front.max() < 24.0
    assert front[4] > 20.0
    assert np.abs(out.lead[:, 2:41, 1]).max() == 0.0


def test_only_the_winner_is_carried_on_with_a_fresh_leader_vector() -> None:
    around, out = unroll(straight_road(ego_speed=10.0))
    longer = continue_proposal(around, out, 14, speed_limit=10.0)
    np.testing.assert_array_equal(longer.idm[:14, 41:], 0.0)
    np.testing.assert_array_equal(longer.idm[14, :41], out.idm[14, :41])
    np.testing.assert_allclose(longer.lead[14, 42], [520.0, 0.0, 2.588])
    steps = np.diff(longer.idm[14, 40:, 0])
    np.testing.assert_allclose(steps, 0.1 * longer.idm[14, 40:50, 1], atol=1e-12)


def test_a_pose_past_the_end_stays_at_the_end() -> None:
    _, out = unroll(straight_road(ego_speed=10.0, length=8.0))
    assert out.poses[..., 0].max() == pytest.approx(8.0)
    assert out.idm[4, 40, 0] > 8.0 - ROAD_START_M
