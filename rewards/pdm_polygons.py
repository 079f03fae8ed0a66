"""Intersection and distance of simple polygons, as the planner needs them for its leader rule.

Polygons are ``[n, 2]`` vertex rows, unclosed, of either orientation. "Intersects" is closed: touching counts. A region
may consist of several rings (an exterior and holes); containment then follows the even-odd rule over all of them.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

__all__ = ["box_corners", "point_in_rings", "polygon_centroid", "polygon_distance", "polygons_intersect"]


@njit(cache=True, nogil=True)
def box_corners(x: float, y: float, heading: float, half_length: float, half_width: float) -> NDArray[np.float64]:
    """Corners ``[4, 2]`` (front left, rear left, rear right, front right) of a box given by its centre pose."""
    cos, sin = np.cos(heading), np.sin(heading)
    corners = np.empty((4, 2))
    for i, (forward, left) in enumerate(((1.0, 1.0), (-1.0, 1.0), (-1.0, -1.0), (1.0, -1.0))):
        along, across = forward * half_length, left * half_width
        corners[i, 0] = x + cos * along - sin * across
        corners[i, 1] = y + sin * along + cos * across
    return corners


@njit(cache=True, nogil=True)
def polygon_centroid(vertices: NDArray[np.float64]) -> tuple[float, float]:
    """Area centroid of a simple polygon; the mean vertex when the area is zero."""
    x0, y0 = vertices[0, 0], vertices[0, 1]
    doubled_area = x_moment = y_moment = 0.0
    for i in range(len(vertices)):
        j = i + 1 if i + 1 < len(vertices) else 0
        ax, ay, bx, by = vertices[i, 0] - x0, vertices[i, 1] - y0, vertices[j, 0] - x0, vertices[j, 1] - y0
        cross = ax * by - bx * ay
        doubled_area += cross
        x_moment += cross * (ax + bx)
        y_moment += cross * (ay + by)
    if doubled_area == 0.0:
        return vertices[:, 0].mean(), vertices[:, 1].mean()
    return x0 + x_moment / (3.0 * doubled_area), y0 + y_moment / (3.0 * doubled_area)


@njit(cache=True, nogil=True)
def point_in_rings(x: float, y: float, vertices: NDArray[np.float64], rings: NDArray[np.int64]) -> bool:
    """Even-odd test of a point against the rings ``vertices[rings[k]:rings[k + 1]]``."""
    inside = False
    for k in range(len(rings) - 1):
        j = rings[k + 1] - 1
        for i in range(rings[k], rings[k + 1]):
            xi, yi, xj, yj = vertices[i, 0], vertices[i, 1], vertices[j, 0], vertices[j, 1]
            if (yi > y) != (yj > y) and x < (xj - xi) * (y - yi) / (yj - yi) + xi:
                inside = not inside
            j = i
    return inside


@njit(cache=True, nogil=True)
def _turn(ax: float, ay: float, bx: float, by: float, cx: float, cy: float) -> float:
    """Twice the signed area of the triangle a, b, c."""
    return (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)


@njit(cache=True, nogil=True)
def _segments_touch(ax: float, ay: float, bx: float, by: float, cx: float, cy: float, dx: float, dy: float) -> bool:
    """Whether the closed segments ab and cd share a point."""
    if max(ax, bx) < min(cx, dx) or max(cx, dx) < min(ax, bx):
        return False
    if max(ay, by) < min(cy, dy) or max(cy, dy) < min(ay, by):
        return False
    if _turn(ax, ay, bx, by, cx, cy) * _turn(ax, ay, bx, by, dx, dy) > 0.0:
        return False
    return bool(_turn(cx, cy, dx, dy, ax, ay) * _turn(cx, cy, dx, dy, bx, by) <= 0.0)


@njit(cache=True, nogil=True)
def polygons_intersect(shape: NDArray[np.float64], vertices: NDArray[np.float64], rings: NDArray[np.int64]) -> bool:
    """Whether a polygon and a region of rings share a point.

    Args:
        shape: ``[n, 2]`` one polygon.
        vertices: ``[m, 2]`` holds the vertices of the region's rings.
        rings: ``[R + 1]`` offsets of the rings.

    Returns:
        True when an edge of one meets an edge of the other, or one lies inside the other.
    """
    x_low, x_high = shape[:, 0].min(), shape[:, 0].max()
    y_low, y_high = shape[:, 1].min(), shape[:, 1].max()
    for k in range(len(rings) - 1):
        ax, ay = vertices[rings[k + 1] - 1, 0], vertices[rings[k + 1] - 1, 1]
        for i in range(rings[k], rings[k + 1]):
            bx, by = vertices[i, 0], vertices[i, 1]
            if min(ax, bx) <= x_high and max(ax, bx) >= x_low and min(ay, by) <= y_high and max(ay, by) >= y_low:
                for m in range(len(shape)):
                    if _segments_touch(shape[m - 1, 0], shape[m - 1, 1], shape[m, 0], shape[m, 1], ax, ay, bx, by):
                        return True
            ax, ay = bx, by
    if point_in_rings(shape[0, 0], shape[0, 1], vertices, rings):
        return True
    inside: bool = point_in_rings(vertices[rings[0], 0], vertices[rings[0], 1], shape, np.array([0, len(shape)]))
    return inside


@njit(cache=True, nogil=True)
def _point_to_segment(px: float, py: float, ax: float, ay: float, bx: float, by: float) -> float:
    """Squared distance (m^2) of the point p to the segment ab."""
    dx, dy, ex, ey = bx - ax, by - ay, px - ax, py - ay
    squared = dx * dx + dy * dy
    along = min(max((ex * dx + ey * dy) / squared, 0.0), 1.0) if squared > 0.0 else 0.0
    ex, ey = ex - along * dx, ey - along * dy
    return ex * ex + ey * ey


@njit(cache=True, nogil=True)
def polygon_distance(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Distance (m) of two simple polygons; 0 when they intersect.

    Disjoint polygons are closest at a vertex of one of them, so vertex-to-edge distances both ways suffice.
    """
    if polygons_intersect(first, second, np.array([0, len(second)])):
        return 0.0
    best = np.inf
    for i in range(len(first)):
        px, py, qx, qy = first[i, 0], first[i, 1], first[i - 1, 0], first[i - 1, 1]
        for j in range(len(second)):
            rx, ry, sx, sy = second[j, 0], second[j, 1], second[j - 1, 0], second[j - 1, 1]
            best = min(best, _point_to_segment(px, py, rx, ry, sx, sy), _point_to_segment(rx, ry, px, py, qx, qy))
    return float(np.sqrt(best))
