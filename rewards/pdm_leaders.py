"""Whom a proposal of PDM-Closed follows: shapes in the corridor of its path, ahead of it, the nearest one.

Follows NAVSIM `pdm_planner/proposal/pdm_generator.py`. Static objects, stopped vehicles, crossing pedestrians and red
lights are treated alike. Frame: ego rear axle at t=0; metres, seconds, radians. N forecast shapes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from rewards.kernels.boxes import EGO_HALF_LENGTH_M, EGO_HALF_WIDTH_M, REAR_AXLE_TO_CENTER_M
from rewards.kernels.progress import project
from rewards.pdm_forecast import Shapes
from rewards.pdm_index_order import index_order
from rewards.pdm_paths import Path, build_corridors
from rewards.pdm_polygons import box_corners, polygon_distance, polygons_intersect

__all__ = ["CORRIDOR_S", "Surroundings", "find_surroundings", "update_leader"]

CORRIDOR_S = 5.0
"""A corridor reaches as far as the speed limit carries in this time."""


@dataclass(frozen=True)
class Surroundings:
    """What the unrolling looks up: paths, who is in a corridor, and where."""

    paths: tuple[Path, ...]
    """The three lateral paths."""
    start: NDArray[np.float64]
    """``[3]`` arclength of the ego on each path (m)."""
    shapes: Shapes
    """The forecast."""
    in_corridor: NDArray[np.bool_]
    """``[3, 26, N]`` whether a shape meets the corridor of a path at a sample and is not ignored."""
    progress: NDArray[np.float64]
    """``[3, 26, N]`` arclength of its centroid on the path (m); 0 where not in the corridor."""


@njit(cache=True, nogil=True)
def _corridor_contacts(
    path: Path,
    corridor: NDArray[np.float64],
    rings: NDArray[np.int64],
    shapes: Shapes,
    inside: NDArray[np.bool_],
    progress: NDArray[np.float64],
) -> None:
    """Write which shapes meet the corridor of one path, and their progress along it, at every sample.

    Args:
        path: The path.
        corridor: ``[V, 2]`` vertices of all corridors.
        rings: ``[R + 1]`` offsets of this path's rings.
        shapes: The forecast.
        inside: ``[26, N]`` False everywhere; written.
        progress: ``[26, N]`` 0 everywhere; written.
    """
    own = corridor[rings[0] : rings[-1]]
    x_low, x_high, y_low, y_high = own[:, 0].min(), own[:, 0].max(), own[:, 1].min(), own[:, 1].max()
    for n in range(len(shapes.speed)):
        if shapes.ignored[n]:
            continue
        for k in range(len(inside)):
            if k > 0 and shapes.speed[n] == 0.0:
                inside[k, n], progress[k, n] = inside[0, n], progress[0, n]
                continue
            polygon = shapes.vertices[k, shapes.offsets[n] : shapes.offsets[n + 1]]
            if polygon[:, 0].max() < x_low or polygon[:, 0].min() > x_high:
                continue
            if polygon[:, 1].max() < y_low or polygon[:, 1].min() > y_high:
                continue
            if polygons_intersect(polygon, corridor, rings):
                x, y = shapes.centroid[k, n]
                inside[k, n] = True
                progress[k, n] = project(path.xy, path.arclength, x, y)[0]


def find_surroundings(paths: tuple[Path, ...], shapes: Shapes, speed_limit: float) -> Surroundings:
    """Place the ego (at the origin) and the forecast shapes on the paths.

    Args:
        paths: The three paths in the t=0 ego frame.
        shapes: The forecast in the same frame.
        speed_limit: m/s.

    Returns:
        What unrolling needs.
    """
    start = np.array([project(path.xy, path.arclength, 0.0, 0.0)[0] for path in paths])
    corridors = build_corridors(paths, start, speed_limit * CORRIDOR_S)
    size = (len(paths), *shapes.centroid.shape[:2])
    inside, progress = np.zeros(size, dtype=np.bool_), np.zeros(size)
    for i, path in enumerate(paths):
        rings = corridors.rings[corridors.first_ring[i] : corridors.first_ring[i + 1] + 1]
        _corridor_contacts(path, corridors.xy, rings, shapes, inside[i], progress[i])
    return Surroundings(paths, start, shapes, inside, progress)


@njit(cache=True, nogil=True)
def _nearest(
    ego: NDArray[np.float64],
    position: float,
    shapes: Shapes,
    sample: int,
    inside: NDArray[np.bool_],
    progress: NDArray[np.float64],
) -> tuple[int, float]:
    """Row of the shape ahead of `position` nearest to the box `ego`, and its distance (m); -1 if there is none."""
    nearest, distance, tied = -1, np.inf, False
    apart = np.full(len(inside), np.inf)
    vertices, offsets = shapes.vertices[sample], shapes.offsets
    for n in range(len(inside)):
        if inside[n] and progress[n] > position:
            apart[n] = polygon_distance(ego, vertices[offsets[n] : offsets[n + 1]])
            tied = tied or apart[n] == distance
            if apart[n] < distance:
                nearest, distance, tied = n, apart[n], False
    if tied:
        for n in index_order(vertices, offsets, shapes.world_heading):
            if apart[n] == distance:
                return n, distance
    return nearest, distance


@njit(cache=True, nogil=True)
def update_leader(
    leader: NDArray[np.float64],
    pose: NDArray[np.float64],
    position: float,
    path_length: float,
    shapes: Shapes,
    sample: int,
    inside: NDArray[np.bool_],
    progress: NDArray[np.float64],
) -> None:
    """Look up the leader of one proposal; what the planner does not overwrite in `leader` stays as it was.

    Somebody ahead: arclength and speed are written (a red light keeps the speed that stood there). Nobody: the path's
    end is an obstacle, arclength and rear length are written, and again the speed stays. Of several shapes that overlap
    the ego (distance 0) the first in NAVSIM's spatial index counts.

    Args:
        leader: ``[3]`` arclength (m), speed (m/s), rear length (m); shared by the proposals of a path.
        pose: ``[3]`` pose of the proposal one step before.
        position: Its arclength (m).
        path_length: Arclength of the path's end (m).
        shapes: The forecast.
        sample: Index k of the sample.
        inside: ``[N]`` who is in the corridor at this sample.
        progress: ``[N]`` arclength of the centroids (m).
    """
    x = pose[0] + REAR_AXLE_TO_CENTER_M * np.cos(pose[2])
    y = pose[1] + REAR_AXLE_TO_CENTER_M * np.sin(pose[2])
    ego = box_corners(x, y, pose[2], EGO_HALF_LENGTH_M, EGO_HALF_WIDTH_M)
    nearest, distance = _nearest(ego, position, shapes, sample, inside, progress)
    if nearest < 0:
        leader[0], leader[2] = path_length, EGO_HALF_LENGTH_M
        return
    leader[0] = position + distance
    if not shapes.red[nearest]:
        leader[1] = shapes.speed[nearest] * np.cos(shapes.heading[nearest] - pose[2])
