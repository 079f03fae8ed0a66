"""History comfort and two-frame comfort on signals whose filtered value is known."""

from __future__ import annotations

import numpy as np
import pytest
from oracles.tiny_scene import straight_states
from scipy.signal import savgol_filter

from rewards.kernels.comfort import COMFORT_TESTS
from rewards.kernels.comfort_v2 import FRAME_LIMITS, frame_differences, history_comfort

T = 0.1 * np.arange(41)
COLUMNS = {"heading": 2, "ax": 5, "ay": 6, "yaw_rate": 9, "yaw_acceleration": 10}
AXLE_TO_CENTRE = 1.461


def states_with(**columns: np.ndarray | float) -> np.ndarray:
    states: np.ndarray = straight_states(5.0)
    for name, values in columns.items():
        states[0, :, COLUMNS[name]] = values
    return states


def failed(history: np.ndarray | None = None, **columns: np.ndarray | float) -> set[str]:
    """Names of the bounds that a past of `history` ``[H, 3]`` and states with these columns break."""
    passed = np.zeros((1, 6), dtype=bool)
    history_comfort(np.zeros((0, 3)) if history is None else history, states_with(**columns), passed)
    return {name for name, ok in zip(COMFORT_TESTS, passed[0], strict=True) if not ok}


def past(samples: int = 14, heading: float = 0.0, ax: float = 0.0, ay: float = 0.0) -> np.ndarray:
    return np.tile([heading, ax, ay], (samples, 1))


@pytest.mark.parametrize(
    ("test", "column", "within", "at"),
    [
        ("lon_acceleration", "ax", 2.39, 2.40),
        ("lon_acceleration", "ax", -4.04, -4.05),
        ("lat_acceleration", "ay", 4.88, 4.89),
        ("lat_acceleration", "ay", -4.88, -4.89),
    ],
)
def test_acceleration_bounds_are_strict(test: str, column: str, within: float, at: float) -> None:
    assert failed(None, **{column: within}) == set()
    assert failed(None, **{column: at}) == {test}


def test_acceleration_is_smoothed_by_windows_of_eight() -> None:
    """A spike weighs 9/32 at most in a quadratic fit over eight: 8.5 m/s^2 stay under 2.4 (at 8.533), 8.6 do not."""
    spike = np.zeros(41)
    spike[20] = 1.0
    assert savgol_filter(spike, 8, 2).max() == pytest.approx(9.0 / 32.0, abs=1e-12)
    assert "lon_acceleration" not in failed(ax=8.5 * spike)
    assert "lon_acceleration" in failed(ax=8.6 * spike)


def test_the_past_counts() -> None:
    assert failed(past(ax=2.5), ax=2.5) == {"lon_acceleration"}
    assert "lon_acceleration" in failed(past(ax=2.5))
    assert "lat_acceleration" in failed(past(ay=5.0))
    assert "yaw_rate" in failed(np.stack([np.arange(-14, 0) * 0.1, np.zeros(14), np.zeros(14)], axis=1))
    turned = past(heading=0.5)
    assert {"yaw_rate", "yaw_acceleration"} <= failed(turned)
    assert failed(turned, heading=0.5) == set()


def test_the_shift_to_the_box_centre_adds_both_yaw_terms_along_x() -> None:
    """1.461 m * (1.28 rad/s)^2 = 2.394 m/s^2 and 1.461 m * 1.64 rad/s^2 = 2.396; sideways nothing changes."""
    assert failed(yaw_rate=1.28) == set()
    assert failed(yaw_rate=1.29) == {"lon_acceleration"}
    assert failed(yaw_acceleration=1.64) == set()
    assert failed(yaw_acceleration=1.65) == {"lon_acceleration"}
    assert failed(yaw_acceleration=-2.76) == set()
    assert failed(yaw_acceleration=-2.78) == {"lon_acceleration"}
    assert "lat_acceleration" not in failed(yaw_acceleration=10.0, yaw_rate=10.0)
    assert failed(ax=1.0, yaw_rate=1.0) == {"lon_acceleration"}


def test_longitudinal_jerk_sees_the_shift_and_total_jerk_does_not() -> None:
    """A yaw acceleration of 1.461 a = 3 sin(4 t) m/s^2 swings by up to 12 m/s^3, 7 after smoothing."""
    swing = 3.0 / AXLE_TO_CENTRE * np.sin(4.0 * T)
    assert "lon_jerk" in failed(yaw_acceleration=swing)
    assert "jerk" not in failed(yaw_acceleration=1e3 * swing)


