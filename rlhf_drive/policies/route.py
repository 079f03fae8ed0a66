"""The route ahead as a frame of reference: arclength along it, offset from it, and driving on along it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rlhf_drive.scenes import Observation

__all__ = ["ROUTE_PIECES", "ROUTE_PIECE_POINTS", "along_route", "anchor_path", "resample", "route_points"]

ROUTE_SPACING_M = 4.0
MIN_ROUTE_M = 0.1
"""A route that spans less is a single place and has no direction."""
OFFSET_DECAY_M = 15.0
"""Along the anchor path the ego's offset from the route shrinks by 1/e over this distance."""
ROUTE_PIECES = 5
"""Route tokens; each holds `ROUTE_PIECE_POINTS` points, 4 m apart: 100 m ahead."""
ROUTE_PIECE_POINTS = 5


def resample(xy: NDArray[np.floating], distances: NDArray[np.floating]) -> NDArray[np.float64]:
    """Points of a polyline at given arclengths, continued straight beyond its end. ``[len(distances), 2]``."""
    segment = np.diff(xy, axis=0)
    length = np.hypot(segment[:, 0], segment[:, 1])
    keep = np.concatenate([[True], length > 1e-6])
    xy = np.asarray(xy[keep], dtype=np.float64)
    if len(xy) < 2:
        return np.repeat(xy[:1], len(distances), axis=0)
    arc = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(xy, axis=0).T))])
    end = (xy[-1] - xy[-2]) / (arc[-1] - arc[-2])
    beyond = np.maximum(distances - arc[-1], 0.0)[:, None] * end
    inside = np.stack([np.interp(distances, arc, xy[:, 0]), np.interp(distances, arc, xy[:, 1])], axis=-1)
    return np.asarray(inside + beyond, dtype=np.float64)


def route_points(observation: Observation) -> NDArray[np.float64]:
    """``[R + 1, 2]`` the route every 4 m from its beginning; straight ahead if there is none."""
    distances = ROUTE_SPACING_M * np.arange(ROUTE_PIECES * ROUTE_PIECE_POINTS + 1)
    route = observation.route_xy
    if len(route) < 2 or np.ptp(route, axis=0).max() < MIN_ROUTE_M:
        return np.stack([distances, np.zeros_like(distances)], axis=-1)
    return resample(route, distances)


def along_route(points: NDArray[np.float64], xy: NDArray[np.floating]) -> tuple[NDArray[np.float64], ...]:
    """Arclength s and left offset d (m) of `xy` ``[n, 2]`` on the route, and the route's direction there ``[n, 2]``."""
    start, step = points[:-1], np.diff(points, axis=0)
    length = np.maximum(np.hypot(step[:, 0], step[:, 1]), 1e-6)
    unit = step / length[:, None]
    relative = np.asarray(xy, dtype=np.float64)[:, None] - start
    along = np.einsum("nrc,rc->nr", relative, unit)
    low = np.where(np.arange(len(start)) == 0, -np.inf, 0.0)
    high = np.where(np.arange(len(start)) == len(start) - 1, np.inf, length)
    along = np.clip(along, low, high)
    gap = relative - along[..., None] * unit
    nearest = np.hypot(gap[..., 0], gap[..., 1]).argmin(axis=1)
    n = np.arange(len(relative))
    left = unit[nearest][:, 0] * relative[n, nearest, 1] - unit[nearest][:, 1] * relative[n, nearest, 0]
    return ROUTE_SPACING_M * nearest + along[n, nearest], left, unit[nearest]


def anchor_path(observation: Observation, times_s: NDArray[np.floating]) -> NDArray[np.float64]:
    """``[T, 2]`` where the ego would be at `times_s` at its present speed along the route, easing onto it."""
    points = route_points(observation)
    s0, offset, _ = (v[0] for v in along_route(points, np.zeros((1, 2))))
    travelled = max(observation.speed_mps, 0.0) * times_s
    path = resample(points, np.maximum(s0 + travelled, 0.0))
    ahead = resample(points, np.maximum(s0 + travelled, 0.0) + 0.5) - path
    normal = np.stack([-ahead[:, 1], ahead[:, 0]], axis=-1) / np.maximum(np.hypot(*ahead.T), 1e-6)[:, None]
    shift = offset * np.exp(-travelled / OFFSET_DECAY_M)
    return np.asarray(path + shift[:, None] * normal)
