"""Comfort of NAVSIM v2.2: bounds over the logged past and a simulated plan (HC), and the change between the plans of
two consecutive frames (EC)."""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

from rewards.kernels.boxes import REAR_AXLE_TO_CENTER_M
from rewards.kernels.comfort import within_bounds
from rewards.kernels.smoothing import smooth, stencil

__all__ = ["FRAME_LIMITS", "frame_differences", "history_comfort"]

FRAME_LIMITS = (0.7, 0.5, 0.1, 0.1)
"""What the root mean squares of EC may reach: acceleration (m/s^2), jerk (m/s^3), yaw rate (1/s), yaw acceleration
(1/s^2)."""

_ACCELERATION = stencil(8, 2)
_JERK = stencil(15, 2, 1)
_YAW_RATE = stencil(5, 2, 1)
_YAW_ACCELERATION = stencil(5, 3, 2)
_FRAME_YAW_ACCELERATION = stencil(5, 2, 2)


@njit(cache=True, nogil=True)
def _unwrap(heading: NDArray[np.float64]) -> None:
    """Take whole turns out of a heading in place."""
    before, turns = heading[0], 0.0
    for k in range(1, len(heading)):
        raw = heading[k]
        turns += np.rint((raw - before) / (2.0 * math.pi))
        before = raw
        heading[k] = raw - 2.0 * math.pi * turns


@njit(cache=True, nogil=True)
def _history_tests(work: NDArray[np.float64], passed: NDArray[np.bool_]) -> None:
    """The six tests of one row; `work` ``[6, n]`` holds heading, longitudinal, lateral and total acceleration."""
    heading, along, across, total, smoothed, slope = work[0], work[1], work[2], work[3], work[4], work[5]
    smooth(_ACCELERATION, along, smoothed)
    passed[0] = within_bounds(smoothed, 0)
    smooth(_JERK, smoothed, slope)
    passed[3] = within_bounds(slope, 3)
    smooth(_ACCELERATION, across, smoothed)
    passed[1] = within_bounds(smoothed, 1)
    smooth(_ACCELERATION, total, smoothed)
    smooth(_JERK, smoothed, slope)
    passed[2] = within_bounds(slope, 2)
    _unwrap(heading)
    smooth(_YAW_ACCELERATION, heading, smoothed)
    passed[4] = within_bounds(smoothed, 4)
    smooth(_YAW_RATE, heading, smoothed)
    passed[5] = within_bounds(smoothed, 5)


@njit(cache=True, nogil=True)
def history_comfort(history: NDArray[np.float64], states: NDArray[np.float64], passed: NDArray[np.bool_]) -> None:
    """The six tests (`COMFORT_TESTS`) of the past followed by each plan, every sample taken as 0.1 s after the last.

    The longitudinal acceleration is that of the box centre as NAVSIM writes it: yaw rate squared *and* yaw acceleration
    are both added along x. The total is that of the rear axle.

    Args:
        history: ``[H, 3]`` heading, ax, ay of the past; the yaw rate is taken as 0 there.
        states: ``[B, K, 11]`` simulated states. Rows that are not finite fail.
        passed: ``[B, 6]`` filled.
    """
    past, steps = len(history), states.shape[1]
    work = np.empty((6, past + steps))
    for b in range(len(states)):
        for k in range(past):
            work[0, k], work[1, k], work[2, k] = history[k, 0], history[k, 1], history[k, 2]
            work[3, k] = math.hypot(history[k, 1], history[k, 2])
        for k in range(steps):
            state, n = states[b, k], past + k
            work[0, n] = state[2]
            work[1, n] = state[5] + REAR_AXLE_TO_CENTER_M * (state[9] * state[9] + state[10])
            work[2, n] = state[6]
            work[3, n] = math.hypot(state[5], state[6])
        _history_tests(work, passed[b])


@njit(cache=True, nogil=True)
def _frame_features(states: NDArray[np.float64], work: NDArray[np.float64], features: NDArray[np.float64]) -> None:
    """Acceleration, jerk, yaw rate, yaw acceleration ``[4, n]`` of one plan's states ``[n, 11]``; `work` ``[n]``."""
    for k in range(len(states)):
        work[k] = math.hypot(states[k, 5], states[k, 6])
    smooth(_ACCELERATION, work, features[0])
    smooth(_JERK, features[0], features[1])
    for k in range(len(states)):
        work[k] = states[k, 2]
    _unwrap(work)
    smooth(_YAW_RATE, work, features[2])
    smooth(_FRAME_YAW_ACCELERATION, work, features[3])


@njit(cache=True, nogil=True)
def frame_differences(
    states: NDArray[np.float64], previous: NDArray[np.float64], offset: int, rms: NDArray[np.float64]
) -> None:
    """Root mean square of the change of four signals between two frames' plans, where the plans overlap in time.

    Only accelerations and yaw motion are compared, so the frames' coordinates do not matter.

    Args:
        states: ``[B, K, 11]`` simulated states of this frame.
        previous: ``[B, K, 11]`` those of the previous frame, `offset` steps earlier.
        offset: 1 … K - 15 steps.
        rms: ``[B, 4]`` filled: acceleration, jerk, yaw rate, yaw acceleration (`FRAME_LIMITS`).
    """
    steps = states.shape[1] - offset
    work = np.empty(steps)
    now = np.empty((4, steps))
    then = np.empty((4, steps))
    for b in range(len(states)):
        _frame_features(states[b, :steps], work, now)
        _frame_features(previous[b, offset:], work, then)
        for i in range(4):
            total = 0.0
            for k in range(steps):
                total += (now[i, k] - then[i, k]) ** 2
            rms[b, i] = math.sqrt(total / steps)