def test_jerk_is_a_slope_over_fifteen_samples_of_the_smoothed_signal() -> None:
    step = np.where(np.arange(41) < 20, 0.0, 1.0)
    slope = np.abs(savgol_filter(savgol_filter(step, 8, 2), 15, 2, deriv=1, delta=0.1)).max()
    assert failed(ax=(4.13 / slope - 0.001) * step - 2.6) == set()
    assert failed(ax=(4.13 / slope + 0.001) * step - 2.6) == {"lon_jerk"}
    assert "jerk" not in failed(ay=(8.37 / slope - 0.001) * step)
    assert "jerk" in failed(ay=(8.37 / slope + 0.001) * step)


def test_yaw_bounds_and_unwrapping() -> None:
    assert failed(heading=0.94 * T) == set()
    assert failed(heading=0.96 * T) == {"yaw_rate"}
    wrapped = (3.0 + 0.3 * T + np.pi) % (2 * np.pi) - np.pi
    assert wrapped.min() < -3.0
    assert failed(heading=wrapped) == set()
    assert failed(past(heading=3.0 - 2.0 * np.pi), heading=3.0) == set()


def test_yaw_acceleration_is_that_of_a_cubic() -> None:
    """A cubic's second derivative 6 c t is 1.95 at the last step only; a parabola would see 6 c 3.8 there."""
    assert "yaw_acceleration" in failed(heading=1.95 / 24.0 * T**3)
    assert "yaw_acceleration" not in failed(heading=1.91 / 24.0 * T**3)


def test_a_row_that_is_not_finite_fails_alone() -> None:
    states = np.concatenate([states_with(), states_with(ax=np.nan), states_with()])
    passed = np.zeros((3, 6), dtype=bool)
    history_comfort(past(), states, passed)
    assert passed.all(axis=1).tolist() == [True, False, True]


def differences(now: np.ndarray, then: np.ndarray, offset: int = 5) -> list[float]:
    rms = np.empty((1, 4))
    frame_differences(now, then, offset, rms)
    return [float(value) for value in rms[0]]


def test_frames_with_the_same_motion_do_not_differ() -> None:
    """What frame 0 does at step k, the frame five steps earlier does at step k + 5."""
    rng = np.random.default_rng(0)
    ax, heading = rng.normal(size=46), np.cumsum(0.1 * rng.normal(size=46))
    now, then = states_with(ax=ax[5:], heading=heading[5:]), states_with(ax=ax[:41], heading=heading[:41])
    assert differences(now, then) == [0.0] * 4
    assert max(differences(now, then, offset=4)) > 0.5


def test_root_mean_square_of_each_signal() -> None:
    """Constant 0.6 m/s^2; 0.4 m/s^3 of jerk; 0.08 rad/s; 0.05 rad/s^2. A parabola is exact in every filter but the
    first, which is half a step late inside."""
    still = states_with()
    assert differences(states_with(ax=0.6), still) == pytest.approx([0.6, 0.0, 0.0, 0.0], abs=1e-7)
    assert differences(states_with(ay=-0.6), still) == pytest.approx([0.6, 0.0, 0.0, 0.0], abs=1e-7)
    assert differences(states_with(ax=3.0, ay=4.0), still)[0] == pytest.approx(5.0, abs=1e-7)
    assert differences(states_with(ax=-0.6), states_with(ay=0.6)) == pytest.approx([0.0] * 4, abs=1e-7)
    ramp = savgol_filter(savgol_filter(0.4 * T[:36], 8, 2), 15, 2, deriv=1, delta=0.1)
    assert differences(states_with(ax=0.4 * T), still)[1] == pytest.approx(np.sqrt(np.mean(ramp**2)), abs=1e-7)
    assert differences(states_with(heading=0.08 * T), still)[2:] == pytest.approx([0.08, 0.0], abs=1e-7)
    assert differences(states_with(heading=0.025 * T**2), still)[3] == pytest.approx(0.05, abs=1e-7)
    assert FRAME_LIMITS == (0.7, 0.5, 0.1, 0.1)


def test_yaw_acceleration_between_frames_is_that_of_a_parabola() -> None:
    """Of t^3 / 10 it is 0.6 t inside, and at either end that of the first or last inner sample; a cubic would go on."""
    inside = 0.06 * np.clip(np.arange(36), 2, 33)
    found = differences(states_with(heading=0.1 * T**3), states_with())[3]
    assert found == pytest.approx(np.sqrt(np.mean(inside**2)), abs=1e-7)
    assert found < np.sqrt(np.mean((0.06 * np.arange(36)) ** 2)) - 0.005
