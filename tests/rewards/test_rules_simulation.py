"""The whole simulation against a plain one, on drives that pass through each of its branches."""

from __future__ import annotations

import math

import numpy as np
import pytest
from oracles import tracker

from rewards.kernels.simulate import query_times_us, resample_plan, simulate_references

T = 0.1 * np.arange(41)


def poses(speed: np.ndarray, heading: np.ndarray) -> np.ndarray:
    """``[41, 3]`` reference with these speeds and headings, from the origin."""
    step = 0.1 * speed[:-1, None] * np.stack([np.cos(heading[:-1]), np.sin(heading[:-1])], axis=1)
    return np.concatenate([np.concatenate([np.zeros((1, 2)), np.cumsum(step, axis=0)]), heading[:, None]], axis=1)


def ego(speed: float, **entries: float) -> np.ndarray:
    names = ("x", "y", "heading", "vx", "vy", "ax", "ay", "steering", "rate", "omega", "alpha")
    state = np.zeros(11)
    state[3] = speed
    for name, value in entries.items():
        state[names.index(name)] = value
    return state


DRIVES = {
    "curve": (ego(6.0), poses(6.0 + T, 0.3 * np.sin(T))),
    "beside and askew": (ego(8.0, y=1.5, heading=-0.2, steering=0.1), poses(8.0 + 0.0 * T, 0.0 * T)),
    "braking to a stop": (ego(5.0, ax=-1.0), poses(np.maximum(5.0 - 2.5 * T, 0.0), 0.1 * T)),
    "starting": (ego(0.1), poses(np.maximum(2.0 * (T - 2.0), 0.0), 0.2 * T)),
    "reversing": (ego(-1.0), poses(-2.0 + 0.0 * T, 0.1 * T)),
    "over the seam of pi": (ego(7.0, heading=3.1), poses(7.0 + 0.0 * T, 3.1 + 0.15 * T)),
    "hard steering": (ego(3.0), poses(3.0 + 0.0 * T, 2.0 * T)),
    "logged lateral motion": (ego(9.0, vy=0.8, ay=1.2, omega=0.3, alpha=0.5), poses(9.0 + 0.0 * T, 0.05 * T)),
}


@pytest.mark.parametrize("name", DRIVES)
def test_states_equal_those_of_the_plain_simulation(name: str) -> None:
    start, reference = DRIVES[name]
    got = simulate_references(start, reference[None])[0]
    expected = tracker.simulate(start, reference)
    difference = got - expected
    difference[:, 2] = np.remainder(difference[:, 2] + math.pi, 2 * math.pi) - math.pi
    np.testing.assert_allclose(difference, 0.0, atol=1e-7)


def test_the_drives_reach_every_branch() -> None:
    """Stop mode and tracking, clipped steering, negative speed: else equality would say little."""
    states = {name: tracker.simulate(*drive) for name, drive in DRIVES.items()}
    assert states["braking to a stop"][-1, 8] == 0.0
    assert states["braking to a stop"][10, 8] != 0.0
    assert states["starting"][5, 8] == 0.0
    assert states["starting"][-1, 8] != 0.0
    assert states["reversing"][-1, 3] < -1.0
    assert states["hard steering"][:, 7].max() == pytest.approx(math.pi / 3)
    assert np.abs(np.diff(states["over the seam of pi"][:, 2])).max() > 6.0


def test_lateral_motion_of_the_log_ends_after_the_first_state() -> None:
    """State 0 is the logged one; vy and ay are 0 from 0.1 s on, and the yaw acceleration is that of the yaw rate."""
    start, reference = DRIVES["logged lateral motion"]
    states = simulate_references(start, reference[None])[0]
    np.testing.assert_array_equal(states[0], start)
    assert not states[1:, [4, 6]].any()
    assert states[1, 10] == pytest.approx((states[1, 9] - 0.3) / 0.1, abs=1e-12)


def test_the_speed_wanted_is_that_of_a_second_ahead() -> None:
    """A reference that stands for 0.9 s and then drives: the profile's value at step 10 is followed from step 0."""
    reference = poses(np.where(T < 0.9, 0.0, 10.0), 0.0 * T)
    wanted = tracker.speed_profile(reference)
    states = simulate_references(ego(2.0), reference[None])[0]
    assert states[1, 5] == pytest.approx(-(10.0 / 11.0) * (2.0 - wanted[10]) / 3.0, abs=1e-9)
    # From step 29 on it is the last one, 39.
    assert states[36, 5] - states[35, 5] == pytest.approx(
        (-(10.0 / 11.0) * (states[35, 3] - wanted[39]) - states[35, 5]) / 3.0, abs=1e-9
    )


@pytest.mark.parametrize(("speed", "wanted", "stops"), [(0.2, 0.0, True), (0.21, 0.0, False), (0.1, 3.0, False)])
def test_stop_mode_needs_both_to_be_slow(speed: float, wanted: float, stops: bool) -> None:
    """Ego and reference at most 0.2 m/s: gain 0.5 and no steering; else gain 10 / 11 and steering towards the path."""
    reference = poses(wanted + 0.0 * T, 0.0 * T)
    reference[:, 1] = 1.0
    state = simulate_references(ego(speed), reference[None])[0, 1]
    gain = 0.5 if stops else 10.0 / 11.0
    target = tracker.speed_profile(reference)[10]
    assert state[5] == pytest.approx(-gain * (speed - target) / 3.0, abs=1e-9)
    assert (state[8] == 0.0) == stops


def test_plans_are_joined_by_straight_lines() -> None:
    """x and y are linear between poses half a second apart, with a kink at each: no spline, no velocity."""
    plan = np.zeros((1, 8, 3))
    plan[0, :, 0] = [1.0, 3.0, 6.0, 10.0, 15.0, 21.0, 28.0, 36.0]
    plan[0, :, 2] = [0.1, 0.3, 0.2, 0.0, -0.2, -0.1, 0.0, 0.4]
    got = resample_plan(np.zeros(3), 0, plan)[0]
    knots = np.concatenate([np.zeros((1, 3)), plan[0]])
    at = query_times_us(0) * 1e-6
    for column in (0, 2):
        np.testing.assert_allclose(got[:, column], np.interp(at, 0.5 * np.arange(9), knots[:, column]), atol=1e-12)


def test_times_are_truncated_to_microseconds_in_knots_and_queries() -> None:
    """With a time of the day NAVSIM's seconds are some 1e-7 s off, and truncation makes some times 1 us early.

    A plan at 10 m/s that begins at a knot 1 us early is 1e-5 m further there.
    """
    t0 = 1_630_753_888_518_125
    plan = np.zeros((1, 8, 3))
    plan[0, :, 0] = 5.0 * np.arange(1, 9)
    knot_us = [t0] + [int((0.5 * i + 0.5 + t0 * 1e-6) * 1e6) for i in range(8)]
    query_us = [int((0.1 * k + t0 * 1e-6) * 1e6) for k in range(41)]
    expected = np.interp(np.array(query_us) - t0, np.array(knot_us) - t0, 5.0 * np.arange(9))
    got = resample_plan(np.zeros(3), t0, plan)[0, :, 0]
    np.testing.assert_allclose(got, expected, atol=1e-12)
    assert np.abs(got - np.arange(41)).max() > 5e-6
