"""Comfort of v2: which samples, which signals, which windows. Order of the six tests: see `COMFORT_TESTS`."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from oracles import filtered
from oracles.tiny_scene import make_reference, straight_states

from rewards.epdms import prepare_epdms, score_epdms
from rewards.kernels.comfort import COMFORT_TESTS
from rewards.kernels.comfort_v2 import frame_differences, history_comfort
from rewards.prepare_epdms import prepare_history
from rlhf_drive.scenes import SceneReference

T = 0.1 * np.arange(41)
PAST_S = np.array([-1.5, -1.0, -0.5, 0.0])
QUIET = np.zeros((14, 3))
COLUMNS = {"heading": 2, "ax": 5, "ay": 6, "omega": 9, "alpha": 10}


def states_of(**columns: np.ndarray | float) -> np.ndarray:
    """``[1, 41, 11]`` states with these columns, else straight on."""
    states = straight_states(5.0)
    for name, values in columns.items():
        states[0, :, COLUMNS[name]] = values
    return states


def failed(states: np.ndarray, history: np.ndarray = QUIET) -> set[str]:
    """Names of the tests that the past and these states break."""
    passed = np.zeros((1, 6), dtype=bool)
    history_comfort(np.ascontiguousarray(history), states, passed)
    return {name for name, ok in zip(COMFORT_TESTS, passed[0], strict=True) if not ok}


def past(times_s: np.ndarray = PAST_S, **columns: np.ndarray | float) -> SceneReference:
    """A scene whose logged past has these columns."""
    reference = make_reference()
    logged = reference.past_states.copy()
    for name, values in columns.items():
        logged[:, COLUMNS[name]] = values + (reference.ego_init[2] if name == "heading" else 0.0)
    times = 10_000_000 + np.round(times_s * 1e6).astype(np.int64)
    return replace(reference, past_states=logged, past_times_us=times, pdm_reference_v2=reference.pdm_reference_v1)


def test_the_past_ends_at_minus_0_2_s() -> None:
    """Every 0.1 s from -1.5 s: 14 samples, the one at -0.1 s is missing. ax = t, so the samples show their times."""
    history = prepare_history(past(ax=PAST_S, heading=0.1 * PAST_S, ay=-PAST_S))
    np.testing.assert_allclose(history[:, 1], -1.5 + 0.1 * np.arange(14), atol=1e-9)
    np.testing.assert_allclose(history[:, 0], 0.1 * history[:, 1], atol=1e-9)
    np.testing.assert_allclose(history[:, 2], -history[:, 1], atol=1e-9)


def test_a_log_a_few_microseconds_longer_has_the_sample_at_minus_0_1_s() -> None:
    history = prepare_history(past(PAST_S - [4e-6, 0.0, 0.0, 0.0], ax=PAST_S))
    assert len(history) == 15
    assert history[-1, 1] == pytest.approx(-0.1, abs=1e-4)


def test_the_missing_sample_makes_a_steady_turn_look_faster() -> None:
    """At 0.8 rad/s through past and plan the heading leaps by 0.16 rad between the samples at -0.2 and 0 s.

    The slope of five samples at 0: (2 * 0.24 + 0.16 + 0 + 0.08 + 2 * 0.16) / 10 / 0.1 = 1.04 rad/s > 0.95, and the
    second derivative (2, -1, -2, -1, 2) / 7 / 0.01 one sample later: -2 / 7 * 8 = -2.29 < -1.93.
    With the sample at -0.1 s, as a log a few microseconds longer has it, the turn is what it is: 0.8 rad/s.
    """
    turn = states_of(heading=0.8 * T)
    assert failed(turn, prepare_history(past(heading=0.8 * PAST_S))) == {"yaw_acceleration", "yaw_rate"}
    longer = PAST_S - [4e-6, 0.0, 0.0, 0.0]
    assert failed(turn, prepare_history(past(longer, heading=0.8 * longer))) == set()


@pytest.mark.parametrize(
    ("column", "value", "broken"), [("ax", 2.5, {"lon_acceleration"}), ("ay", 5.0, {"lat_acceleration"})]
)
def test_the_past_counts(column: str, value: float, broken: set[str]) -> None:
    """Accelerations of the log alone, up to -0.5 s; the plan is comfortable, and is so without them."""
    logged = {column: np.array([value, value, value, 0.0])}
    got = failed(states_of(), prepare_history(past(**logged)))
    assert broken <= got
    assert failed(states_of()) == set()


def test_hc_of_a_scene_is_that_of_its_past_and_the_plan() -> None:
    """Through the scorer: the plan of a quiet past is comfortable, the same plan after 2.5 m/s^2 is not."""
    plan = np.zeros((1, 8, 3))
    plan[0, :, 0] = 5.0 * np.arange(1, 9)
    assert score_epdms(prepare_epdms(past()), plan, human_filter="off").hc[0] == 1.0
    loud = score_epdms(prepare_epdms(past(ax=np.array([2.5, 2.5, 2.5, 0.0]))), plan, human_filter="off")
    assert loud.hc[0] == 0.0
    assert not loud.history_comfort[0, 0]


@pytest.mark.parametrize(
    ("columns", "broken"),
    [
        ({"ax": 2.0, "omega": 0.4}, set()),
        ({"ax": 2.0, "omega": 0.6}, {"lon_acceleration"}),
        ({"ax": 2.0, "alpha": 0.2}, set()),
        ({"ax": 2.0, "alpha": 0.3}, {"lon_acceleration"}),
        ({"ax": -4.0, "omega": 0.6}, set()),
        ({"ax": -4.2, "omega": 0.4}, set()),
        ({"ay": 4.8, "alpha": 1.0}, set()),
    ],
)
def test_the_centre_shift_adds_both_terms_along_x(columns: dict[str, float], broken: set[str]) -> None:
    """ax + 1.461 (omega^2 + alpha): 2 + 0.234 < 2.4 < 2 + 0.526; 2 + 0.292 < 2.4 < 2 + 0.438; -4.2 + 0.234 > -4.05.

    In physics the first term would be subtracted (2 - 0.526 is fine, -4 - 0.526 is not) and the second would act along
    y, where 4.8 + 1.461 > 4.89. Without a shift 2.0 is fine and -4.2 is not. The past holds the same ax and ay.
    """
    history = np.tile([0.0, columns.get("ax", 0.0), columns.get("ay", 0.0)], (14, 1))
    if columns.get("ax") == -4.2:
        history[:, 1] = -4.0
    got = failed(states_of(**columns), history)
    assert got & {"lon_acceleration", "lat_acceleration"} == broken


def test_total_jerk_is_that_of_the_rear_axle() -> None:
    """alpha grows by 6.5 rad/s^3: the shifted ax has a jerk of 1.461 * 6.5 = 9.5 > 8.37, the rear axle has none."""
    got = failed(states_of(alpha=6.5 * np.maximum(T - 1.0, 0.0)))
    assert "lon_jerk" in got
    assert "jerk" not in got


def test_yaw_acceleration_of_the_past_and_plan_is_that_of_a_cubic() -> None:
    """heading = c t^3 from t=0 on: 6 c t is 1.95 at the last step only; a parabola would keep 6 c 3.8 = 1.85 there."""
    assert "yaw_acceleration" in failed(states_of(heading=1.95 / 24.0 * T**3))
    assert "yaw_acceleration" not in failed(states_of(heading=1.91 / 24.0 * T**3))


def test_accelerations_are_smoothed_over_eight_samples() -> None:
    """A spike in one sample stands out by 0.28125 of its height: 8 gives 2.25, 9 gives 2.53 m/s^2.

    In windows of seven and nine it is 0.333 and 0.255, in one over all samples 0.037.
    """
    spike = np.zeros(41)
    spike[20] = 8.0
    assert "lon_acceleration" not in failed(states_of(ax=spike))
    spike[20] = 9.0
    assert "lon_acceleration" in failed(states_of(ax=spike))


def test_jerk_is_the_slope_over_fifteen_samples() -> None:
    """A step of ax has a slope of 1.0045 of its height: 3 gives 3.01, 4.5 gives 4.52 m/s^3.

    Over eight samples it is 1.875, over all samples 0.538 of the height.
    """
    step = np.where(T < 1.95, 0.0, 1.0)
    assert "lon_jerk" not in failed(states_of(ax=3.0 * step))
    assert "lon_jerk" in failed(states_of(ax=4.5 * step))


@pytest.mark.parametrize("seed", range(40))
def test_history_comfort_equals_scipys_filters(seed: int) -> None:
    """Random motions near the bounds, so that each test passes here and fails there."""
    rng = np.random.default_rng(seed)
    turn, rate = rng.uniform(0.2, 1.2), rng.uniform(0.5, 2.5)
    heading = turn * np.sin(rate * T)
    states = states_of(
        heading=np.remainder(heading + 3.0 + math.pi, 2 * math.pi) - math.pi,
        ax=rng.uniform(0.5, 3.0) * np.sin(rng.uniform(0.5, 2.5) * T),
        ay=np.concatenate([[rng.uniform(0.0, 9.0)], np.zeros(40)]),
        omega=turn * rate * np.cos(rate * T),
        alpha=-turn * rate**2 * np.sin(rate * T),
    )
    history = np.stack([3.0 + 0.1 * T[:14] - 0.15, rng.uniform(-1, 1) * T[:14], rng.uniform(0, 3) * T[:14]], axis=1)
    passed = np.zeros((1, 6), dtype=bool)
    history_comfort(history, states, passed)
    assert passed[0].tolist() == filtered.history_comfort(history, states[0])


def rms_of(states: np.ndarray, previous: np.ndarray, offset: int = 5) -> np.ndarray:
    rms = np.empty((1, 4))
    frame_differences(states, previous, offset, rms)
    return rms[0]


def test_frames_are_compared_where_they_overlap_in_time() -> None:
    """One motion seen from two frames 0.5 s apart differs by nothing; one step out it differs by 0.1 s of jerk 8.

    ax = 8 t in the world's time: step k of this frame is step k + 5 of the previous one.
    """
    now, before = states_of(ax=8.0 * (T + 0.5)), states_of(ax=8.0 * T)
    np.testing.assert_allclose(rms_of(now, before), 0.0, atol=1e-7)
    np.testing.assert_allclose(rms_of(now, before, 4), [0.8, 0.0, 0.0, 0.0], atol=1e-6)


def test_frame_yaw_acceleration_is_that_of_a_parabola() -> None:
    """heading = t^3 / 6 against 0: the second derivative is t inside; a parabola keeps it constant at both ends.

    So it is t_2 three times, t_3 … t_32, t_33 three times. A cubic would give t_0 … t_35.
    """
    cubic = states_of(heading=T**3 / 6.0)
    inner = T[2:34]
    expected = math.sqrt(((inner**2).sum() + 2 * T[2] ** 2 + 2 * T[33] ** 2) / 36)
    of_a_cubic = math.sqrt((T[:36] ** 2).mean())
    assert rms_of(cubic, states_of())[3] == pytest.approx(expected, abs=1e-6)
    assert abs(expected - of_a_cubic) > 1e-2


def test_frames_compare_the_size_of_unshifted_acceleration() -> None:
    """ax = 3, ay = 4 against ax = -5: both 5 m/s^2. A turn (omega, alpha) plays no part in it."""
    assert rms_of(states_of(ax=3.0, ay=4.0), states_of(ax=-5.0))[0] == pytest.approx(0.0, abs=1e-7)
    assert rms_of(states_of(ax=1.0, omega=2.0, alpha=3.0), states_of(ax=1.0))[0] == pytest.approx(0.0, abs=1e-7)


@pytest.mark.parametrize("seed", range(10))
def test_frame_differences_equal_scipys_filters(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pair = [
        states_of(
            ax=rng.normal(size=41),
            ay=rng.normal(size=41),
            heading=np.remainder(np.cumsum(rng.normal(0.0, 0.2, 41)) + 3.0 + math.pi, 2 * math.pi) - math.pi,
        )
        for _ in range(2)
    ]
    for offset in (3, 5):
        expected = filtered.frame_rms(pair[0][0], pair[1][0], offset)
        np.testing.assert_allclose(rms_of(*pair, offset), expected, atol=1e-6)
