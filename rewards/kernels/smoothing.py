"""Savitzky-Golay smoothing as short stencils: a few multiplications a sample, for signals of any length."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from rewards.kernels.comfort import smoothing_matrix

__all__ = ["Stencil", "smooth", "stencil"]


class Stencil(NamedTuple):
    """One filter of window w: weights of an interior sample, and of the w // 2 samples at either end."""

    head: NDArray[np.float64]
    """``[w // 2, w]`` weights on the first w samples, one row per sample."""
    middle: NDArray[np.float64]
    """``[w]`` weights on the samples around an interior one."""
    tail: NDArray[np.float64]
    """``[w // 2, w]`` weights on the last w samples."""


def stencil(window: int, order: int, derivative: int = 0) -> Stencil:
    """The filter that :func:`rewards.kernels.comfort.smoothing_matrix` writes out as a matrix."""
    half = window // 2
    matrix = smoothing_matrix(2 * window, window, order, derivative)
    start = 0 if window % 2 else 1
    return Stencil(
        head=np.ascontiguousarray(matrix[:half, :window]),
        middle=np.ascontiguousarray(matrix[half, start : start + window]),
        tail=np.ascontiguousarray(matrix[-half:, -window:]),
    )


@njit(cache=True, nogil=True)
def smooth(weights: Stencil, signal: NDArray[np.float64], out: NDArray[np.float64]) -> None:
    """Filter `signal` ``[n]`` into `out` ``[n]``, rounded to 8 decimals as NAVSIM does; n >= the window."""
    n, window = len(signal), len(weights.middle)
    half = window // 2
    late = 1 if window % 2 == 0 else 0
    for i in range(n):
        total = 0.0
        if i < half:
            for k in range(window):
                total += weights.head[i, k] * signal[k]
        elif i >= n - half:
            for k in range(window):
                total += weights.tail[i - n + half, k] * signal[n - window + k]
        else:
            start = i - half + late
            for k in range(window):
                total += weights.middle[k] * signal[start + k]
        out[i] = np.rint(total * 1e8) / 1e8
