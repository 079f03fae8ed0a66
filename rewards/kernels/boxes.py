"""Oriented boxes: the ego's fixed size, and whether two boxes touch."""

from __future__ import annotations

from numba import njit

__all__ = [
    "EGO_HALF_LENGTH_M",
    "EGO_HALF_WIDTH_M",
    "REAR_AXLE_TO_CENTER_M",
    "boxes_touch",
    "segment_touches_box",
]

EGO_HALF_LENGTH_M = 2.588
"""Half the length of NAVSIM's ego (Pacifica)."""
EGO_HALF_WIDTH_M = 1.1485
"""Half its width."""
REAR_AXLE_TO_CENTER_M = 1.461
"""From the rear axle forward to the box centre."""


@njit(cache=True, nogil=True)
def boxes_touch(
    x1: float,
    y1: float,
    cos1: float,
    sin1: float,
    half_length1: float,
    half_width1: float,
    x2: float,
    y2: float,
    cos2: float,
    sin2: float,
    half_length2: float,
    half_width2: float,
) -> bool:
    """Whether two boxes (centre, direction, half sizes; metres) share a point; touching counts.

    Separating axes: the boxes are apart iff their projections are apart on one of the four side directions. A half size
    of zero makes a box a segment or a point.
    """
    dx, dy = x2 - x1, y2 - y1
    cos = abs(cos1 * cos2 + sin1 * sin2)
    sin = abs(cos1 * sin2 - sin1 * cos2)
    if abs(dx * cos1 + dy * sin1) > half_length1 + half_length2 * cos + half_width2 * sin:
        return False
    if abs(dy * cos1 - dx * sin1) > half_width1 + half_length2 * sin + half_width2 * cos:
        return False
    if abs(dx * cos2 + dy * sin2) > half_length2 + half_length1 * cos + half_width1 * sin:
        return False
    return abs(dy * cos2 - dx * sin2) <= half_width2 + half_length1 * sin + half_width1 * cos


@njit(cache=True, nogil=True)
def segment_touches_box(
    ax: float,
    ay: float,
    bx: float,
    by: float,
    x: float,
    y: float,
    cos: float,
    sin: float,
    half_length: float,
    half_width: float,
) -> bool:
    """Whether the segment a-b shares a point with a box; touching counts."""
    mx, my = 0.5 * (ax + bx) - x, 0.5 * (ay + by) - y
    hx, hy = 0.5 * (bx - ax), 0.5 * (by - ay)
    along, across = mx * cos + my * sin, my * cos - mx * sin
    half_along, half_across = abs(hx * cos + hy * sin), abs(hy * cos - hx * sin)
    if abs(along) > half_length + half_along or abs(across) > half_width + half_across:
        return False
    # The segment's own normal, in the box's frame.
    nx, ny = hx * cos + hy * sin, hy * cos - hx * sin
    return abs(nx * across - ny * along) <= abs(nx) * half_width + abs(ny) * half_length
