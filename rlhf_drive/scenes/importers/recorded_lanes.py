"""Lanes of a recording as polygons: outline, widening, and which of them are connectors (rules 6 to 8)."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import shapely
from shapely.geometry import LineString, Polygon

from rlhf_drive.errors import DataError
from rlhf_drive.scenes.importers.recorded_reading import Array, Lane, Recording

__all__ = ["LaneShapes", "grow", "largest_part", "polygon_parts"]

HALF_WIDTH_M = 1.75
MIN_COVERED = 0.8
"""Share of its centreline that a lane's outline must cover."""
WIDENING_M = 1.5
SLIVER_M = 0.005
"""Half the width below which widening leaves no sliver."""
SIMPLIFY_M = 0.01
CONNECTOR_LENGTH_M = 60.0
CROSSING_RAD = np.deg2rad(30.0)
MIN_INSIDE = 0.5


def polygon_parts(geometry: shapely.Geometry) -> list[Polygon]:
    """The polygons of a geometry; lines and points are dropped."""
    parts = shapely.get_parts(geometry)
    return [part for part in parts if part.geom_type == "Polygon" and not part.is_empty]


def largest_part(geometry: shapely.Geometry) -> Polygon:
    """The polygon of largest area.

    Raises:
        DataError: The geometry holds no polygon.
    """
    parts = polygon_parts(geometry)
    if not parts:
        raise DataError("a lane's outline has no area")
    return max(parts, key=lambda part: part.area)


def grow(geometry: shapely.Geometry, distance: float) -> shapely.Geometry:
    """Buffer with corners kept sharp."""
    return shapely.buffer(geometry, distance, join_style="mitre")


def _outline(lane: Lane) -> Polygon:
    """Left boundary and reversed right boundary; a band about the centreline where those do not cover it."""
    polygon = Polygon(np.concatenate([lane.left, lane.right[::-1]])) if len(lane.left) + len(lane.right) > 2 else None
    if polygon is not None and not polygon.is_valid:
        parts = polygon_parts(shapely.make_valid(polygon))
        polygon = max(parts, key=lambda part: part.area) if parts else None
    center = LineString(lane.center)
    if polygon is None or polygon.intersection(center).length < MIN_COVERED * center.length:
        return largest_part(center.buffer(HALF_WIDTH_M, cap_style="flat"))
    return polygon


def _crosses(a: Array, b: Array) -> bool:
    """Whether two polylines cross at more than 30 degrees."""
    start, step = a[:-1, None], np.diff(a, axis=0)[:, None]
    other, along = b[None, :-1], np.diff(b, axis=0)[None]
    area = step[..., 0] * along[..., 1] - step[..., 1] * along[..., 0]
    offset = other - start
    with np.errstate(divide="ignore", invalid="ignore"):
        s = (offset[..., 0] * along[..., 1] - offset[..., 1] * along[..., 0]) / area
        t = (offset[..., 0] * step[..., 1] - offset[..., 1] * step[..., 0]) / area
    meet = (area != 0) & (s >= 0) & (s <= 1) & (t >= 0) & (t <= 1)
    angle = np.abs(np.arctan2(area, (step * along).sum(axis=-1)))
    return bool((meet & (angle > CROSSING_RAD) & (angle < np.pi - CROSSING_RAD)).any())


class LaneShapes:
    """Polygons of the vehicle lanes of one recording; widened ones are made when asked for, and kept."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.numbers = [n for n, lane in enumerate(recording.lanes) if lane.for_vehicles]
        """Vehicle lanes, ascending."""
        self.outline = {n: _outline(recording.lanes[n]) for n in self.numbers}
        """Polygon by lane."""
        self.center = {n: LineString(recording.lanes[n].center) for n in self.numbers}
        """Centreline by lane."""
        self.signal = {int(n) for n in recording.light_lane}
        """Lanes with a signal."""
        self.tree = shapely.STRtree([self.outline[n] for n in self.numbers])
        """Index over `numbers`."""
        self._widened: dict[int, Polygon] = {}

    def widened(self, number: int) -> Polygon:
        """The lane grown by 1.5 m into space that no other lane covers; signal-controlled lanes keep their shape."""
        if number not in self._widened:
            plain = number in self.signal
            self._widened[number] = self.outline[number] if plain else self._widen(number)
        return self._widened[number]

    def _widen(self, number: int) -> Polygon:
        own = self.outline[number]
        band = grow(own, WIDENING_M)
        near = [self.numbers[k] for k in sorted(self.tree.query(band, predicate="intersects"))]
        taken = shapely.union_all([self.outline[n] for n in near if n != number])
        free = band.difference(taken.difference(own))
        both = grow(grow(shapely.union_all([free, own]), -SLIVER_M), SLIVER_M)
        return Polygon(largest_part(both).simplify(SIMPLIFY_M).exterior)

    @cached_property
    def in_intersection(self) -> set[int]:
        """Lanes inside an intersection: as recorded, or derived where the file has no flag."""
        flagged = [n for n in self.numbers if self.recording.lanes[n].flag == 1]
        if any(lane.flag >= 0 for lane in self.recording.lanes):
            return set(flagged)
        return self._derived_intersection()

    @cached_property
    def connectors(self) -> set[int]:
        """Lanes of the layer LANE_CONNECTOR: inside an intersection, or with a signal."""
        return self.in_intersection | (self.signal & set(self.numbers))

    def _derived_intersection(self) -> set[int]:
        """Short lanes that cross another lane, and short lanes mostly inside those."""
        links = self.recording.links
        short = [n for n in self.numbers if self.center[n].length < CONNECTOR_LENGTH_M]
        lines = [self.center[n] for n in self.numbers]
        tree = shapely.STRtree(lines)
        crossing: set[int] = set()
        for n in short:
            for k in tree.query(self.center[n], predicate="intersects"):
                other = self.numbers[k]
                linked = other == n or (n, other) in links or (other, n) in links
                if not linked and _crosses(self.recording.lanes[n].center, self.recording.lanes[other].center):
                    crossing.add(n)
                    break
        inside = shapely.union_all([self.outline[n] for n in sorted(crossing)])
        rest = [n for n in short if n not in crossing]
        mostly = [n for n in rest if self.outline[n].intersection(inside).area > MIN_INSIDE * self.outline[n].area]
        return crossing | set(mostly)
