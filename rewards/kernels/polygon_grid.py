"""Builds the grid behind `rewards.kernels.polygons`: what each polygon's edges mean to the points of each cell.

A point is inside a polygon if a ray from it towards +x crosses an odd number of edges. Seen from the points of one cell
most edges are crossed always or never. What is left per cell and polygon is the parity of those that are always crossed
and the few edges that reach into the cell.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

__all__ = ["build_cells", "ring_edges"]

_MARGIN_M = 1e-6
_LEFT, _RIGHT, _REACHES_IN = 0, 1, 2


@njit(cache=True, nogil=True)
def ring_edges(
    xy: NDArray[np.float64], offsets: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64]]:
    """Edges of all polygons, and as many that drop from their ends.

    Polygons with fewer than three vertices have none.

    Returns:
        ``[2 E, 4]`` ax, ay, bx, by: E edges, polygon by polygon, then E upright ones to the right of everything, from
        the height of b down to below everything. Offsets ``[P + 1]`` of the polygons' edges. The box ``[4]`` around
        them: x min, y min, x max, y max.
    """
    edges = np.empty((2 * len(xy), 4))
    first = np.zeros(len(offsets), dtype=np.int64)
    box = np.array([np.inf, np.inf, -np.inf, -np.inf])
    total = 0
    for p in range(len(offsets) - 1):
        if offsets[p + 1] - offsets[p] >= 3:
            previous = offsets[p + 1] - 1
            for v in range(offsets[p], offsets[p + 1]):
                edges[total, :2], edges[total, 2:] = xy[previous], xy[v]
                for d in range(2):
                    box[d], box[2 + d] = min(box[d], xy[v, d]), max(box[2 + d], xy[v, d])
                previous = v
                total += 1
        first[p + 1] = total
    for e in range(total):
        edges[total + e, 0] = edges[total + e, 2] = box[2] + 1.0
        edges[total + e, 1], edges[total + e, 3] = edges[e, 3], box[1] - 1.0
    return edges[: 2 * total].copy(), first, box


@njit(cache=True, nogil=True)
def _side(ax: float, ay: float, bx: float, by: float, x0: float, y0: float, x1: float, y1: float) -> int:
    """How an edge a-b of a cell's row lies to the cell: right of it (rays may cross it), left, or reaching in."""
    if min(ax, bx) > x1:
        return _RIGHT
    side = (bx - ax) * (0.5 * (y0 + y1) - ay) - (by - ay) * (0.5 * (x0 + x1) - ax)
    reach = 0.5 * ((y1 - y0) * abs(bx - ax) + (x1 - x0) * abs(by - ay))
    if (max(ax, bx) >= x0) & (abs(side) <= reach):
        return _REACHES_IN
    return _RIGHT if (max(ax, bx) >= x0) & ((side > 0.0) == (by > ay)) else _LEFT


@njit(cache=True, nogil=True)
def _cell_range(low: float, high: float, origin: float, cell: float, cells: int) -> tuple[int, int]:
    """First and last cell that the interval reaches, one cell wider where it ends close to a cell's border."""
    first = int((low - origin - _MARGIN_M) / cell)
    last = int((high - origin + _MARGIN_M) / cell)
    return min(max(first, 0), cells - 1), min(max(last, 0), cells - 1)


@njit(cache=True, nogil=True)
def _row_edges(
    edges: NDArray[np.float64], begin: int, end: int, y0: float, y1: float, out: NDArray[np.int64]
) -> tuple[int, float, float]:
    """Edges among begin … end - 1 that reach into the row from y0 to y1, into `out`; how many, and their x range."""
    count, x0, x1 = 0, np.inf, -np.inf
    for e in range(begin, end):
        ax, ay, bx, by = edges[e, 0], edges[e, 1], edges[e, 2], edges[e, 3]
        if max(ay, by) >= y0 and min(ay, by) <= y1:
            out[count] = e
            count += 1
            x0, x1 = min(x0, ax, bx), max(x1, ax, bx)
    return count, x0, x1


@njit(cache=True, nogil=True)
def _grown(array: NDArray[np.int32], size: int) -> NDArray[np.int32]:
    if size <= len(array):
        return array
    larger = np.empty(2 * size, dtype=np.int32)
    larger[: len(array)] = array
    return larger


