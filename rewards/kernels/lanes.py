"""Where the ego stands on the map step by step, and what follows from it: driving direction and lane keeping."""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

from rewards.kernels.boxes import EGO_HALF_LENGTH_M, EGO_HALF_WIDTH_M
from rewards.kernels.polygons import DRIVABLE, INTERSECTION, LANE, ROUTE_LANE
from rewards.kernels.progress import near_segment

__all__ = [
    "CENTER_IN_INTERSECTION",
    "MULTIPLE_LANES",
    "NON_DRIVABLE",
    "ONCOMING",
    "REAR_AXLE_IN_INTERSECTION",
    "direction_score",
    "ego_areas",
    "ego_points",
    "keeps_lane",
]

MULTIPLE_LANES = 1
"""Area bit: two or more lanes hold a corner and none holds all four."""
NON_DRIVABLE = 2
"""Area bit: a corner lies on nothing drivable."""
ONCOMING = 4
"""Area bit: the box centre is in no lane of the route."""
CENTER_IN_INTERSECTION = 8
"""Area bit: the box centre is in an intersection."""
REAR_AXLE_IN_INTERSECTION = 16
"""Area bit: the rear axle is in an intersection."""

_LANE, _DRIVABLE, _ROUTE_LANE, _INTERSECTION = int(LANE), int(DRIVABLE), int(ROUTE_LANE), int(INTERSECTION)
_DIRECTION_WINDOW = 11
_LANE_DISTANCE_M = 0.5
_LANE_STEPS = 20


@njit(cache=True, nogil=True)
def ego_points(states: NDArray[np.float64], boxes: NDArray[np.float64], points: NDArray[np.float64]) -> None:
    """Six points per step: corners FL, RL, RR, FR of the ego box, its centre, the rear axle.

    Args:
        states: ``[K, 11]`` ego states.
        boxes: ``[K, 4]`` box centre x, y, cos, sin.
        points: ``[6 K, 2]`` filled step by step.
    """
    for k in range(len(states)):
        x, y, cos, sin = boxes[k, 0], boxes[k, 1], boxes[k, 2], boxes[k, 3]
        for corner in range(4):
            ahead = EGO_HALF_LENGTH_M if corner in (0, 3) else -EGO_HALF_LENGTH_M
            left = EGO_HALF_WIDTH_M if corner < 2 else -EGO_HALF_WIDTH_M
            points[6 * k + corner, 0] = x + ahead * cos - left * sin
            points[6 * k + corner, 1] = y + ahead * sin + left * cos
        points[6 * k + 4, 0], points[6 * k + 4, 1] = x, y
        points[6 * k + 5, 0], points[6 * k + 5, 1] = states[k, 0], states[k, 1]


@njit(cache=True, nogil=True)
def _corner_areas(
    flags: NDArray[np.uint8], found: NDArray[np.int64], count: NDArray[np.int64], m: int, corners: NDArray[np.int64]
) -> int:
    """`MULTIPLE_LANES` and `NON_DRIVABLE` from the polygons of points m … m + 3."""
    area, lanes, within_one = 0, 0, False
    for point in range(m, m + 4):
        drivable = False
        for i in range(count[point]):
            p = found[point, i]
            drivable = drivable or flags[p] & _DRIVABLE != 0
            if flags[p] & _LANE:
                lanes += 1 if corners[p] == 0 else 0
                corners[p] += 1
                within_one = within_one or corners[p] == 4
        if not drivable:
            area = NON_DRIVABLE
    for point in range(m, m + 4):
        for i in range(count[point]):
            corners[found[point, i]] = 0
    if lanes > 1 and not within_one:
        area |= MULTIPLE_LANES
    return area


@njit(cache=True, nogil=True)
def ego_areas(
    flags: NDArray[np.uint8],
    found: NDArray[np.int64],
    count: NDArray[np.int64],
    corners: NDArray[np.int64],
    areas: NDArray[np.uint8],
) -> None:
    """Area bits of every step of one plan.

    Args:
        flags: ``[P]`` what the polygons are.
        found: ``[6 K, depth]`` polygons that contain the points of :func:`ego_points`.
        count: ``[6 K]`` how many.
        corners: ``[P]`` zeros, scratch; zeros again afterwards.
        areas: ``[K]`` filled with unions of the area bits.
    """
    for k in range(len(areas)):
        area = _corner_areas(flags, found, count, 6 * k, corners)
        centre, rear = 0, 0
        for i in range(count[6 * k + 4]):
            centre |= flags[found[6 * k + 4, i]]
        for i in range(count[6 * k + 5]):
            rear |= flags[found[6 * k + 5, i]]
        if not centre & _ROUTE_LANE:
            area |= ONCOMING
        if centre & _INTERSECTION:
            area |= CENTER_IN_INTERSECTION
        if rear & _INTERSECTION:
            area |= REAR_AXLE_IN_INTERSECTION
        areas[k] = area


@njit(cache=True, nogil=True)
def direction_score(centres: NDArray[np.float64], areas: NDArray[np.uint8], ignored: int) -> float:
    """DDC {0, .5, 1}: metres driven against the route within any second (11 consecutive steps): < 2, < 6, more.

    Args:
        centres: ``[K, 2]`` box centres.
        areas: ``[K]`` area bits.
        ignored: Area bits that make a step count for nothing (0 in v1.1, `CENTER_IN_INTERSECTION` in v2).
    """
    moved = np.zeros(len(centres))
    most = 0.0
    for k in range(1, len(centres)):
        if areas[k] & ONCOMING and not areas[k] & ignored:
            moved[k] = math.hypot(centres[k, 0] - centres[k - 1, 0], centres[k, 1] - centres[k - 1, 1])
        total = 0.0
        for i in range(max(k - _DIRECTION_WINDOW + 1, 0), k + 1):
            total += moved[i]
        most = max(most, total)
    if most < 2.0:
        return 1.0
    return 0.5 if most < 6.0 else 0.0


@njit(cache=True, nogil=True)
def keeps_lane(
    centres: NDArray[np.float64], areas: NDArray[np.uint8], xy: NDArray[np.float64], groups: NDArray[np.float64]
) -> bool:
    """LK of v2: never 20 counted steps in a row more than 0.5 m from the centreline; intersections are skipped.

    Args:
        centres: ``[K, 2]`` box centres.
        areas: ``[K]`` area bits.
        xy: ``[C, 2]`` centreline.
        groups: Its :func:`rewards.kernels.progress.segment_groups`.
    """
    away, segment = 0, -1
    for k in range(len(centres)):
        if areas[k] & CENTER_IN_INTERSECTION:
            continue
        segment = near_segment(xy, groups, centres[k, 0], centres[k, 1], _LANE_DISTANCE_M, segment)
        away = away + 1 if segment < 0 else 0
        if away >= _LANE_STEPS:
            return False
    return True
