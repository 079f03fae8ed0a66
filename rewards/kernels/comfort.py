"""NAVSIM v1.1 comfort: six bounds on smoothed accelerations, jerks and yaw motion of 41 states.

Savitzky-Golay smoothing is linear, so every signal is one constant matrix times one state column.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

from rewards.kernels.simulate import NUM_STATES, STEP_S

__all__ = ["COMFORT_BOUNDS", "COMFORT_TESTS", "comfort_tests", "smoothing_matrix"]

COMFORT_TESTS = ("lon_acceleration", "lat_acceleration", "jerk", "lon_jerk", "yaw_acceleration", "yaw_rate")
"""The six bounds, in the order of every ``[…, 6]`` array."""

COMFORT_BOUNDS = ((-4.05, 2.40), (-4.89, 4.89), (-8.37, 8.37), (-4.13, 4.13), (-1.93, 1.93), (-0.95, 0.95))
"""Exclusive bounds of the tests, in SI units (m/s^2, m/s^3, 1/s^2, 1/s)."""


def smoothing_matrix(samples: int, window: int, order: int, derivative: int = 0) -> NDArray[np.float64]:
    """``[samples, samples]`` operator of scipy's `savgol_filter` with mode "interp" and 0.1 s between samples.

    Interior rows fit a polynomial of `order` to the window and evaluate it (or its derivative) in the middle, which for
    an even window lies between two samples; the rows at both ends evaluate the fit of the first and last window.

    Args:
        samples: Length of the signal, at least `window`.
        window: Samples in a window.
        order: Polynomial order.
        derivative: 0, 1 or 2.
    """
    half = window // 2

    def weights(at: float) -> NDArray[np.float64]:
        fit = np.linalg.pinv(np.vander(np.arange(window) - at, order + 1, increasing=True))
        return np.asarray(fit[derivative] * math.factorial(derivative) / STEP_S**derivative)

    matrix = np.zeros((samples, samples))
    middle = weights((window - 1) / 2)
    for i in range(half, samples - half):
        start = i - half + (window % 2 == 0)
        matrix[i, start : start + window] = middle
    for i in range(half):
        matrix[i, :window] = weights(float(i))
        matrix[samples - 1 - i, samples - window :] = weights(float(window - 1 - i))
    return matrix


def _operators() -> NDArray[np.float64]:
    """``[4, 41, 41]`` transposed operators: acceleration, jerk of the smoothed signal, yaw acceleration, yaw rate."""
    n = NUM_STATES
    jerk = smoothing_matrix(n, n, 2, 1) @ smoothing_matrix(n, 8, 2)
    operators = (smoothing_matrix(n, n, 2), jerk, smoothing_matrix(n, 5, 3, 2), smoothing_matrix(n, 5, 2, 1))
    return np.ascontiguousarray(np.stack([m.T for m in operators]))


_OPERATORS = _operators()


@njit(cache=True, nogil=True)
def _within(operator: int, signal: NDArray[np.float64], test: int, work: NDArray[np.float64]) -> bool:
    """Whether the filtered signal, rounded to 8 decimals, stays strictly between a test's bounds at every step."""
    low, high = COMFORT_BOUNDS[test]
    work[:] = 0.0
    for k in range(NUM_STATES):
        value = signal[k]
        for i in range(NUM_STATES):
            work[i] += _OPERATORS[operator, k, i] * value
    for i in range(NUM_STATES):
        rounded = np.rint(work[i] * 1e8) / 1e8
        if not low < rounded < high:
            return False
    return True


@njit(cache=True, nogil=True)
def comfort_tests(states: NDArray[np.float64], passed: NDArray[np.bool_]) -> None:
    """The six tests (`COMFORT_TESTS`) of one plan's 41 states ``[41, 11]``, into `passed` ``[6]``.

    v1.1 smooths accelerations and jerks with one quadratic over all 4.1 s, and yaw with windows of five samples.
    """
    work = np.empty(NUM_STATES)
    total = np.empty(NUM_STATES)
    heading = np.empty(NUM_STATES)
    turns = 0.0
    for k in range(NUM_STATES):
        total[k] = math.hypot(states[k, 5], states[k, 6])
        if k > 0:
            turns += np.rint((states[k, 2] - states[k - 1, 2]) / (2.0 * math.pi))
        heading[k] = states[k, 2] - 2.0 * math.pi * turns
    passed[0] = _within(0, states[:, 5], 0, work)
    passed[1] = _within(0, states[:, 6], 1, work)
    passed[2] = _within(1, total, 2, work)
    passed[3] = _within(1, states[:, 5], 3, work)
    passed[4] = _within(2, heading, 4, work)
    passed[5] = _within(3, heading, 5, work)
