"""The three lateral paths of PDM-Closed and the corridor in which it looks for leaders.

Follows NAVSIM `pdm_planner/utils/pdm_path.py` and `pdm_geometry_utils.py`. All coordinates in the frame of the
centreline that is passed in; metres and radians. C centreline points; 3 paths: centre, 1 m right, 1 m left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from rewards.kernels.boxes import EGO_HALF_WIDTH_M
from rewards.kernels.progress import arclengths

__all__ = ["PATH_OFFSETS_M", "Corridors", "Path", "build_corridors", "build_paths", "pose_at"]

PATH_OFFSETS_M = (0.0, -1.0, 1.0)
"""Lateral offset of each path, positive to the left, in the order of the proposals."""
_ARC_SEGMENTS = 16
_SHORTEST_M = 1e-5


class Path(NamedTuple):
    """One lateral path as a polyline of poses."""

    xy: NDArray[np.float64]
    """``[C, 2]`` vertices (m)."""
    arclength: NDArray[np.float64]
    """``[C]`` distance from the first vertex along the path (m)."""
    heading: NDArray[np.float64]
    """``[C]`` unwrapped heading of the vertices (rad); that of the centreline on every path."""


@dataclass(frozen=True)
class Corridors:
    """One polygon for each path, with holes where a path meets itself."""

    xy: NDArray[np.float64]
    """``[V, 2]`` vertices of all rings (m), unclosed."""
    rings: NDArray[np.int64]
    """``[R + 1]`` ring k is ``xy[rings[k]:rings[k + 1]]``."""
    first_ring: NDArray[np.int64]
    """``[4]`` path i owns the rings ``first_ring[i] … first_ring[i + 1] - 1``."""


def build_paths(centerline: NDArray[np.float64]) -> tuple[Path, ...]:
    """Parallel paths: every vertex moved by the offset across its own heading; nothing is cleaned or re-sampled.

    Args:
        centerline: ``[C, 3]`` x, y, heading.

    Returns:
        Three paths in the order of `PATH_OFFSETS_M`.
    """
    across = np.stack([np.cos(centerline[:, 2] + np.pi / 2), np.sin(centerline[:, 2] + np.pi / 2)], axis=-1)
    heading = np.unwrap(centerline[:, 2])
    lines = [np.ascontiguousarray(centerline[:, :2] + offset * across) for offset in PATH_OFFSETS_M]
    return tuple(Path(xy, arclengths(xy), heading) for xy in lines)


@njit(cache=True, nogil=True)
def pose_at(path: Path, distance: float) -> tuple[float, float, float]:
    """Pose of a path at an arclength: linear between vertices, the heading too; clipped to [1e-5 m, length]."""
    arclength = path.arclength
    distance = min(max(distance, _SHORTEST_M), arclength[-1])
    upper = min(max(int(np.searchsorted(arclength, distance)), 1), len(arclength) - 1)
    lower = upper - 1
    span = arclength[upper] - arclength[lower]
    share = (distance - arclength[lower]) / span if span > 0.0 else 0.0
    x = path.xy[lower, 0] + share * (path.xy[upper, 0] - path.xy[lower, 0])
    y = path.xy[lower, 1] + share * (path.xy[upper, 1] - path.xy[lower, 1])
    angle = path.heading[lower] + share * (path.heading[upper] - path.heading[lower])
    return x, y, np.arctan2(np.sin(angle), np.cos(angle))


def _stretch(path: Path, start: float, end: float) -> NDArray[np.float64]:
    """Vertices ``[n, 2]`` of a part of a path; n = 1 where nothing is left of it.

    With two or more vertices inside, these alone: the ends are not interpolated, so the part is up to one vertex
    spacing short at either end.
    """
    xy, arclength = path.xy, path.arclength
    start, end = (float(np.clip(value, 0.0, arclength[-1])) for value in (start, end))
    inside = (arclength >= start) & (arclength <= end)
    if inside.sum() >= 2:
        return xy[inside]
    at = np.unique([start, *arclength[inside], end])
    return np.stack([np.interp(at, arclength, xy[:, 0]), np.interp(at, arclength, xy[:, 1])], axis=-1)


def build_corridors(paths: Sequence[Path], start: NDArray[np.float64], length: float) -> Corridors:
    """The area the ego sweeps on each path: half the ego's width to both sides, square caps, round joins.

    Built by GEOS, as the official planner does, because its buffer fills shallow inner bends by up to a centimetre.

    Args:
        paths: The three paths.
        start: ``[3]`` arclength of the ego on each path (m).
        length: How far ahead a corridor reaches (m).

    Returns:
        The polygons of the three corridors.
    """
    import shapely

    lines = []
    for path, at in zip(paths, start, strict=True):
        part = _stretch(path, float(at), float(at) + length)
        lines.append(shapely.LineString(part) if len(part) > 1 else shapely.Point(part[0]))
    shapes = shapely.buffer(lines, EGO_HALF_WIDTH_M, quad_segs=_ARC_SEGMENTS, cap_style="square", join_style="round")
    rings, counts = [], [0]
    for shape in shapes:
        parts = [np.asarray(ring.coords)[:-1] for ring in (shape.exterior, *shape.interiors)]
        rings.extend(parts)
        counts.append(len(parts))
    return Corridors(
        np.concatenate(rings), np.cumsum([0, *(len(ring) for ring in rings)]), np.cumsum(np.asarray(counts))
    )
