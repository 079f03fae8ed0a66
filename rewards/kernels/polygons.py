"""Which map polygons contain a point, exactly, through a grid of cells.

A cell lists the polygons that reach into it, each with the edges that still matter there: a polygon that covers the
cell whole has none (:mod:`rewards.kernels.polygon_grid`). The index never changes an answer.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from rewards.kernels.boxes import segment_touches_box
from rewards.kernels.polygon_grid import build_cells, ring_edges

__all__ = [
    "DRIVABLE",
    "INTERSECTION",
    "LANE",
    "ROUTE_LANE",
    "PolygonIndex",
    "build_polygon_index",
    "locate",
    "polygon_touches_box",
]

LANE = np.uint8(1)
"""Flag: lane or lane connector."""
DRIVABLE = np.uint8(2)
"""Flag: road block, intersection, drivable area or car park."""
ROUTE_LANE = np.uint8(4)
"""Flag: lane or lane connector on the route."""
INTERSECTION = np.uint8(8)
"""Flag: intersection."""

_CELL_M = 2.0
_MOST_CELLS = 1 << 16


class PolygonIndex(NamedTuple):
    """P polygons ready for point queries, in the frame of the vertices they were built from (metres)."""

    flags: NDArray[np.uint8]
    """``[P]`` what a polygon is (`LANE`, `DRIVABLE`, …)."""
    edges: NDArray[np.float64]
    """``[2 E, 4]`` ax, ay, bx, by of :func:`rewards.kernels.polygon_grid.ring_edges`."""
    cell_first: NDArray[np.int32]
    """``[cells + 1]`` items of cell c are ``cell_first[c] … cell_first[c + 1] - 1``."""
    item_code: NDArray[np.int32]
    """``[items]`` ``2 p + parity``: polygon p, and the parity of its edges that rays from all of the cell cross."""
    item_first: NDArray[np.int32]
    """``[items + 1]`` item i looks at edges ``item_edges[item_first[i]:item_first[i + 1]]``."""
    item_edges: NDArray[np.int32]
    """Edge numbers of all items."""
    origin: NDArray[np.float64]
    """``[2]`` lower left corner of the grid."""
    shape: NDArray[np.int64]
    """``[2]`` cells in x and in y."""
    cell_m: float
    """Side of a cell: 2 m, or as much as it takes to stay within 65,536 cells."""
    depth: int
    """Most polygons in any cell: no point lies in more."""


def build_polygon_index(xy: NDArray[np.float64], offsets: NDArray[np.int64], flags: NDArray[np.uint8]) -> PolygonIndex:
    """Index of polygons given as flat vertices ``[V, 2]``, offsets ``[P + 1]`` and flags ``[P]``.

    Polygons with fewer than three vertices contain nothing.
    """
    edges, first, box = ring_edges(xy, offsets)
    low, high = (box[:2], box[2:]) if len(edges) else (np.zeros(2), np.zeros(2))
    cell = _CELL_M
    while np.prod(np.floor((high - low) / cell) + 1.0) > _MOST_CELLS:
        cell *= 2.0
    shape = ((high - low) / cell).astype(np.int64) + 1
    cell_first, item_code, item_first, item_edges = build_cells(edges, first, low, cell, shape)
    depth = int(np.diff(cell_first).max())
    return PolygonIndex(flags, edges, cell_first, item_code, item_first, item_edges, low, shape, cell, depth)


@njit(cache=True, nogil=True)
def _on_edge(x: float, y: float, ax: float, ay: float, bx: float, by: float) -> bool:
    """Whether a point on the line through a and b lies on the edge a-b."""
    if (ay > y) != (by > y):
        return True
    return ay == y and (x == ax or (by == y and min(ax, bx) <= x <= max(ax, bx)))


@njit(cache=True, nogil=True)
def _inside(
    x: float,
    y: float,
    parity: int,
    edges: NDArray[np.float64],
    item_edges: NDArray[np.int32],
    begin: int,
    end: int,
) -> bool:
    """Even-odd containment by an item's edges; a point on the boundary is outside."""
    odd = parity
    for i in range(begin, end):
        e = item_edges[i]
        ax, ay, bx, by = edges[e, 0], edges[e, 1], edges[e, 2], edges[e, 3]
        side = (bx - ax) * (y - ay) - (by - ay) * (x - ax)
        if side == 0.0 and _on_edge(x, y, ax, ay, bx, by):
            return False
        # Without branches: which edges a ray crosses is as good as random, and a wrong guess costs more than an edge.
        odd ^= ((ay > y) ^ (by > y)) & ((side > 0.0) ^ (by <= y))
    return odd != 0


@njit(cache=True, nogil=True)
def locate(
    index: PolygonIndex, points: NDArray[np.float64], found: NDArray[np.int64], count: NDArray[np.int64]
) -> None:
    """All polygons that strictly contain each of M points.

    Args:
        index: The polygons.
        points: ``[M, 2]``; a point that is not finite lies in none.
        found: ``[M, at least index.depth]``; row m receives polygon numbers.
        count: ``[M]`` receives how many of row m are filled.
    """
    edges, cell_first, item_code = index.edges, index.cell_first, index.item_code
    item_first, item_edges = index.item_first, index.item_edges
    x0, y0, columns, rows = index.origin[0], index.origin[1], index.shape[0], index.shape[1]
    scale = 1.0 / index.cell_m
    for m in range(len(points)):
        x, y = points[m, 0], points[m, 1]
        column, row = (x - x0) * scale, (y - y0) * scale
        n = 0
        if 0.0 <= column < columns and 0.0 <= row < rows:
            cell = int(column) * rows + int(row)
            for i in range(cell_first[cell], cell_first[cell + 1]):
                code = item_code[i]
                if _inside(x, y, code & 1, edges, item_edges, item_first[i], item_first[i + 1]):
                    found[m, n] = code >> 1
                    n += 1
        count[m] = n


@njit(cache=True, nogil=True)
def polygon_touches_box(
    xy: NDArray[np.float64],
    x: float,
    y: float,
    cos: float,
    sin: float,
    half_length: float,
    half_width: float,
) -> bool:
    """Whether a polygon ``[V, 2]`` (V >= 3) and a box share a point: an edge touches it, or the box lies inside."""
    odd = False
    previous = len(xy) - 1
    for v in range(len(xy)):
        ax, ay, bx, by = xy[previous, 0], xy[previous, 1], xy[v, 0], xy[v, 1]
        if segment_touches_box(ax, ay, bx, by, x, y, cos, sin, half_length, half_width):
            return True
        if (ay > y) != (by > y) and x < ax + (bx - ax) * (y - ay) / (by - ay):
            odd = not odd
        previous = v
    return odd
