"""What could be seen at t=0 of a recording: nothing recorded later enters here.

The route is the navigation route (lanes joined to a centreline), never the path that was driven.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from rlhf_drive.scenes.importers.recorded_agents import Tracks, seen_agents
from rlhf_drive.scenes.importers.recorded_ego import EgoLog
from rlhf_drive.scenes.importers.recorded_map import RED
from rlhf_drive.scenes.importers.recorded_reading import Array, Recording
from rlhf_drive.scenes.importers.recorded_route import Route
from rlhf_drive.scenes.model import Command, MapElement, Observation

__all__ = ["MapLines", "observe_recording"]

SPACING_M = 2.5
MAP_RADIUS_M = 80.0
ROUTE_M = 100.0
COMMAND_M = 40.0
TURN_RAD = np.deg2rad(20.0)
_OFF_LANE = -1


def _resample(line: Array) -> Array:
    """The polyline with equal steps of about 2.5 m; both ends stay."""
    step = np.diff(line, axis=0)
    arc = np.concatenate([[0.0], np.cumsum(np.hypot(step[:, 0], step[:, 1]))])
    at = np.linspace(0.0, arc[-1], max(2, round(float(arc[-1]) / SPACING_M) + 1))
    return np.stack([np.interp(at, arc, line[:, 0]), np.interp(at, arc, line[:, 1])], axis=1)


@dataclass(frozen=True)
class MapLines:
    """All polylines of one recording that can be seen, resampled once for all its scenes."""

    recording: Recording
    """Source."""
    connectors: frozenset[int]
    """Lanes drawn as connectors."""

    @cached_property
    def _elements(self) -> list[tuple[Array, MapElement, int]]:
        """Line, what it is, and its lane (-1 for everything else)."""
        found: list[tuple[Array, MapElement, int]] = []
        for n, lane in enumerate(self.recording.lanes):
            if lane.for_vehicles:
                kind = MapElement.LANE_CONNECTOR_CENTER if n in self.connectors else MapElement.LANE_CENTER
                found.append((_resample(lane.center), kind, n))
        rings = [ring for outer, holes in self.recording.drivable for ring in (outer, *holes)]
        edges = self.recording.edges or [np.concatenate([ring, ring[:1]]) for ring in rings]
        found += [(_resample(edge), MapElement.ROAD_EDGE, _OFF_LANE) for edge in edges]
        return found + [(_closed(ring), MapElement.CROSSWALK, _OFF_LANE) for ring in self.recording.crosswalks]

    @cached_property
    def xy(self) -> Array:
        """``[P, 2]`` points of all lines, one after the other."""
        return np.concatenate([line for line, _, _ in self._elements])

    @cached_property
    def owner(self) -> NDArray[np.int64]:
        """``[P]`` line of each point."""
        return np.repeat(np.arange(len(self._elements)), [len(line) for line, _, _ in self._elements])

    @cached_property
    def kind(self) -> NDArray[np.int8]:
        """``[M]`` MapElement of each line."""
        return np.array([kind for _, kind, _ in self._elements], dtype=np.int8)

    @cached_property
    def lane(self) -> NDArray[np.int64]:
        """``[M]`` lane of each line, -1 where it is none."""
        return np.array([lane for _, _, lane in self._elements], dtype=np.int64)


def _closed(ring: Array) -> Array:
    return ring if np.array_equal(ring[0], ring[-1]) else np.concatenate([ring, ring[:1]])


def observe_recording(ego: EgoLog, tracks: Tracks, lines: MapLines, route: Route, start: int) -> Observation:
    """The observation of the scene that starts at sample `start`."""
    recording, origin = ego.recording, ego.pose[start]
    who, agents, valid = seen_agents(tracks, start, origin)
    xy, offsets, element = _visible(lines, origin)
    ahead, command = _route_ahead(route.centerline, origin)
    lane = lines.lane[element]
    red = recording.light_lane[recording.light_state[:, start] == RED]
    limits = np.nan_to_num(np.array([one.limit for one in recording.lanes]))
    return Observation(
        ego_history=ego.seen_history(start).astype(np.float32),
        agents=agents.astype(np.float32),
        agents_valid=valid,
        agents_size=recording.agent_size[who].astype(np.float32),
        agents_type=recording.agent_type[who],
        map_xy=xy.astype(np.float32),
        map_offsets=offsets,
        map_type=lines.kind[element],
        map_speed_limit=np.where(lane >= 0, limits[lane], 0.0).astype(np.float32),
        map_on_route=np.isin(lane, list(route.lanes)),
        map_red=np.isin(lane, red),
        route_xy=ahead.astype(np.float32),
        command=command,
    )


def _to_ego(points: Array, origin: Array) -> Array:
    cos, sin = np.cos(origin[2]), np.sin(origin[2])
    dx, dy = points[:, 0] - origin[0], points[:, 1] - origin[1]
    return np.stack([cos * dx + sin * dy, cos * dy - sin * dx], axis=1)


def _visible(lines: MapLines, origin: Array) -> tuple[Array, NDArray[np.int32], NDArray[np.int64]]:
    """Runs of points within 80 m: points in the ego frame, offsets, and the line of each run."""
    xy = _to_ego(lines.xy, origin)
    inside = np.hypot(xy[:, 0], xy[:, 1]) <= MAP_RADIUS_M
    goes_on = np.concatenate([[False], inside[:-1] & (lines.owner[1:] == lines.owner[:-1])])
    first = inside & ~goes_on
    run = np.cumsum(first)[inside] - 1
    sizes = np.bincount(run, minlength=int(first.sum()))
    long = sizes >= 2
    offsets = np.concatenate([[0], np.cumsum(sizes[long])]).astype(np.int32)
    return xy[inside][long[run]], offsets, lines.owner[first][long]


def _route_ahead(centerline: Array, origin: Array) -> tuple[Array, Command]:
    """``[R, 2]`` the centreline from the ego's projection on, in the ego frame; the turn it takes over 40 m."""
    line = centerline[:, :2]
    step = np.diff(line, axis=0)
    arc = np.concatenate([[0.0], np.cumsum(np.hypot(step[:, 0], step[:, 1]))])
    here = _project(line, arc, origin[:2])
    at = np.minimum(np.arange(here, here + ROUTE_M + 0.1, SPACING_M), arc[-1])
    ahead = np.stack([np.interp(at, arc, line[:, 0]), np.interp(at, arc, line[:, 1])], axis=1)
    heading = np.unwrap(centerline[:, 2])
    segment = np.clip(np.searchsorted(arc, [here, here + COMMAND_M], side="right") - 1, 0, len(step) - 1)
    turn = float(heading[segment[1]] - heading[segment[0]])
    command = Command.LEFT if turn > TURN_RAD else Command.RIGHT if turn < -TURN_RAD else Command.STRAIGHT
    return _to_ego(ahead, origin), command


def _project(line: Array, arc: Array, point: Array) -> float:
    """Arclength of the point of the polyline nearest to `point`."""
    step, length = np.diff(line, axis=0), np.diff(arc)
    t = np.clip(((point - line[:-1]) * step).sum(axis=1) / length**2, 0.0, 1.0)
    foot = line[:-1] + t[:, None] * step
    nearest = int(np.argmin(np.hypot(*(foot - point).T)))
    return float(arc[nearest] + t[nearest] * length[nearest])
