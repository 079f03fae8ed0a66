"""From a plan of 8 poses to 41 simulated ego states: resampling, LQR tracker, kinematic bicycle (NAVSIM v1.1 and v2.2).

Every function is independent of the frame as long as ego state and poses share it. Prefer the t=0 ego frame: UTM
coordinates cost digits, which shows in plans that stand still. Letters: B plans, K = 41 states of 0.1 s, T = 8 poses.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

__all__ = [
    "NUM_STATES",
    "STATE_SIZE",
    "STEP_S",
    "interpolate_poses",
    "query_times_us",
    "resample_plan",
    "simulate_references",
]

STEP_S = 0.1
"""Seconds between simulated states."""
NUM_STATES = 41
"""K: states of a simulated plan, t = 0.0 … 4.0 s."""
STATE_SIZE = 11
"""x, y, heading, vx, vy, ax, ay, steering, steering rate, yaw rate, yaw acceleration of the rear axle."""

_STEPS = NUM_STATES - 1
_WHEEL_BASE_M = 3.089
_MAX_STEERING = math.pi / 3.0
_LOOKAHEAD = 10
_STOP_MPS = 0.2
_STOP_GAIN = 0.5
_SPEED_GAIN = 10.0 / 11.0
_HEADING_COST = 10.0
_ACCELERATION_BLEND = STEP_S / (STEP_S + 0.2)
_STEERING_BLEND = STEP_S / (STEP_S + 0.05)
_RATE_PENALTY = 1e-2 / STEP_S**2
_INITIAL_CURVATURE_PENALTY = 1e-10


def _speed_fit_matrix() -> NDArray[np.float64]:
    """``[40, 40]`` matrix that maps displacements along the heading to NAVSIM's fitted speed profile.

    Least squares over initial speed and 39 accelerations, ``|u - B z|^2 + 1e-4 |R z|^2``. R penalises the accelerations
    themselves and only in its last row a difference: NAVSIM's code overwrites the difference matrix it meant, and
    simulated positions depend on it by metres.
    """
    to_speed = np.zeros((_STEPS, _STEPS))
    to_speed[:, 0] = 1.0
    to_speed[:, 1:] = STEP_S * np.tri(_STEPS, _STEPS - 1, -1)
    design = STEP_S * to_speed
    penalty = np.zeros((_STEPS - 2, _STEPS))
    rows = np.arange(_STEPS - 2)
    penalty[rows, rows + 1] = -1.0
    penalty[-1, -1] = 1.0
    normal = design.T @ design + 1e-4 * penalty.T @ penalty
    return np.ascontiguousarray(to_speed @ np.linalg.pinv(normal) @ design.T)


_SPEED_FIT_TRANSPOSED = np.ascontiguousarray(_speed_fit_matrix().T)


@njit(cache=True, nogil=True)
def _wrap(angle: float) -> float:
    shifted = angle + math.pi
    if not 0.0 <= shifted < 2.0 * math.pi:
        shifted %= 2.0 * math.pi
    return shifted - math.pi


@njit(cache=True, nogil=True)
def _fit_speed(ref: NDArray[np.float64], direction: NDArray[np.float64], speed: NDArray[np.float64]) -> None:
    """Speed profile ``[40]`` of one reference ``[41, 3]`` with directions ``[40, 2]`` (cos, sin), into `speed`."""
    speed[:] = 0.0
    for k in range(_STEPS):
        along = (ref[k + 1, 0] - ref[k, 0]) * direction[k, 0] + (ref[k + 1, 1] - ref[k, 1]) * direction[k, 1]
        for i in range(_STEPS):
            speed[i] += _SPEED_FIT_TRANSPOSED[k, i] * along


@njit(cache=True, nogil=True)
def _fit_curvature(
    ref: NDArray[np.float64], speed: NDArray[np.float64], curvature: NDArray[np.float64], work: NDArray[np.float64]
) -> None:
    """Curvature profile of one reference, into `curvature` ``[50]``: 40 values, then the last one held.

    NAVSIM fits an initial curvature (penalty 1e-10) and 39 rates (penalty 1e-2) to heading changes ``v_k dt kappa_k``.
    In the curvatures themselves the normal equations are tridiagonal: elimination needs no pivoting and is stable.
    """
    previous = 0.0
    for k in range(_STEPS):
        gain = speed[k] * STEP_S
        neighbours = 1.0 if k == 0 or k == _STEPS - 1 else 2.0
        diagonal = gain * gain + neighbours * _RATE_PENALTY
        right = gain * _wrap(ref[k + 1, 2] - ref[k, 2])
        if k == 0:
            diagonal += _INITIAL_CURVATURE_PENALTY
        else:
            diagonal -= _RATE_PENALTY * work[k - 1]
            right += _RATE_PENALTY * previous
        work[k] = _RATE_PENALTY / diagonal
        previous = right / diagonal
        curvature[k] = previous
    for k in range(_STEPS - 2, -1, -1):
        curvature[k] += work[k] * curvature[k + 1]
    curvature[_STEPS:] = curvature[_STEPS - 1]


@njit(cache=True, nogil=True)
def _steering_rate(
    state: NDArray[np.float64],
    pose: NDArray[np.float64],
    direction: NDArray[np.float64],
    acceleration: float,
    curvature: NDArray[np.float64],
    step: int,
) -> float:
    """Steering rate (rad/s) of the one-shot lateral LQR over ten steps; the speed is extrapolated at `acceleration`."""
    dx, dy = state[0] - pose[0], state[1] - pose[1]
    lateral = -dx * direction[1] + dy * direction[0]
    heading = _wrap(state[2] - pose[2])
    steering = state[7]
    # Accumulated transition of (lateral, heading, steering): only these entries differ from identity or zero.
    a01, a02, a12 = 0.0, 0.0, 0.0
    b0, b1, b2 = 0.0, 0.0, 0.0
    g0, g1 = 0.0, 0.0
    for k in range(_LOOKAHEAD):
        travel = (state[3] + acceleration * STEP_S * k) * STEP_S
        turn = travel / _WHEEL_BASE_M
        a01, a02, a12 = a01 + travel, a02 + travel * a12, a12 + turn
        b0, b1, b2 = b0 + travel * b1, b1 + turn * b2, b2 + STEP_S
        g0, g1 = g0 + travel * g1, g1 - travel * curvature[step + k]
    lateral_end = lateral + a01 * heading + a02 * steering + g0
    heading_end = _wrap(heading + a12 * steering + g1)
    rate: float = -(b0 * lateral_end + _HEADING_COST * b1 * heading_end) / (b0 * b0 + _HEADING_COST * b1 * b1 + 1.0)
    return rate


@njit(cache=True, nogil=True)
def _advance(
    state: NDArray[np.float64], slope: float, acceleration: float, steering_rate: float, after: NDArray[np.float64]
) -> float:
    """One explicit step of the kinematic bicycle: position and heading move with the old speed and steering.

    `slope` is the tangent of the old steering; returns that of the new one.
    """
    speed, heading = state[3], state[2]
    after[0] = state[0] + speed * math.cos(heading) * STEP_S
    after[1] = state[1] + speed * math.sin(heading) * STEP_S
    after[2] = _wrap(heading + speed * slope / _WHEEL_BASE_M * STEP_S)
    after[5] = state[5] + _ACCELERATION_BLEND * (acceleration - state[5])
    after[3] = speed + after[5] * STEP_S
    after[4] = 0.0
    after[6] = 0.0
    after[8] = _STEERING_BLEND * steering_rate
    after[7] = min(max(state[7] + after[8] * STEP_S, -_MAX_STEERING), _MAX_STEERING)
    slope = math.tan(after[7])
    after[9] = after[3] * slope / _WHEEL_BASE_M
    after[10] = (after[9] - state[9]) / STEP_S
    return slope


@njit(cache=True, nogil=True)
def _simulate(ego_init: NDArray[np.float64], refs: NDArray[np.float64], states: NDArray[np.float64]) -> None:
    direction = np.empty((_STEPS, 2))
    speed = np.empty(_STEPS)
    curvature = np.empty(_STEPS + _LOOKAHEAD)
    work = np.empty(_STEPS)
    for b in range(refs.shape[0]):
        ref, out = refs[b], states[b]
        for k in range(_STEPS):
            direction[k, 0], direction[k, 1] = math.cos(ref[k, 2]), math.sin(ref[k, 2])
        _fit_speed(ref, direction, speed)
        _fit_curvature(ref, speed, curvature, work)
        out[0] = ego_init
        slope = math.tan(ego_init[7])
        for i in range(_STEPS):
            target = speed[min(i + _LOOKAHEAD, _STEPS - 1)]
            excess = out[i, 3] - target
            if target <= _STOP_MPS and out[i, 3] <= _STOP_MPS:
                slope = _advance(out[i], slope, -_STOP_GAIN * excess, 0.0, out[i + 1])
            else:
                acceleration = -_SPEED_GAIN * excess
                rate = _steering_rate(out[i], ref[i], direction[i], acceleration, curvature, i)
                slope = _advance(out[i], slope, acceleration, rate, out[i + 1])


def simulate_references(ego_init: NDArray[np.float64], refs_BK3: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ego states when NAVSIM's tracker and bicycle follow reference poses.

    Args:
        ego_init: ``[11]`` true ego state at t=0 (see `STATE_SIZE`), pose in the frame of `refs_BK3`.
        refs_BK3: ``[B, 41, 3]`` x, y (m), heading (rad), every 0.1 s. Row 0 need not be the ego pose.

    Returns:
        ``[B, 41, 11]`` states in the same frame; row 0 is `ego_init`. A row with a value that is not finite stays so.
    """
    refs = np.ascontiguousarray(refs_BK3, dtype=np.float64)
    states = np.empty((len(refs), NUM_STATES, STATE_SIZE))
    _simulate(np.ascontiguousarray(ego_init, dtype=np.float64), refs, states)
    return states


