"""Arclength and distance of points relative to a polyline."""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

__all__ = ["arclengths", "project"]


def arclengths(xy: NDArray[np.float64]) -> NDArray[np.float64]:
    """``[C]`` cumulative length (m) at the vertices of a polyline ``[C, 2]``."""
    return np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(xy, axis=0).T))])


@njit(cache=True, nogil=True)
def project(xy: NDArray[np.float64], length: NDArray[np.float64], x: float, y: float) -> tuple[float, float]:
    """Arclength (m) of the polyline's nearest point, and its distance (m); on a tie the first segment wins.

    Args:
        xy: ``[C, 2]`` vertices.
        length: ``[C]`` their arclength.
        x: Point.
        y: Point.

    Returns:
        Arclength in [0, L] and distance; what shapely's `line_locate_point` and `distance` give.
    """
    best, along = np.inf, 0.0
    for i in range(len(xy) - 1):
        ux, uy = xy[i + 1, 0] - xy[i, 0], xy[i + 1, 1] - xy[i, 1]
        dx, dy = x - xy[i, 0], y - xy[i, 1]
        squared = ux * ux + uy * uy
        share = min(max((dx * ux + dy * uy) / squared, 0.0), 1.0) if squared > 0.0 else 0.0
        ex, ey = dx - share * ux, dy - share * uy
        distance = ex * ex + ey * ey
        if distance < best:
            best = distance
            along = length[i] + share * (length[i + 1] - length[i])
    return along, math.sqrt(best)
