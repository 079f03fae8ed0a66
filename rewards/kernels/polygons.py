"""Which map polygons contain a point, exactly, through a grid of cells and slabs of edges.

A cell lists the polygons that reach into it: those that cover it whole are answered without looking at an edge, for the
others only the edges in the point's horizontal slab are crossed (even-odd rule). The index never changes an answer.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from rewards.kernels.boxes import segment_touches_box

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
_SLAB_M = 1.0


class PolygonIndex(NamedTuple):
    """P polygons ready for point queries, in the frame of the vertices they were built from (metres)."""

    flags: NDArray[np.uint8]
    """``[P]`` what a polygon is (`LANE`, `DRIVABLE`, …)."""
    edges: NDArray[np.float64]
    """``[E, 4]`` ax, ay, bx, by, ordered by slab; an edge stands in every slab it reaches."""
    slab_edges: NDArray[np.int64]
    """``[slabs + 1]`` edges of slab i are ``slab_edges[i]:slab_edges[i + 1]``."""
    first_slab: NDArray[np.int64]
    """``[P + 1]`` slabs of polygon p."""
    bounds: NDArray[np.float64]
    """``[P, 4]`` x min, y min, x max, y max; an empty box for fewer than three vertices."""
    cell_items: NDArray[np.int64]
    """Per cell, ``2 p`` for a polygon that crosses the cell and ``2 p + 1`` for one that covers it."""
    cell_first: NDArray[np.int64]
    """``[cells + 1]`` items of cell c are ``cell_items[cell_first[c]:cell_first[c + 1]]``."""
    origin: NDArray[np.float64]
    """``[2]`` lower left corner of the grid."""
    shape: NDArray[np.int64]
    """``[2]`` cells in x and in y."""
    depth: int
    """Most polygons in any cell: no point lies in more."""


@njit(cache=True, nogil=True)
def _bounds(xy: NDArray[np.float64], offsets: NDArray[np.int64]) -> NDArray[np.float64]:
    bounds = np.empty((len(offsets) - 1, 4))
    for p in range(len(bounds)):
        bounds[p, :2] = np.inf
        bounds[p, 2:] = -np.inf
        if offsets[p + 1] - offsets[p] < 3:
            continue
        for v in range(offsets[p], offsets[p + 1]):
            for d in range(2):
                bounds[p, d] = min(bounds[p, d], xy[v, d])
                bounds[p, 2 + d] = max(bounds[p, 2 + d], xy[v, d])
    return bounds


@njit(cache=True, nogil=True)
def _slab(y: float, y_min: float, slabs: int) -> int:
    return min(max(int((y - y_min) / _SLAB_M), 0), slabs - 1)


@njit(cache=True, nogil=True)
def _build_slabs(
    xy: NDArray[np.float64], offsets: NDArray[np.int64], bounds: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    polygons = len(bounds)
    first_slab = np.zeros(polygons + 1, dtype=np.int64)
    for p in range(polygons):
        height = bounds[p, 3] - bounds[p, 1]
        first_slab[p + 1] = first_slab[p] + (int(height / _SLAB_M) + 1 if height >= 0.0 else 0)
    slab_edges = np.zeros(first_slab[-1] + 1, dtype=np.int64)
    edges = np.empty((0, 4))
    filled = slab_edges
    for fill in range(2):
        if fill:
            for i in range(first_slab[-1]):
                slab_edges[i + 1] += slab_edges[i]
            edges = np.empty((slab_edges[-1], 4))
            filled = slab_edges.copy()
        for p in range(polygons):
            slabs = first_slab[p + 1] - first_slab[p]
            if slabs == 0:
                continue
            previous = offsets[p + 1] - 1
            for v in range(offsets[p], offsets[p + 1]):
                low, high = min(xy[previous, 1], xy[v, 1]), max(xy[previous, 1], xy[v, 1])
                for i in range(_slab(low, bounds[p, 1], slabs), _slab(high, bounds[p, 1], slabs) + 1):
                    slab = first_slab[p] + i
                    if fill:
                        edges[filled[slab], :2] = xy[previous]
                        edges[filled[slab], 2:] = xy[v]
                        filled[slab] += 1
                    else:
                        slab_edges[slab + 1] += 1
                previous = v
    return edges, slab_edges, first_slab


@njit(cache=True, nogil=True)
def _inside(
    x: float,
    y: float,
    p: int,
    bounds: NDArray[np.float64],
    edges: NDArray[np.float64],
    slab_edges: NDArray[np.int64],
    first_slab: NDArray[np.int64],
) -> bool:
    """Even-odd containment in polygon p; a point on the boundary is outside."""
    if not (bounds[p, 0] < x < bounds[p, 2] and bounds[p, 1] < y < bounds[p, 3]):
        return False
    slab = first_slab[p] + _slab(y, bounds[p, 1], first_slab[p + 1] - first_slab[p])
    odd = False
    for e in range(slab_edges[slab], slab_edges[slab + 1]):
        ax, ay, bx, by = edges[e, 0], edges[e, 1], edges[e, 2], edges[e, 3]
        if (ay > y) != (by > y):
            side = (bx - ax) * (y - ay) - (by - ay) * (x - ax)
            if side == 0.0:
                return False
            if (side > 0.0) == (by > ay):
                odd = not odd
        elif ay == y and ((x == ax) or (by == y and min(ax, bx) <= x <= max(ax, bx))):
            return False
    return odd


@njit(cache=True, nogil=True)
def _cell_range(low: float, high: float, origin: float, cells: int) -> tuple[int, int]:
    """First and last cell that the interval reaches, one cell wider where it ends close to a cell's border."""
    margin = 1e-6
    first = int((low - origin - margin) / _CELL_M)
    last = int((high - origin + margin) / _CELL_M)
    return min(max(first, 0), cells - 1), min(max(last, 0), cells - 1)