@njit(cache=True, nogil=True)
def _cell_edges(
    edges: NDArray[np.float64],
    row: NDArray[np.int64],
    first: int,
    last: int,
    x0: float,
    y0: float,
    x1: float,
    y1: float,
    open_ends: NDArray[np.bool_],
    kept: NDArray[np.int32],
) -> tuple[int, int]:
    """What the edges `row` of polygon edges first … last - 1 mean to one cell.

    A ray crosses an edge on the right iff exactly one of its ends lies above the ray, so a chain of such edges counts
    by its open ends alone: those above the cell always, those in its row through the edge that drops from them.

    Returns:
        The parity of what is always crossed, and how many edges were written into `kept`.
    """
    parity, count, opened = 0, 0, False
    for e in row:
        ax, ay, bx, by = edges[e, 0], edges[e, 1], edges[e, 2], edges[e, 3]
        side = _side(ax, ay, bx, by, x0, y0, x1, y1)
        if side == _REACHES_IN:
            kept[count] = e
            count += 1
        elif side == _RIGHT:
            parity ^= (ay > y1) ^ (by > y1)
            before = e - 1 if e > first else last - 1
            if y0 <= ay <= y1:
                open_ends[before] ^= True
                opened = True
            if y0 <= by <= y1:
                open_ends[e] ^= True
                opened = True
    for e in row if opened else row[:0]:
        before = e - 1 if e > first else last - 1
        for end in (before, e):
            if open_ends[end]:
                open_ends[end] = False
                kept[count] = len(edges) // 2 + end
                count += 1
    return parity, count


@njit(cache=True, nogil=True)
def _scan(
    edges: NDArray[np.float64],
    first: NDArray[np.int64],
    origin: NDArray[np.float64],
    cell: float,
    shape: NDArray[np.int64],
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """Polygon by polygon: cell, code ``2 p + parity`` and edge count of every item, and the items' edges."""
    cells, codes, counts = np.empty(4096, np.int32), np.empty(4096, np.int32), np.empty(4096, np.int32)
    kept = np.empty(8192, np.int32)
    row = np.empty(len(edges), dtype=np.int64)
    open_ends = np.zeros(len(edges), dtype=np.bool_)
    items, total = 0, 0
    for p in range(len(first) - 1):
        low, high = np.inf, -np.inf
        for e in range(first[p], first[p + 1]):
            low, high = min(low, edges[e, 1]), max(high, edges[e, 1])
        if low > high:
            continue
        r0, r1 = _cell_range(low, high, origin[1], cell, shape[1])
        for r in range(r0, r1 + 1):
            y0 = origin[1] + r * cell - _MARGIN_M
            y1 = y0 + cell + 2.0 * _MARGIN_M
            reached, left, right = _row_edges(edges, first[p], first[p + 1], y0, y1, row)
            if reached == 0:
                continue
            c0, c1 = _cell_range(left, right, origin[0], cell, shape[0])
            most = items + c1 - c0 + 1
            cells, codes, counts = _grown(cells, most), _grown(codes, most), _grown(counts, most)
            kept = _grown(kept, total + 2 * reached * (c1 - c0 + 1))
            for c in range(c0, c1 + 1):
                x0 = origin[0] + c * cell - _MARGIN_M
                x1 = x0 + cell + 2.0 * _MARGIN_M
                parity, count = _cell_edges(
                    edges, row[:reached], first[p], first[p + 1], x0, y0, x1, y1, open_ends, kept[total:]
                )
                if parity == 0 and count == 0:
                    continue
                cells[items], codes[items], counts[items] = c * shape[1] + r, 2 * p + parity, count
                items += 1
                total += count
    return cells[:items], codes[:items], counts[:items], kept[:total]


@njit(cache=True, nogil=True)
def build_cells(
    edges: NDArray[np.float64],
    first: NDArray[np.int64],
    origin: NDArray[np.float64],
    cell: float,
    shape: NDArray[np.int64],
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """The items of all cells, cell by cell.

    Args:
        edges: ``[2 E, 4]`` of :func:`ring_edges`.
        first: ``[P + 1]`` edges of polygon p are ``edges[first[p]:first[p + 1]]``.
        origin: ``[2]`` lower left corner of the grid, which holds all edges.
        cell: Side of a cell (m).
        shape: ``[2]`` cells in x and in y.

    Returns:
        First item of each cell ``[cells + 1]``, code of each item (``2 p + parity``), its first edge ``[items + 1]``,
        and the items' edges one after the other.
    """
    cells, codes, counts, kept = _scan(edges, first, origin, cell, shape)
    cell_first = np.zeros(shape[0] * shape[1] + 1, dtype=np.int32)
    for i in range(len(cells)):
        cell_first[cells[i] + 1] += 1
    for c in range(len(cell_first) - 1):
        cell_first[c + 1] += cell_first[c]
    place = np.empty(len(cells), dtype=np.int32)
    filled = cell_first.copy()
    item_code, item_first = np.empty(len(cells), np.int32), np.zeros(len(cells) + 1, np.int32)
    for i in range(len(cells)):
        place[i] = filled[cells[i]]
        filled[cells[i]] += 1
        item_code[place[i]] = codes[i]
        item_first[place[i] + 1] = counts[i]
    for i in range(len(cells)):
        item_first[i + 1] += item_first[i]
    item_edges = np.empty(len(kept), dtype=np.int32)
    source = 0
    for i in range(len(cells)):
        for n in range(counts[i]):
            item_edges[item_first[place[i]] + n] = kept[source + n]
        source += counts[i]
    return cell_first, item_code, item_first, item_edges
