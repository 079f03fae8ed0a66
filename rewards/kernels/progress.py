"""Arclength and distance of points relative to a polyline: by a plain loop, and by looking only where it matters."""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

__all__ = ["arclengths", "near_segment", "nearest", "project", "segment_groups"]

_GROUP = 16
_MARGIN_M = 1e-6


def arclengths(xy: NDArray[np.float64]) -> NDArray[np.float64]:
    """``[C]`` cumulative length (m) at the vertices of a polyline ``[C, 2]``."""
    return np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(xy, axis=0).T))])


@njit(cache=True, nogil=True)
def _to_segment(xy: NDArray[np.float64], i: int, x: float, y: float) -> tuple[float, float]:
    """Squared distance (m^2) of a point from segment i, and the share of the segment up to the nearest point."""
    ux, uy = xy[i + 1, 0] - xy[i, 0], xy[i + 1, 1] - xy[i, 1]
    dx, dy = x - xy[i, 0], y - xy[i, 1]
    squared = ux * ux + uy * uy
    share = min(max((dx * ux + dy * uy) / squared, 0.0), 1.0) if squared > 0.0 else 0.0
    ex, ey = dx - share * ux, dy - share * uy
    return ex * ex + ey * ey, share


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
        distance, share = _to_segment(xy, i, x, y)
        if distance < best:
            best = distance
            along = length[i] + share * (length[i + 1] - length[i])
    return along, math.sqrt(best)


@njit(cache=True, nogil=True)
def segment_groups(xy: NDArray[np.float64]) -> NDArray[np.float64]:
    """Boxes ``[G, 4]`` (x min, y min, x max, y max) around every 16 consecutive segments, grown beyond rounding."""
    segments = len(xy) - 1
    boxes = np.empty(((segments + _GROUP - 1) // _GROUP, 4))
    for g in range(len(boxes)):
        box = boxes[g]
        box[:2], box[2:] = np.inf, -np.inf
        for v in range(g * _GROUP, min((g + 1) * _GROUP, segments) + 1):
            for d in range(2):
                box[d], box[2 + d] = min(box[d], xy[v, d] - _MARGIN_M), max(box[2 + d], xy[v, d] + _MARGIN_M)
    return boxes


@njit(cache=True, nogil=True)
def _to_group(groups: NDArray[np.float64], g: int, x: float, y: float) -> float:
    """Squared distance (m^2) of a point from a group's box: no segment in it is nearer."""
    dx = max(groups[g, 0] - x, 0.0, x - groups[g, 2])
    dy = max(groups[g, 1] - y, 0.0, y - groups[g, 3])
    squared: float = dx * dx + dy * dy
    return squared


@njit(cache=True, nogil=True)
def nearest(
    xy: NDArray[np.float64], length: NDArray[np.float64], groups: NDArray[np.float64], x: float, y: float
) -> tuple[float, float]:
    """The same as :func:`project`, without the groups of segments that are too far away.

    Args:
        xy: ``[C, 2]`` vertices.
        length: ``[C]`` their arclength.
        groups: Of :func:`segment_groups`.
        x: Point.
        y: Point.
    """
    closest, bound = np.inf, np.inf
    for g in range(len(groups)):
        distance = _to_group(groups, g, x, y)
        if distance < closest:
            closest = distance
            bound = _to_segment(xy, g * _GROUP, x, y)[0]
    best, along = np.inf, 0.0
    for g in range(len(groups)):
        if _to_group(groups, g, x, y) > bound:
            continue
        for i in range(g * _GROUP, min((g + 1) * _GROUP, len(xy) - 1)):
            distance, share = _to_segment(xy, i, x, y)
            if distance < best:
                best = distance
                along = length[i] + share * (length[i + 1] - length[i])
        bound = min(bound, best)
    return along, math.sqrt(best)


@njit(cache=True, nogil=True)
def near_segment(
    xy: NDArray[np.float64], groups: NDArray[np.float64], x: float, y: float, limit_m: float, hint: int
) -> int:
    """A segment within `limit_m` of a point, or -1: whether :func:`project`'s distance is at most `limit_m`.

    Args:
        xy: ``[C, 2]`` vertices.
        groups: Of :func:`segment_groups`.
        x: Point.
        y: Point.
        limit_m: Distance that still counts.
        hint: The segment to try first, or -1.
    """
    if hint >= 0 and math.sqrt(_to_segment(xy, hint, x, y)[0]) <= limit_m:
        return hint
    for g in range(len(groups)):
        if _to_group(groups, g, x, y) > limit_m * limit_m:
            continue
        for i in range(g * _GROUP, min((g + 1) * _GROUP, len(xy) - 1)):
            if math.sqrt(_to_segment(xy, i, x, y)[0]) <= limit_m:
                return i
    return -1