@njit(cache=True, nogil=True)
def _mark_edge_cells(
    ax: float,
    ay: float,
    bx: float,
    by: float,
    origin: NDArray[np.float64],
    shape: NDArray[np.int64],
    stamp: NDArray[np.int64],
    mark: int,
) -> None:
    """Write `mark` into every cell the edge a-b comes within 1e-6 m of."""
    half = 0.5 * _CELL_M + 1e-6
    c0, c1 = _cell_range(min(ax, bx), max(ax, bx), origin[0], shape[0])
    r0, r1 = _cell_range(min(ay, by), max(ay, by), origin[1], shape[1])
    reach = half * (abs(bx - ax) + abs(by - ay))
    for c in range(c0, c1 + 1):
        x = origin[0] + (c + 0.5) * _CELL_M
        for r in range(r0, r1 + 1):
            y = origin[1] + (r + 0.5) * _CELL_M
            if abs((bx - ax) * (y - ay) - (by - ay) * (x - ax)) <= reach:
                stamp[c * shape[1] + r] = mark


@njit(cache=True, nogil=True)
def _build_cells(
    xy: NDArray[np.float64],
    offsets: NDArray[np.int64],
    bounds: NDArray[np.float64],
    edges: NDArray[np.float64],
    slab_edges: NDArray[np.int64],
    first_slab: NDArray[np.int64],
    origin: NDArray[np.float64],
    shape: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    cells = shape[0] * shape[1]
    stamp = np.full(cells, -1, dtype=np.int64)
    first = np.zeros(cells + 1, dtype=np.int64)
    found_cell = [0 for _ in range(0)]
    found_item = [0 for _ in range(0)]
    for p in range(len(bounds)):
        if first_slab[p + 1] == first_slab[p]:
            continue
        previous = offsets[p + 1] - 1
        for v in range(offsets[p], offsets[p + 1]):
            _mark_edge_cells(xy[previous, 0], xy[previous, 1], xy[v, 0], xy[v, 1], origin, shape, stamp, p)
            previous = v
        c0, c1 = _cell_range(bounds[p, 0], bounds[p, 2], origin[0], shape[0])
        r0, r1 = _cell_range(bounds[p, 1], bounds[p, 3], origin[1], shape[1])
        for c in range(c0, c1 + 1):
            for r in range(r0, r1 + 1):
                cell = c * shape[1] + r
                crossed = stamp[cell] == p
                x, y = origin[0] + (c + 0.5) * _CELL_M, origin[1] + (r + 0.5) * _CELL_M
                if crossed or _inside(x, y, p, bounds, edges, slab_edges, first_slab):
                    found_cell.append(cell)
                    found_item.append(2 * p + (0 if crossed else 1))
                    first[cell + 1] += 1
    for cell in range(cells):
        first[cell + 1] += first[cell]
    items = np.empty(len(found_cell), dtype=np.int64)
    filled = first.copy()
    for i in range(len(found_cell)):
        items[filled[found_cell[i]]] = found_item[i]
        filled[found_cell[i]] += 1
    return items, first


def build_polygon_index(xy: NDArray[np.float64], offsets: NDArray[np.int64], flags: NDArray[np.uint8]) -> PolygonIndex:
    """Index of polygons given as flat vertices ``[V, 2]``, offsets ``[P + 1]`` and flags ``[P]``.

    Polygons with fewer than three vertices contain nothing.
    """
    bounds = _bounds(xy, offsets)
    edges, slab_edges, first_slab = _build_slabs(xy, offsets, bounds)
    real = bounds[bounds[:, 0] <= bounds[:, 2]]
    low = real[:, :2].min(axis=0) if len(real) else np.zeros(2)
    high = real[:, 2:].max(axis=0) if len(real) else np.zeros(2)
    shape = ((high - low) / _CELL_M).astype(np.int64) + 1
    items, first = _build_cells(xy, offsets, bounds, edges, slab_edges, first_slab, low, shape)
    depth = int(np.diff(first).max())
    return PolygonIndex(flags, edges, slab_edges, first_slab, bounds, items, first, low, shape, depth)


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
    bounds, edges, slab_edges, first_slab = index.bounds, index.edges, index.slab_edges, index.first_slab
    items, first = index.cell_items, index.cell_first
    x0, y0, columns, rows = index.origin[0], index.origin[1], index.shape[0], index.shape[1]
    for m in range(len(points)):
        count[m] = 0
        x, y = points[m, 0], points[m, 1]
        column, row = (x - x0) / _CELL_M, (y - y0) / _CELL_M
        if not (0.0 <= column < columns and 0.0 <= row < rows):
            continue
        cell = int(column) * rows + int(row)
        for i in range(first[cell], first[cell + 1]):
            p = items[i] >> 1
            if items[i] & 1 or _inside(x, y, p, bounds, edges, slab_edges, first_slab):
                found[m, count[m]] = p
                count[m] += 1


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
