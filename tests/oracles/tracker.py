"""The tracker and the bicycle once more, written out with matrices and without speed: an oracle for the kernels."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

DT = 0.1
STEPS = 40
WHEEL_BASE = 3.089


def wrapped(angle: float) -> float:
    return math.atan2(math.sin(angle), math.cos(angle))


def speed_profile(reference: NDArray[np.float64]) -> NDArray[np.float64]:
    """``[40]`` least squares over an initial speed and 39 accelerations.

    Each acceleration is penalised by 1e-4, and in the last row the difference of the last two.
    """
    heading = reference[:-1, 2]
    along = np.stack([np.cos(heading), np.sin(heading)], axis=1)
    displacement = (np.diff(reference[:, :2], axis=0) * along).sum(axis=1)
    design = np.zeros((STEPS, STEPS))
    for k in range(STEPS):
        design[k, 0] = DT
        design[k, 1 : k + 1] = DT * DT
    penalty = np.zeros((STEPS - 2, STEPS))
    for i in range(STEPS - 3):
        penalty[i, i + 1] = -1.0
    penalty[-1, STEPS - 2], penalty[-1, STEPS - 1] = -1.0, 1.0
    z = np.linalg.pinv(design.T @ design + 1e-4 * penalty.T @ penalty) @ design.T @ displacement
    return np.asarray(z[0] + DT * np.concatenate([[0.0], np.cumsum(z[1:])]))


def curvature_profile(reference: NDArray[np.float64], speed: NDArray[np.float64]) -> NDArray[np.float64]:
    """``[40]`` least squares over an initial curvature (penalty 1e-10) and 39 rates (1e-2)."""
    turn = np.array([wrapped(d) for d in np.diff(reference[:, 2])])
    design = np.zeros((STEPS, STEPS))
    for k in range(STEPS):
        design[k, 0] = speed[k] * DT
        design[k, 1 : k + 1] = speed[k] * DT * DT
    penalty = np.diag([1e-10, *[1e-2] * (STEPS - 1)])
    w = np.linalg.solve(design.T @ design + penalty, design.T @ turn)
    return np.asarray(w[0] + DT * np.concatenate([[0.0], np.cumsum(w[1:])]))


def steering_rate(
    state: NDArray[np.float64], pose: NDArray[np.float64], acceleration: float, curvature: NDArray[np.float64]
) -> float:
    """One steering rate for ten steps that brings lateral error (cost 1) and heading error (cost 10) down."""
    transition, effect, drift = np.eye(3), np.zeros(3), np.zeros(3)
    for k in range(10):
        speed = state[3] + acceleration * DT * k
        step = np.eye(3)
        step[0, 1], step[1, 2] = speed * DT, speed * DT / WHEEL_BASE
        transition = step @ transition
        effect = step @ effect + np.array([0.0, 0.0, DT])
        drift = step @ drift + np.array([0.0, -speed * curvature[k] * DT, 0.0])
    dx, dy = state[:2] - pose[:2]
    lateral = -dx * math.sin(pose[2]) + dy * math.cos(pose[2])
    error = transition @ np.array([lateral, wrapped(state[2] - pose[2]), state[7]]) + drift
    error[1], error[2] = wrapped(error[1]), wrapped(error[2])
    cost = np.diag([1.0, 10.0, 0.0])
    return float(-(effect @ cost @ error) / (effect @ cost @ effect + 1.0))


def bicycle(state: NDArray[np.float64], acceleration: float, rate: float) -> NDArray[np.float64]:
    """One step: the pose moves with the old speed and steering, actuators lag by 0.2 s and 0.05 s."""
    x, y, heading, v, _, a, _, steering, _, omega, _ = state
    a += DT / (DT + 0.2) * (acceleration - a)
    rate *= DT / (DT + 0.05)
    after_v = v + DT * a
    after_steering = float(np.clip(steering + DT * rate, -math.pi / 3, math.pi / 3))
    after_omega = after_v * math.tan(after_steering) / WHEEL_BASE
    moved = (x + DT * v * math.cos(heading), y + DT * v * math.sin(heading))
    turned = wrapped(heading + DT * v * math.tan(steering) / WHEEL_BASE)
    return np.array(
        [*moved, turned, after_v, 0.0, a, 0.0, after_steering, rate, after_omega, (after_omega - omega) / DT]
    )


def simulate(ego: NDArray[np.float64], reference: NDArray[np.float64]) -> NDArray[np.float64]:
    """``[41, 11]`` states of an ego that follows ``[41, 3]`` reference poses."""
    speed = speed_profile(reference)
    curvature = curvature_profile(reference, speed)
    states = [np.asarray(ego, dtype=np.float64)]
    for i in range(STEPS):
        ahead = min(i + 10, STEPS - 1)
        window = np.concatenate([curvature[i:ahead], np.full(10, curvature[ahead])])[:10]
        state, wanted = states[-1], speed[ahead]
        if wanted <= 0.2 and state[3] <= 0.2:
            states.append(bicycle(state, -0.5 * (state[3] - wanted), 0.0))
            continue
        acceleration = -(10.0 / 11.0) * (state[3] - wanted)
        states.append(bicycle(state, acceleration, steering_rate(state, reference[i], acceleration, window)))
    return np.stack(states)
