"""The order in which NAVSIM's spatial index lists shapes: it decides whom a proposal follows when it overlaps several.

NAVSIM takes the nearest shape, the first listed on a tie, and its candidates come out of a sort-tile-recursive tree
(Leutenegger, Lopez, Edgington: "STR: a simple and efficient algorithm for R-tree packing", 1997; GEOS `STRtree`, nodes
of ten). A walk through the tree lists any subset in the order of the whole, so the order of all shapes suffices.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

__all__ = ["index_order"]

_NODE_CAPACITY = 10


@njit(cache=True, nogil=True)
def _bounds(vertices: NDArray[np.float64], offsets: NDArray[np.int64], heading: float) -> NDArray[np.float64]:
    """Upright bounds ``[N, 4]`` (x min, y min, x max, y max) of polygons turned by `heading`."""
    cos, sin = math.cos(heading), math.sin(heading)
    bounds = np.empty((len(offsets) - 1, 4))
    for n in range(len(bounds)):
        bounds[n] = np.inf, np.inf, -np.inf, -np.inf
        for v in range(offsets[n], offsets[n + 1]):
            x = cos * vertices[v, 0] - sin * vertices[v, 1]
            y = sin * vertices[v, 0] + cos * vertices[v, 1]
            bounds[n, 0], bounds[n, 1] = min(bounds[n, 0], x), min(bounds[n, 1], y)
            bounds[n, 2], bounds[n, 3] = max(bounds[n, 2], x), max(bounds[n, 3], y)
    return bounds


@njit(cache=True, nogil=True)
def _tile(bounds: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Order of nodes by vertical slices, bottom to top in each, and where each parent of up to ten begins and ends."""
    count = len(bounds)
    slices = math.ceil(math.sqrt(math.ceil(count / _NODE_CAPACITY)))
    capacity = math.ceil(count / slices)
    order = np.argsort(bounds[:, 0] + bounds[:, 2], kind="mergesort")
    ends = np.zeros(count + 1, dtype=np.int64)
    parents = 0
    for start in range(0, count, capacity):
        part = order[start : start + capacity].copy()
        middle = bounds[part, 1] + bounds[part, 3]
        order[start : start + capacity] = part[np.argsort(middle, kind="mergesort")]
        for first in range(start, start + len(part), _NODE_CAPACITY):
            parents += 1
            ends[parents] = min(first + _NODE_CAPACITY, start + len(part))
    return order, ends[: parents + 1]


@njit(cache=True, nogil=True)
def index_order(vertices: NDArray[np.float64], offsets: NDArray[np.int64], heading: float) -> NDArray[np.int64]:
    """Rows of all shapes in the order the index lists them.

    Args:
        vertices: ``[V, 2]`` vertices of all shapes (m).
        offsets: ``[N + 1]`` shape n is ``vertices[offsets[n]:offsets[n + 1]]``.
        heading: World heading of the frame of the vertices (rad): the index sorts along the axes of the world.

    Returns:
        ``[N]`` a permutation.
    """
    bounds = _bounds(vertices, offsets, heading)
    listed = np.arange(len(bounds))
    spans = np.arange(len(bounds) + 1)
    while len(bounds) > 1:
        order, ends = _tile(bounds)
        parents = np.empty((len(ends) - 1, 4))
        merged = np.empty_like(listed)
        merged_spans = np.zeros(len(ends), dtype=np.int64)
        filled = 0
        for p in range(len(parents)):
            nodes = order[ends[p] : ends[p + 1]]
            parents[p, 0], parents[p, 1] = bounds[nodes, 0].min(), bounds[nodes, 1].min()
            parents[p, 2], parents[p, 3] = bounds[nodes, 2].max(), bounds[nodes, 3].max()
            for node in nodes:
                size = spans[node + 1] - spans[node]
                merged[filled : filled + size] = listed[spans[node] : spans[node + 1]]
                filled += size
            merged_spans[p + 1] = filled
        bounds, listed, spans = parents, merged, merged_spans
    return listed
