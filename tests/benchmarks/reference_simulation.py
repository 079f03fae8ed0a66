"""NAVSIM's resampling, tracker and bicycle in plain NumPy, vectorised over plans."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

DT, WHEEL_BASE_M = 0.1, 3.089


def interpolate_numpy(ego_init: NDArray[np.float64], plans: NDArray[np.float64]) -> NDArray[np.float64]:
    """Poses ``[B, 41, 3]`` every 0.1 s of plans ``[B, 8, 3]`` from the t=0 ego pose."""
    knots = np.concatenate([np.broadcast_to(ego_init[:3], (len(plans), 1, 3)), plans], axis=1)
    knots[..., 2] = np.unwrap(knots[..., 2])
    at = np.arange(41) / 5.0
    low = np.minimum(at.astype(int), 7)
    poses = knots[:, low] + (at - low)[:, None] * (knots[:, low + 1] - knots[:, low])
    poses[..., 2] = (poses[..., 2] + np.pi) % (2.0 * np.pi) - np.pi
    return poses


def fit_profiles(refs: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Speed and curvature profiles by batched dense normal equations."""
    heading = refs[:, :-1, 2]
    along = (np.diff(refs[..., :2], axis=1) * np.stack([np.cos(heading), np.sin(heading)], axis=-1)).sum(axis=-1)
    to_profile = np.concatenate([np.ones((40, 1)), DT * np.tri(40, 39, -1)], axis=1)
    design = DT * to_profile
    penalty = -np.eye(38, 40, 1)
    penalty[-1, -1] = 1.0
    fit = np.linalg.pinv(design.T @ design + 1e-4 * penalty.T @ penalty) @ design.T
    speed = along @ fit.T @ to_profile.T
    design_B = speed[..., None] * design
    turns = np.diff(np.unwrap(refs[..., 2]), axis=1)
    cost = np.diag([1e-10] + [1e-2] * 39)
    normal = design_B.transpose(0, 2, 1) @ design_B + cost
    rates = np.linalg.solve(normal, design_B.transpose(0, 2, 1) @ turns[..., None])[..., 0]
    return speed, rates @ to_profile.T


def simulate_numpy(ego_init: NDArray[np.float64], refs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Tracker and bicycle, vectorised over plans."""
    speed, curvature = fit_profiles(refs)
    states = np.zeros((len(refs), 41, 11))
    states[:, 0] = ego_init
    for i in range(40):
        s = states[:, i]
        target = speed[:, min(i + 10, 39)]
        stop = (target <= 0.2) & (s[:, 3] <= 0.2)
        accel = np.where(stop, 0.5, 10.0 / 11.0) * (target - s[:, 3])
        A, B, g = np.tile(np.eye(3), (len(s), 1, 1)), np.zeros((len(s), 3)), np.zeros((len(s), 3))
        for k in range(10):
            step = np.tile(np.eye(3), (len(s), 1, 1))
            travel = (s[:, 3] + accel * DT * k) * DT
            step[:, 0, 1], step[:, 1, 2] = travel, travel / WHEEL_BASE_M
            A, B, g = step @ A, (step @ B[..., None])[..., 0], (step @ g[..., None])[..., 0]
            B[:, 2] += DT
            g[:, 1] -= travel * curvature[:, min(i + k, 39)]
        d, angle = s[:, :2] - refs[:, i, :2], refs[:, i, 2]
        lateral = -d[:, 0] * np.sin(angle) + d[:, 1] * np.cos(angle)
        error = np.stack([lateral, (s[:, 2] - angle + np.pi) % (2 * np.pi) - np.pi, s[:, 7]], axis=1)
        e = (A @ error[..., None])[..., 0] + g
        e[:, 1] = (e[:, 1] + np.pi) % (2 * np.pi) - np.pi
        weight = B * [1.0, 10.0, 0.0]
        rate = np.where(stop, 0.0, -(weight * e).sum(axis=1) / ((weight * B).sum(axis=1) + 1.0))
        n = states[:, i + 1]
        n[:, 0] = s[:, 0] + s[:, 3] * np.cos(s[:, 2]) * DT
        n[:, 1] = s[:, 1] + s[:, 3] * np.sin(s[:, 2]) * DT
        n[:, 2] = (s[:, 2] + s[:, 3] * np.tan(s[:, 7]) / WHEEL_BASE_M * DT + np.pi) % (2 * np.pi) - np.pi
        n[:, 5] = s[:, 5] + (accel - s[:, 5]) / 3.0
        n[:, 3] = s[:, 3] + n[:, 5] * DT
        n[:, 8] = rate * 2.0 / 3.0
        n[:, 7] = np.clip(s[:, 7] + n[:, 8] * DT, -np.pi / 3, np.pi / 3)
        n[:, 9] = n[:, 3] * np.tan(n[:, 7]) / WHEEL_BASE_M
        n[:, 10] = (n[:, 9] - s[:, 9]) / DT
    return states
