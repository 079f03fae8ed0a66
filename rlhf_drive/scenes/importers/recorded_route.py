"""The route of a scene: lanes on it, its centreline, the speed limit (rules 10 to 12)."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import shapely
from shapely.geometry import Point

from rlhf_drive.errors import DataError
from rlhf_drive.scenes.importers.recorded_lanes import LaneShapes
from rlhf_drive.scenes.importers.recorded_reading import Array
from rlhf_drive.scenes.trajectories import wrap_angle

__all__ = ["Route", "RouteFinder"]

AHEAD_M = 400.0
"""PDM-Closed takes the path's end for an obstacle, so the path goes on that far."""
TAIL_STEP_M = 5.0
SAMPLES = 20
ASIDE_M = (1.0, 5.5)
SAME_DIRECTION_RAD = np.deg2rad(20.0)
MIN_BESIDE = 0.6
MAX_BETWEEN_M = 1.0
"""Neighbours' polygons touch or nearly so: a bicycle lane between two lanes parts them."""
START_REACH_M = 10.0
"""How far from its lane the ego may start."""
DEFAULT_LIMIT_MPS = (15.0, 29.06)
"""Where none is recorded: street, freeway."""


@dataclass(frozen=True)
class Route:
    """What rules 10 to 12 say about one start."""

    lanes: set[int]
    """Lanes on the route, lateral neighbours included."""
    centerline: Array
    """``[C, 3]`` x, y, heading."""
    speed_limit: float
    """m/s."""


