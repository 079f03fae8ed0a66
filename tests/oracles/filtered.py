"""Comfort signals of NAVSIM v2.2 with scipy's filter, written out plainly: an oracle for the kernels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.signal import savgol_filter

CENTRE_M = 1.461
BOUNDS = ((-4.05, 2.40), (-4.89, 4.89), (-8.37, 8.37), (-4.13, 4.13), (-1.93, 1.93), (-0.95, 0.95))


def filtered(signal: NDArray[np.float64], window: int, order: int, derivative: int = 0) -> NDArray[np.float64]:
    """Savitzky-Golay, 0.1 s a sample, rounded to 8 decimals."""
    return np.round(savgol_filter(signal, window, order, deriv=derivative, delta=0.1), 8)


def history_comfort(history: NDArray[np.float64], states: NDArray[np.float64]) -> list[bool]:
    """The six tests of ``[H, 3]`` heading, ax, ay followed by ``[41, 11]`` states."""
    past = np.zeros((len(history), 11))
    past[:, 2], past[:, 5], past[:, 6] = history.T
    rows = np.concatenate([past, states])
    along = rows[:, 5] + CENTRE_M * (rows[:, 9] ** 2 + rows[:, 10])
    total = np.hypot(rows[:, 5], rows[:, 6])
    heading = np.unwrap(rows[:, 2])
    signals = (
        filtered(along, 8, 2),
        filtered(rows[:, 6], 8, 2),
        filtered(filtered(total, 8, 2), 15, 2, 1),
        filtered(filtered(along, 8, 2), 15, 2, 1),
        filtered(heading, 5, 3, 2),
        filtered(heading, 5, 2, 1),
    )
    return [bool(((low < s) & (s < high)).all()) for s, (low, high) in zip(signals, BOUNDS, strict=True)]


def frame_rms(states: NDArray[np.float64], previous: NDArray[np.float64], offset: int) -> NDArray[np.float64]:
    """``[4]`` root mean squares between ``[41, 11]`` states and those of `offset` steps before, where both exist."""

    def features(rows: NDArray[np.float64]) -> NDArray[np.float64]:
        acceleration = filtered(np.hypot(rows[:, 5], rows[:, 6]), 8, 2)
        heading = np.unwrap(rows[:, 2])
        jerk = filtered(acceleration, 15, 2, 1)
        return np.stack([acceleration, jerk, filtered(heading, 5, 2, 1), filtered(heading, 5, 2, 2)])

    difference = features(states[:-offset]) - features(previous[offset:])
    return np.asarray(np.sqrt((difference**2).mean(axis=1)))
