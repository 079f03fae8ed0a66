"""What can be seen at t=0: the boundary between the simulated world and a policy.

:func:`observe` gets the map, the past, the lights as they are and the route; nothing that happens later is among its
arguments.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlhf_drive.scenes.geometry import Array, Path
from rlhf_drive.scenes.model import Command, MapElement, Observation
from rlhf_drive.scenes.roads import RoadMap

__all__ = ["Past", "command_ahead", "observe"]

AHEAD_M, BEHIND_M, ASIDE_M = 80.0, 40.0, 45.0
"""Map window about the ego."""
SIGHT_M = 90.0
"""Agents farther away are not seen."""
ROUTE_M = 90.0
TURN_RAD = np.deg2rad(20.0)


@dataclass(frozen=True)
class Past:
    """Users at the four observed times, the last one now; same frame as the map. A agents without the ego."""

    ego: Array
    """``[4, 11]`` ego states."""
    pose: Array
    """``[4, A, 3]`` box centres."""
    velocity: Array
    """``[4, A, 2]``."""
    size: Array
    """``[A, 2]``."""
    type: NDArray[np.int8]
    """``[A]``."""


def observe(road: RoadMap, past: Past, red_now: NDArray[np.bool_], route: Path) -> Observation:
    """The observation at t=0 in the ego frame.

    Args:
        road: The map.
        past: Everybody's states at -1.5, -1, -0.5 and 0 s.
        red_now: ``[groups]`` whether each light group shows red now.
        route: Centre line of the route.
    """
    origin = past.ego[-1, :3]
    agents, valid, seen = _agents(past, origin)
    xy, offsets, fields = _polylines(road, red_now, origin)
    s, _ = route.nearest(origin[:2])
    ahead = route.pose(np.arange(s, s + ROUTE_M + 0.1, 2.0))
    return Observation(
        ego_history=_history(past.ego, origin).astype(np.float32),
        agents=agents.astype(np.float32),
        agents_valid=valid,
        agents_size=past.size[seen].astype(np.float32),
        agents_type=past.type[seen],
        map_xy=xy.astype(np.float32),
        map_offsets=offsets,
        map_type=fields[:, 0].astype(np.int8),
        map_speed_limit=fields[:, 1].astype(np.float32),
        map_on_route=fields[:, 2] > 0,
        map_red=fields[:, 3] > 0,
        route_xy=_to_ego(ahead[:, :2], origin).astype(np.float32),
        command=command_ahead(route, s, float(past.ego[-1, 3])),
    )


def command_ahead(route: Path, s: float, speed: float) -> Command:
    """LEFT or RIGHT if the route turns by more than 20 degrees over the next 4 s (20 … 40 m)."""
    distance = min(max(4.0 * speed, 20.0), 40.0)
    turn = float(route.pose(s + distance)[2] - route.pose(s)[2])
    return Command.LEFT if turn > TURN_RAD else Command.RIGHT if turn < -TURN_RAD else Command.STRAIGHT


def _to_ego(points: Array, origin: Array) -> Array:
    cos, sin = np.cos(origin[2]), np.sin(origin[2])
    dx, dy = points[..., 0] - origin[0], points[..., 1] - origin[1]
    return np.stack([cos * dx + sin * dy, cos * dy - sin * dx], axis=-1)


def _wrap(angle: Array) -> Array:
    return np.asarray((angle + np.pi) % (2.0 * np.pi) - np.pi)


def _history(ego: Array, origin: Array) -> Array:
    """``[4, 8]`` x, y, heading, vx, vy, ax, ay, yaw rate."""
    place = np.concatenate([_to_ego(ego[:, :2], origin), _wrap(ego[:, 2:3] - origin[2])], axis=1)
    return np.concatenate([place, ego[:, 3:7], ego[:, 9:10]], axis=1)


def _agents(past: Past, origin: Array) -> tuple[Array, NDArray[np.bool_], NDArray[np.int64]]:
    """``[A, 4, 5]`` agents within sight now, their validity ``[A, 4]``, and which of the past's agents they are."""
    xy = _to_ego(past.pose[..., :2], origin)
    distance = np.hypot(xy[..., 0], xy[..., 1])
    seen = np.flatnonzero(distance[-1] < SIGHT_M)
    turned = past.velocity + origin[:2]
    rows = np.concatenate([xy, _wrap(past.pose[..., 2:3] - origin[2]), _to_ego(turned, origin)], axis=2)
    valid = (distance < SIGHT_M)[:, seen].T
    return np.where(valid[..., None], rows[:, seen].transpose(1, 0, 2), 0.0), valid, seen


def _polylines(road: RoadMap, red_now: NDArray[np.bool_], origin: Array) -> tuple[Array, NDArray[np.int32], Array]:
    """Points, offsets, and rows (type, limit, on route, red) of all map elements inside the window."""
    lines, rows = [], []
    for lane in road.lanes:
        kind = MapElement.LANE_CONNECTOR_CENTER if lane.connector else MapElement.LANE_CENTER
        red = lane.signal >= 0 and bool(red_now[lane.signal])
        lines.append(lane.center)
        rows.append((float(kind), lane.limit, float(lane.on_route), float(red)))
    for edge in road.edges:
        lines.append(edge)
        rows.append((float(MapElement.ROAD_EDGE), 0.0, 0.0, 0.0))
    for walk in road.crosswalks:
        lines.append(np.concatenate([walk, walk[:1]]))
        rows.append((float(MapElement.CROSSWALK), 0.0, 0.0, 0.0))
    counts = np.array([len(line) for line in lines])
    xy = _to_ego(np.concatenate(lines), origin)
    inside = (xy[:, 0] > -BEHIND_M) & (xy[:, 0] < AHEAD_M) & (np.abs(xy[:, 1]) < ASIDE_M)
    owner = np.repeat(np.arange(len(lines)), counts)
    fresh = inside & np.concatenate([[True], ~(inside[:-1] & (owner[1:] == owner[:-1]))])
    part = np.cumsum(fresh)[inside] - 1
    sizes = np.bincount(part, minlength=int(fresh.sum()))
    long = sizes >= 2
    offsets = np.concatenate([[0], np.cumsum(sizes[long])]).astype(np.int32)
    return xy[inside][long[part]], offsets, np.array(rows)[owner[fresh][long]].reshape(-1, 4)