class RouteFinder:
    """Finds routes on the lanes of one recording; neighbours are looked up once and kept."""

    def __init__(self, shapes: LaneShapes) -> None:
        self.shapes = shapes
        self.recording = shapes.recording
        self._successors: dict[int, list[int]] = {n: [] for n in shapes.numbers}
        self._predecessors: dict[int, list[int]] = {n: [] for n in shapes.numbers}
        for a, b in sorted(self.recording.links):
            if a in self._successors and b in self._successors:
                self._successors[a].append(b)
                self._predecessors[b].append(a)
        self._neighbours: dict[int, list[int]] = {}
        self._matched = self._with_neighbours(self.recording.route)

    def find(self, ego: Array, speed: float) -> Route:
        """The route from the ego's rear axle `ego` ``[3]`` at `speed`.

        Raises:
            DataError: No lane of the ego's direction lies near.
        """
        *before, start = self._start(ego)
        path = self._extended([*before, *self._path(start)], ego)
        lane = self.recording.lanes[path[0]]
        limit = lane.limit if np.isfinite(lane.limit) else DEFAULT_LIMIT_MPS[lane.type]
        return Route(self._with_neighbours([*self._matched, *path]), self._centerline(path, ego), max(limit, speed))

    def _with_neighbours(self, lanes: Iterable[int]) -> set[int]:
        """The lanes and, transitively, their lateral neighbours of the same direction."""
        found, stack = set(lanes), list(lanes)
        while stack:
            for other in self._beside(stack.pop()):
                if other not in found:
                    found.add(other)
                    stack.append(other)
        return found

    def _beside(self, lane: int) -> list[int]:
        if lane not in self._neighbours:
            near = self.shapes.tree.query(self.shapes.outline[lane], predicate="dwithin", distance=MAX_BETWEEN_M)
            others = (self.shapes.numbers[k] for k in sorted(near))
            self._neighbours[lane] = [n for n in others if n != lane and self._are_neighbours(lane, n)]
        return self._neighbours[lane]

    def _are_neighbours(self, a: int, b: int) -> bool:
        """Whether 1 to 5.5 m lie between the lanes, under 20 degrees, along 60 % of the shorter one."""
        center = self.shapes.center
        short, long = (a, b) if center[a].length <= center[b].length else (b, a)
        at = np.linspace(0.0, center[short].length, SAMPLES)
        points = shapely.line_interpolate_point(center[short], at)
        along = shapely.line_locate_point(center[long], points)
        xy = shapely.get_coordinates(points)
        offset = xy - shapely.get_coordinates(shapely.line_interpolate_point(center[long], along))
        direction = _heading_at(self.recording.lanes[long].center, along)
        turn = np.abs(wrap_angle(_heading_at(self.recording.lanes[short].center, at) - direction))
        aside = np.abs(np.cos(direction) * offset[:, 1] - np.sin(direction) * offset[:, 0])
        distance = np.hypot(offset[:, 0], offset[:, 1])
        beside = (aside >= ASIDE_M[0]) & (distance <= ASIDE_M[1]) & (turn < SAME_DIRECTION_RAD)
        return bool(beside.mean() >= MIN_BESIDE - 1e-9)

    def _start(self, ego: Array) -> list[int]:
        """The matched lane that holds the rear axle, else the nearest on the route and what leads to it."""
        here = Point(ego[:2])
        holding = [n for n in self.recording.route if self.shapes.outline[n].contains(here)]
        if holding:
            return [min(holding, key=lambda n: self.shapes.center[n].distance(here))]
        reach = {n: self.shapes.outline[n].distance(here) for n in sorted(self._matched)}
        if not reach or min(reach.values()) > START_REACH_M:
            raise DataError(f"no lane of the route lies within {START_REACH_M:g} m of the ego")
        lane = min(reach, key=lambda n: reach[n])
        before = self._predecessors[lane] if self.shapes.center[lane].project(here) == 0.0 else []
        return [*self._straightest(before, lane, ahead=False), lane]

    def _straightest(self, candidates: list[int], lane: int, *, ahead: bool) -> list[int]:
        """Of the lanes that join `lane` at its end, or its beginning, the one with the least kink; empty if none."""
        lines = self.recording.lanes

        def kink(other: int) -> float:
            first, second = (lane, other) if ahead else (other, lane)
            turn = _heading_at(lines[second].center, np.zeros(1)) - _end_heading(lines[first].center)
            return float(np.abs(wrap_angle(turn))[0])

        return [min(candidates, key=kink)] if candidates else []

    def _path(self, start: int) -> list[int]:
        """Shortest way over successors on the route to the last lane reached, or to the last one that links allow."""
        ways: dict[int, list[int]] = {}
        queue: list[tuple[float, list[int]]] = [(0.0, [start])]
        while queue:
            cost, way = heapq.heappop(queue)
            lane = way[-1]
            if lane in ways:
                continue
            ways[lane] = way
            for n in self._successors[lane]:
                if n in self._matched and n not in ways:
                    heapq.heappush(queue, (cost + self.shapes.center[n].length, [*way, n]))
        logged = [n for n in self.recording.logged_route if n in ways]
        return ways[logged[-1]] if logged else [start]

    def _extended(self, path: list[int], ego: Array) -> list[int]:
        """The path continued over the straightest successors until it reaches 400 m ahead or ends."""
        path, center = list(path), self.shapes.center
        ahead = sum(center[n].length for n in path) - center[path[0]].project(Point(ego[:2]))
        while ahead < AHEAD_M:
            fresh = [n for n in self._successors[path[-1]] if n not in path]
            onward = self._straightest(fresh, path[-1], ahead=True)
            if not onward:
                break
            path += onward
            ahead += center[onward[0]].length
        return path

    def _centerline(self, path: list[int], ego: Array) -> Array:
        """``[C, 3]`` the lanes' centrelines joined, then straight on in steps of 5 m."""
        points = np.concatenate([self.recording.lanes[n].center for n in path])
        points = points[np.concatenate([[True], np.hypot(*np.diff(points, axis=0).T) > 1e-6])]
        line = shapely.linestrings(points)
        missing = AHEAD_M + TAIL_STEP_M - (line.length - shapely.line_locate_point(line, Point(ego[:2])))
        count = max(0, int(np.ceil(missing / TAIL_STEP_M)))
        heading = _end_heading(points)
        tail = TAIL_STEP_M * np.arange(1, count + 1)[:, None] * np.array([np.cos(heading), np.sin(heading)])
        points = np.concatenate([points, points[-1] + tail])
        step = np.diff(points, axis=0)
        headings = np.arctan2(step[:, 1], step[:, 0])
        return np.concatenate([points, np.append(headings, headings[-1])[:, None]], axis=1)


def _end_heading(line: Array) -> float:
    step = line[-1] - line[-2]
    return float(np.arctan2(step[1], step[0]))


def _heading_at(line: Array, at: Array) -> Array:
    """Heading of the segment of `line` that holds each arclength."""
    step = np.diff(line, axis=0)
    arc = np.concatenate([[0.0], np.cumsum(np.hypot(step[:, 0], step[:, 1]))])
    segment = np.clip(np.searchsorted(arc, at, side="right") - 1, 0, len(step) - 1)
    return np.asarray(np.arctan2(step[segment, 1], step[segment, 0]))