@njit(cache=True, nogil=True)
def _interpolate(
    times: NDArray[np.float64], knots: NDArray[np.float64], query: NDArray[np.float64], out: NDArray[np.float64]
) -> None:
    heading = np.empty(len(times))
    for b in range(knots.shape[0]):
        heading[0] = knots[b, 0, 2]
        for n in range(1, len(times)):
            heading[n] = heading[n - 1] + _wrap(knots[b, n, 2] - heading[n - 1])
        n = 1
        for k in range(len(query)):
            t = min(max(query[k], times[0]), times[-1])
            while n < len(times) - 1 and t > times[n]:
                n += 1
            share = (t - times[n - 1]) / (times[n] - times[n - 1])
            for d in range(2):
                out[b, k, d] = knots[b, n - 1, d] + share * (knots[b, n, d] - knots[b, n - 1, d])
            out[b, k, 2] = _wrap(heading[n - 1] + share * (heading[n] - heading[n - 1]))


def interpolate_poses(
    times_us: NDArray[np.int64], knots_BN3: NDArray[np.float64], query_us: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Poses at rising query times: x and y linear, heading linear along the shorter turn, clipped to the knots' span.

    Args:
        times_us: ``[N]`` rising knot times (microseconds).
        knots_BN3: ``[B, N, 3]`` poses at the knots.
        query_us: ``[K]`` rising query times.

    Returns:
        ``[B, K, 3]`` with headings in [-pi, pi).
    """
    start = int(times_us[0])
    knots = np.ascontiguousarray(knots_BN3, dtype=np.float64)
    out = np.empty((len(knots), len(query_us), 3))
    times = np.asarray(times_us - start, dtype=np.float64)
    _interpolate(times, knots, np.asarray(query_us - start, dtype=np.float64), out)
    return out


def query_times_us(t0_us: int) -> NDArray[np.int64]:
    """``[41]`` times of the simulated states, truncated to microseconds as NAVSIM does (up to 1 us early)."""
    return np.asarray((STEP_S * np.arange(NUM_STATES) + t0_us * 1e-6) * 1e6, dtype=np.int64)


def resample_plan(ego_init: NDArray[np.float64], t0_us: int, poses_BT3: NDArray[np.float64]) -> NDArray[np.float64]:
    """Reference poses every 0.1 s from plans of poses every 0.5 s.

    Args:
        ego_init: ``[11]`` (or any array that starts with x, y, heading): the pose the plans are relative to, in the
            frame wanted. Zeros keep the t=0 ego frame.
        t0_us: Time of t=0 (microseconds).
        poses_BT3: ``[B, 8, 3]`` poses of the rear axle in the t=0 ego frame at 0.5 … 4.0 s.

    Returns:
        ``[B, 41, 3]`` in the frame of `ego_init`.
    """
    poses = np.asarray(poses_BT3, dtype=np.float64)
    x, y, heading = (float(v) for v in ego_init[:3])
    cos, sin = math.cos(heading), math.sin(heading)
    knots = np.empty((len(poses), poses.shape[1] + 1, 3))
    knots[:, 0] = x, y, heading
    knots[:, 1:, 0] = x + cos * poses[..., 0] - sin * poses[..., 1]
    knots[:, 1:, 1] = y + sin * poses[..., 0] + cos * poses[..., 1]
    knots[:, 1:, 2] = heading + poses[..., 2]
    offsets_s = 0.5 * np.arange(1, poses.shape[1] + 1)
    times = np.concatenate([[t0_us], np.asarray((offsets_s + t0_us * 1e-6) * 1e6, dtype=np.int64)])
    return interpolate_poses(times, knots, query_times_us(t0_us))
