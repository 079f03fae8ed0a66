"""What can be seen of the map in a metric cache, which has polygons and one centreline but no lane lines.

An approximation, and meant as one. The route's centreline stands for the lanes on the route, cut where it enters and
leaves connectors and red lights; the outline of all drivable polygons together stands for the road's edges. Neighbour
lanes, crosswalks and speed limits are not seen.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from rlhf_drive.scenes.importers.navsim_cache import NavsimCache
from rlhf_drive.scenes.model import Command, MapElement, MapLayer

__all__ = ["MapView", "empty_map_view", "in_ring", "map_view"]

Array = NDArray[np.float64]

SPACING_M = 2.5
MAP_RADIUS_M = 80.0
ROUTE_M = 100.0
COMMAND_M = 40.0
TURN_RAD = np.deg2rad(20.0)
_BESIDE_M = 0.3
"""How far to either side of an outline one looks for road."""
_DRIVABLE = (MapLayer.ROADBLOCK, MapLayer.INTERSECTION, MapLayer.DRIVABLE_AREA, MapLayer.CARPARK_AREA)


@dataclass(frozen=True)
class MapView:
    """The map part of an observation, t=0 ego frame."""

    lines: tuple[Array, ...]
    """``[M]`` polylines ``[n, 2]``."""
    kind: NDArray[np.int8]
    """``[M]`` :class:`MapElement`."""
    on_route: NDArray[np.bool_]
    """``[M]``."""
    red: NDArray[np.bool_]
    """``[M]``."""
    route: Array
    """``[R, 2]`` the centreline from the ego on."""
    command: Command
    """The turn that the centreline takes over 40 m."""


def empty_map_view() -> MapView:
    """Nothing seen, straight on: for logs without a metric cache."""
    nothing = np.zeros(0)
    return MapView(
        (), nothing.astype(np.int8), nothing.astype(bool), nothing.astype(bool), np.zeros((0, 2)), Command.STRAIGHT
    )


def map_view(cache: NavsimCache, red: Collection[str] = ()) -> MapView:
    """What is seen of the map of a cache.

    Args:
        cache: The cache.
        red: Ids of further lane connectors that are red now, as a log gives them; v1.1 caches know of none.
    """
    reference = cache.reference
    origin = reference.ego_init[:3]
    rings = np.split(_to_ego(reference.map_xy, origin), reference.map_offsets[1:-1])
    layer, on_route = reference.map_layer, reference.map_on_route
    center, heading = _to_ego(reference.centerline[:, :2], origin), reference.centerline[:, 2]
    red_now = {token for token, on in zip(cache.red_tokens, reference.red_active[:, 0], strict=True) if on} | set(red)
    connector = (layer == MapLayer.LANE_CONNECTOR) & on_route
    lanes = [rings[p] for p in np.flatnonzero((layer == MapLayer.LANE) & on_route)]
    connectors = [rings[p] for p in np.flatnonzero(connector)]
    stops = [rings[p] for p in np.flatnonzero(connector) if cache.map_tokens[p] in red_now]
    pieces = _route_pieces(center, lanes, connectors, stops)
    edges = _road_edges([rings[p] for p in np.flatnonzero(np.isin(layer, _DRIVABLE))])
    route, command = _ahead(center, heading)
    kinds = [MapElement.LANE_CONNECTOR_CENTER if crossing else MapElement.LANE_CENTER for _, crossing, _ in pieces]
    count = len(pieces) + len(edges)
    return MapView(
        lines=(*(line for line, _, _ in pieces), *edges),
        kind=np.array([*kinds, *[MapElement.ROAD_EDGE] * len(edges)], dtype=np.int8),
        on_route=np.arange(count) < len(pieces),
        red=np.array([*(stop for _, _, stop in pieces), *[False] * len(edges)], dtype=np.bool_),
        route=route,
        command=command,
    )


def in_ring(points: Array, ring: Array) -> NDArray[np.bool_]:
    """``[n]`` whether points ``[n, 2]`` lie in a ring ``[v, 2]``, by the even-odd rule."""
    x, y = points[:, :1], points[:, 1:]
    a, b = ring, np.roll(ring, -1, axis=0)
    crosses = (a[:, 1] > y) != (b[:, 1] > y)
    rise = np.where(b[:, 1] == a[:, 1], 1.0, b[:, 1] - a[:, 1])
    return np.asarray((crosses & (x < a[:, 0] + (y - a[:, 1]) / rise * (b[:, 0] - a[:, 0]))).sum(axis=1) % 2 == 1)


def _in_any(points: Array, rings: Sequence[Array]) -> NDArray[np.bool_]:
    """``[n]`` whether points lie in one of the rings; boxes around the rings spare most of the work."""
    found = np.zeros(len(points), dtype=np.bool_)
    for ring in rings:
        if len(ring) < 3:
            continue
        near = ~found & (points >= ring.min(axis=0)).all(axis=1) & (points <= ring.max(axis=0)).all(axis=1)
        if near.any():
            found[near] = in_ring(points[near], ring)
    return found


def _to_ego(points: Array, origin: Array) -> Array:
    cos, sin = np.cos(origin[2]), np.sin(origin[2])
    dx, dy = points[:, 0] - origin[0], points[:, 1] - origin[1]
    return np.stack([cos * dx + sin * dy, cos * dy - sin * dx], axis=1)


def _arc(line: Array) -> Array:
    step = np.diff(line, axis=0)
    return np.concatenate([[0.0], np.cumsum(np.hypot(step[:, 0], step[:, 1]))])


def _dense(line: Array) -> Array:
    """The polyline with all its points, and further ones so that none is more than 2.5 m from the next."""
    arc = _arc(line)
    extra = np.arange(SPACING_M, arc[-1], SPACING_M)
    at = np.unique(np.concatenate([arc, extra]))
    return np.stack([np.interp(at, arc, line[:, 0]), np.interp(at, arc, line[:, 1])], axis=1)


def _runs(mark: NDArray[np.int64]) -> list[slice]:
    """Stretches of equal marks."""
    cuts = np.flatnonzero(np.diff(mark)) + 1
    bounds = [0, *cuts.tolist(), len(mark)]
    return [slice(a, b) for a, b in pairwise(bounds)]


def _route_pieces(
    center: Array, lanes: list[Array], connectors: list[Array], stops: list[Array]
) -> list[tuple[Array, bool, bool]]:
    """Stretches of the centreline within 80 m: points, whether on a connector, whether red.

    Every stretch goes on to where the next one begins.
    """
    line = _dense(center)
    crossing = _in_any(line, connectors) & ~_in_any(line, lanes)
    stop = _in_any(line, stops)
    seen = np.hypot(line[:, 0], line[:, 1]) <= MAP_RADIUS_M
    found = []
    for run in _runs(4 * seen + 2 * stop + crossing):
        if seen[run.start]:
            end = run.stop + 1 if run.stop < len(line) and seen[run.stop] else run.stop
            if end - run.start >= 2:
                found.append((line[run.start : end], bool(crossing[run.start]), bool(stop[run.start])))
    return found


def _road_edges(rings: list[Array]) -> list[Array]:
    """Stretches of the outlines within 80 m that have road on one side only."""
    near = [ring for ring in rings if len(ring) >= 3 and _distance_to_box(ring) <= MAP_RADIUS_M]
    lines = [_dense(np.concatenate([ring, ring[:1]])) for ring in near]
    if not lines:
        return []
    ends = [(line[:-1], line[1:]) for line in lines]
    start, stop = (np.concatenate([pair[i] for pair in ends]) for i in (0, 1))
    step, middle = stop - start, (start + stop) / 2.0
    length = np.maximum(np.hypot(step[:, 0], step[:, 1]), 1e-9)
    left = np.stack([-step[:, 1], step[:, 0]], axis=1) * (_BESIDE_M / length)[:, None]
    edge = np.hypot(middle[:, 0], middle[:, 1]) <= MAP_RADIUS_M
    edge[edge] = _in_any(middle[edge] + left[edge], near) != _in_any(middle[edge] - left[edge], near)
    found, first = [], 0
    for line in lines:
        mark = edge[first : first + len(line) - 1].astype(np.int64)
        first += len(line) - 1
        found += [line[run.start : run.stop + 1] for run in _runs(mark) if mark[run.start]]
    return found


def _distance_to_box(ring: Array) -> float:
    """From the ego to the box around a ring."""
    gap = np.maximum(np.maximum(ring.min(axis=0), -ring.max(axis=0)), 0.0)
    return float(np.hypot(gap[0], gap[1]))


def _ahead(center: Array, heading: Array) -> tuple[Array, Command]:
    """``[R, 2]`` the centreline from the point nearest to the ego on, 100 m of it; the turn it takes over 40 m."""
    arc = _arc(center)
    step, length = np.diff(center, axis=0), np.maximum(np.diff(arc), 1e-9)
    share = np.clip(-(center[:-1] * step).sum(axis=1) / length**2, 0.0, 1.0)
    foot = center[:-1] + share[:, None] * step
    nearest = int(np.hypot(foot[:, 0], foot[:, 1]).argmin())
    here = float(arc[nearest] + share[nearest] * length[nearest])
    at = np.arange(here, min(here + ROUTE_M, float(arc[-1])) + 1e-6, SPACING_M)
    route = np.stack([np.interp(at, arc, center[:, 0]), np.interp(at, arc, center[:, 1])], axis=1)
    bearing = np.interp([here, here + COMMAND_M], arc, np.unwrap(heading))
    turn = float(bearing[1] - bearing[0])
    return route, Command.LEFT if turn > TURN_RAD else Command.RIGHT if turn < -TURN_RAD else Command.STRAIGHT
