"""Savitzky-Golay smoothing as short stencils: a few multiplications a sample, for signals of any length."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from rewards.kernels.simulate import STEP_S

__all__ = ["Stencil", "smooth", "smoothing_matrix", "stencil"]


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


class Stencil(NamedTuple):
    """One filter of window w: weights of an interior sample, and of the w // 2 samples at either end."""

    head: NDArray[np.float64]
    """``[w // 2, w]`` weights on the first w samples, one row per sample."""
    middle: NDArray[np.float64]
    """``[w]`` weights on the samples around an interior one."""
    tail: NDArray[np.float64]
    """``[w // 2, w]`` weights on the last w samples."""


def stencil(window: int, order: int, derivative: int = 0) -> Stencil:
    """The filter that :func:`smoothing_matrix` writes out as a matrix."""
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
