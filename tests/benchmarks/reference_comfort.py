"""Comfort of both versions as products of whole signals with filter matrices, vectorised over plans."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from reference_simulation import interpolate_numpy, simulate_numpy

from rewards.kernels.boxes import REAR_AXLE_TO_CENTER_M
from rewards.kernels.comfort import COMFORT_BOUNDS, smoothing_matrix

__all__ = ["comfort_v1", "comfort_v2", "frames"]

Array = NDArray[Any]
_operator = lru_cache(smoothing_matrix)
_V1_SMOOTH, _V1_JERK = _operator(41, 41, 2), _operator(41, 41, 2, 1) @ _operator(41, 8, 2)


def _within(signals: list[Array]) -> Array:
    """Whether all signals ``[B, n]``, in the order of the tests, stay between their bounds."""
    inside = [((low < s) & (s < high)).all(axis=1) for s, (low, high) in zip(signals, COMFORT_BOUNDS, strict=True)]
    return np.all(inside, axis=0)


def comfort_v1(states: Array) -> Array:
    """C ``[B]``."""
    heading, along, across = np.unwrap(states[..., 2]), states[..., 5], states[..., 6]
    jerks = [np.hypot(along, across) @ _V1_JERK.T, along @ _V1_JERK.T]
    yaw = [heading @ _operator(41, 5, 3, 2).T, heading @ _operator(41, 5, 2, 1).T]
    signals = [along @ _V1_SMOOTH.T, across @ _V1_SMOOTH.T, *jerks, *yaw]
    return _within([np.round(s, 8) for s in signals]).astype(float)


def comfort_v2(history: Array, states: Array) -> Array:
    """HC ``[B]``."""
    past = np.broadcast_to(history, (len(states), *history.shape))
    shifted = states[..., 5] + REAR_AXLE_TO_CENTER_M * (states[..., 9] ** 2 + states[..., 10])
    heading = np.unwrap(np.concatenate([past[..., 0], states[..., 2]], axis=1))
    along, across = (np.concatenate(p, axis=1) for p in ((past[..., 1], shifted), (past[..., 2], states[..., 6])))
    total = np.concatenate([np.hypot(past[..., 1], past[..., 2]), np.hypot(states[..., 5], states[..., 6])], axis=1)
    n = heading.shape[1]
    smooth, slope = _operator(n, 8, 2).T, _operator(n, 15, 2, 1).T
    acc, lateral, magnitude = (np.round(s @ smooth, 8) for s in (along, across, total))
    yaw = [heading @ _operator(n, 5, 3, 2).T, heading @ _operator(n, 5, 2, 1).T]
    return _within([np.round(s, 8) for s in (acc, lateral, magnitude @ slope, acc @ slope, *yaw)]).astype(float)


def _features(states: Array) -> Array:
    n = states.shape[1]
    magnitude = np.round(np.hypot(states[..., 5], states[..., 6]) @ _operator(n, 8, 2).T, 8)
    heading = np.unwrap(states[..., 2])
    jerk = magnitude @ _operator(n, 15, 2, 1).T
    yaw = [heading @ _operator(n, 5, 2, d).T for d in (1, 2)]
    return np.stack([magnitude, *(np.round(s, 8) for s in (jerk, *yaw))])


def frames(ego_init: Array, states: Array, previous: Array) -> Array:
    """EC ``[B]`` of plans with those of the frame 0.5 s earlier, which start from `ego_init`."""
    before = simulate_numpy(ego_init, interpolate_numpy(ego_init, previous))
    rms = np.sqrt(((_features(states[:, :-5]) - _features(before[:, 5:])) ** 2).mean(axis=-1))
    return np.asarray((rms <= np.array([0.7, 0.5, 0.1, 0.1])[:, None]).all(axis=0).astype(float))
