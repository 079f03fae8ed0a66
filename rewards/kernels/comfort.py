"""NAVSIM v1.1 comfort: six bounds on smoothed accelerations, jerks and yaw motion of 41 states.

Savitzky-Golay smoothing is linear, so every signal is one constant matrix times one state column: a matrix of rank two
or three where one quadratic spans all samples, a short stencil where the window is five.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

from rewards.kernels.simulate import NUM_STATES
from rewards.kernels.smoothing import smooth, smoothing_matrix, stencil

__all__ = ["COMFORT_BOUNDS", "COMFORT_TESTS", "comfort_tests", "smoothing_matrix", "within_bounds"]

COMFORT_TESTS = ("lon_acceleration", "lat_acceleration", "jerk", "lon_jerk", "yaw_acceleration", "yaw_rate")
"""The six bounds, in the order of every ``[…, 6]`` array."""

COMFORT_BOUNDS = ((-4.05, 2.40), (-4.89, 4.89), (-8.37, 8.37), (-4.13, 4.13), (-1.93, 1.93), (-0.95, 0.95))
"""Exclusive bounds of the tests, in SI units (m/s^2, m/s^3, 1/s^2, 1/s)."""


def _factors(matrix: NDArray[np.float64], rank: int) -> NDArray[np.float64]:
    """A matrix ``[41, 41]`` of low rank r as ``[2, r, 41]``: ``matrix = factors[0].T @ factors[1]``."""
    left, size, right = np.linalg.svd(matrix)
    return np.ascontiguousarray(np.stack([(left[:, :rank] * size[:rank]).T, right[:rank]]))


# A quadratic over all samples has three coefficients, and its slope two: that is the rank of these filters.
_ACCELERATION = _factors(smoothing_matrix(NUM_STATES, NUM_STATES, 2), 3)
_JERK = _factors(smoothing_matrix(NUM_STATES, NUM_STATES, 2, 1) @ smoothing_matrix(NUM_STATES, 8, 2), 2)
_YAW_ACCELERATION = stencil(5, 3, 2)
_YAW_RATE = stencil(5, 2, 1)


@njit(cache=True, nogil=True)
def _fit(factors: NDArray[np.float64], signal: NDArray[np.float64], out: NDArray[np.float64]) -> None:
    """Filter `signal` ``[41]`` into `out`, rounded to 8 decimals."""
    out[:] = 0.0
    for r in range(factors.shape[1]):
        weight = 0.0
        for k in range(NUM_STATES):
            weight += factors[1, r, k] * signal[k]
        for i in range(NUM_STATES):
            out[i] += weight * factors[0, r, i]
    for i in range(NUM_STATES):
        out[i] = np.rint(out[i] * 1e8) / 1e8


@njit(cache=True, nogil=True)
def within_bounds(signal: NDArray[np.float64], test: int) -> bool:
    """Whether a signal stays strictly between the bounds of a test."""
    low, high = COMFORT_BOUNDS[test]
    inside = True
    for value in signal:
        inside &= low < value < high
    return inside


@njit(cache=True, nogil=True)
def comfort_tests(states: NDArray[np.float64], passed: NDArray[np.bool_]) -> None:
    """The six tests (`COMFORT_TESTS`) of one plan's 41 states ``[41, 11]``, into `passed` ``[6]``.

    v1.1 smooths accelerations and jerks with one quadratic over all 4.1 s, and yaw with windows of five samples.
    """
    work = np.empty((4, NUM_STATES))
    along, total, heading, out = work[0], work[1], work[2], work[3]
    turns = 0.0
    for k in range(NUM_STATES):
        along[k] = states[k, 5]
        total[k] = math.hypot(states[k, 5], states[k, 6])
        if k > 0:
            turns += np.rint((states[k, 2] - states[k - 1, 2]) / (2.0 * math.pi))
        heading[k] = states[k, 2] - 2.0 * math.pi * turns
    _fit(_ACCELERATION, along, out)
    passed[0] = within_bounds(out, 0)
    _fit(_ACCELERATION, states[:, 6], out)
    passed[1] = within_bounds(out, 1)
    _fit(_JERK, total, out)
    passed[2] = within_bounds(out, 2)
    _fit(_JERK, along, out)
    passed[3] = within_bounds(out, 3)
    smooth(_YAW_ACCELERATION, heading, out)
    passed[4] = within_bounds(out, 4)
    smooth(_YAW_RATE, heading, out)
    passed[5] = within_bounds(out, 5)
