"""Comfort bounds on signals whose filtered value is known, and the filter against scipy."""

from __future__ import annotations

import numpy as np
import pytest
from oracles.tiny_scene import straight_states
from scipy.signal import savgol_filter

from rewards.kernels.comfort import COMFORT_TESTS, comfort_tests, smoothing_matrix

T = 0.1 * np.arange(41)


def failed(**columns: np.ndarray) -> set[str]:
    """Names of the bounds that states with these columns break."""
    states = straight_states(5.0)[0]
    for name, values in columns.items():
        states[:, {"heading": 2, "ax": 5, "ay": 6}[name]] = values
    passed = np.zeros(6, dtype=bool)
    comfort_tests(states, passed)
    return {name for name, ok in zip(COMFORT_TESTS, passed, strict=True) if not ok}


@pytest.mark.parametrize(
    ("samples", "window", "order", "derivative"),
    [(41, 8, 2, 0), (41, 41, 2, 0), (41, 41, 2, 1), (41, 15, 2, 1), (55, 8, 2, 0), (41, 5, 2, 1), (41, 5, 3, 2)],
)
def test_smoothing_matrix_is_scipys_filter(samples: int, window: int, order: int, derivative: int) -> None:
    signal = np.random.default_rng(0).normal(size=samples)
    expected = savgol_filter(signal, window, order, deriv=derivative, delta=0.1)
    matrix = smoothing_matrix(samples, window, order, derivative)
    np.testing.assert_allclose(matrix @ signal, expected, atol=1e-9 / 0.1**derivative)


def test_steady_driving_is_comfortable() -> None:
    assert failed() == set()


def test_longitudinal_acceleration_bounds_are_strict() -> None:
    assert failed(ax=np.full(41, 2.39)) == set()
    assert failed(ax=np.full(41, 2.40)) == {"lon_acceleration"}
    assert failed(ax=np.full(41, -4.04)) == set()
    assert failed(ax=np.full(41, -4.05)) == {"lon_acceleration"}


def test_lateral_acceleration_bounds() -> None:
    assert failed(ay=np.full(41, -4.88)) == set()
    assert failed(ay=np.full(41, -4.90)) == {"lat_acceleration"}


def test_acceleration_is_smoothed_by_one_quadratic_over_all_steps() -> None:
    """A spike of 15 m/s^2 in the middle step: 15 * 9/4/41 = 0.82 in the global fit, beyond 2.4 in a window of eight."""
    spike = np.zeros(41)
    spike[20] = 15.0
    assert "lon_acceleration" not in failed(ax=spike)
    assert (smoothing_matrix(41, 8, 2) @ spike).max() > 2.40
    assert "lon_acceleration" in failed(ax=3.0 * spike)


def test_jerk_is_the_slope_of_that_quadratic() -> None:
    """The even window of the first smoothing is half a step late, which makes a ramp 5.07 % steeper at its start."""
    late = 1.0 + 0.0507377
    assert "lon_jerk" not in failed(ax=(4.13 / late - 0.01) * T)
    assert "lon_jerk" in failed(ax=(4.13 / late + 0.01) * T)
    assert "jerk" not in failed(ay=(8.37 / late - 0.01) * T)
    assert failed(ay=(8.37 / late + 0.01) * T) == {"lat_acceleration", "jerk"}


def test_yaw_bounds_use_windows_of_five() -> None:
    assert failed(heading=0.94 * T) == set()
    assert failed(heading=0.96 * T) == {"yaw_rate"}
    wave = 1.0 / 4.0**2 * np.sin(4.0 * T)
    assert failed(heading=1.8 * wave) == set()
    assert failed(heading=2.1 * wave) == {"yaw_acceleration"}


def test_yaw_acceleration_is_that_of_a_cubic() -> None:
    """A cubic heading's second derivative 6 c t is 1.95 at the last step only; a parabola would see 6 c 3.8 there."""
    assert "yaw_acceleration" in failed(heading=1.95 / 24.0 * T**3)
    assert "yaw_acceleration" not in failed(heading=1.91 / 24.0 * T**3)


def test_heading_is_unwrapped() -> None:
    heading = (3.0 + 0.3 * T + np.pi) % (2 * np.pi) - np.pi
    assert heading.min() < -3.0
    assert failed(heading=heading) == set()
