"""Map polygons of a scene: drivable area, lanes, intersections, red lights (rules 8, 9 and 13)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import shapely
from numpy.typing import NDArray
from shapely.geometry import Point, Polygon, box

from rlhf_drive.scenes.importers.recorded_lanes import LaneShapes, grow, polygon_parts
from rlhf_drive.scenes.importers.recorded_reading import Array
from rlhf_drive.scenes.model import REFERENCE_STEPS, MapLayer

__all__ = ["MapPolygons", "RecordedMap", "RedPolygons", "hole_free_pieces"]

CLOSING_M = 1.5
LANE_MARGIN_M = 0.01
"""Lanes are grown by this before they join the drivable area, which closes hairline gaps."""
DRIVABLE_MARGIN_M = 0.3
DRIVABLE_MARGIN_NO_SHOULDER_M = 1.0
"""NGSIM has no shoulder in its source."""
DRIVABLE_SIMPLIFY_M = 0.02
FAST_MPS = 20.0
DRIVABLE_RADIUS_M = (190.0, 240.0)
"""Drivable area is clipped here below, and from, `FAST_MPS`."""
LANE_RADIUS_M = (130.0, 180.0)
"""Lanes off the route and intersections farther away are left out."""
RED = 1


@dataclass(frozen=True)
class MapPolygons:
    """Polygons of one scene, packed; see SceneReference."""

    xy: Array
    """``[V, 2]``."""
    offsets: NDArray[np.int64]
    """``[P + 1]``."""
    layer: NDArray[np.int8]
    """``[P]``."""
    on_route: NDArray[np.bool_]
    """``[P]``."""


@dataclass(frozen=True)
class RedPolygons:
    """Polygons of the lanes that are red at some step of one scene, packed; see SceneReference."""

    xy: Array
    """``[V, 2]``."""
    offsets: NDArray[np.int64]
    """``[R + 1]``."""
    on_route: NDArray[np.bool_]
    """``[R]``."""
    active: NDArray[np.bool_]
    """``[R, 51]``."""


def hole_free_pieces(polygon: Polygon) -> list[Polygon]:
    """The polygon cut along vertical lines through its holes, largest hole first, until no piece has one."""
    if not polygon.interiors:
        return [polygon]
    x = max(polygon.interiors, key=lambda ring: Polygon(ring).area).centroid.x
    left, bottom, right, top = polygon.bounds
    halves = (box(left - 1.0, bottom - 1.0, x, top + 1.0), box(x, bottom - 1.0, right + 1.0, top + 1.0))
    return [
        piece
        for half in halves
        for part in polygon_parts(polygon.intersection(half))
        for piece in hole_free_pieces(part)
    ]


def _pack(polygons: Sequence[Polygon]) -> tuple[Array, NDArray[np.int64]]:
    """Unclosed rings, one after the other, and their offsets."""
    rings = [shapely.get_coordinates(polygon.exterior)[:-1] for polygon in polygons]
    offsets = np.concatenate([[0], np.cumsum([len(ring) for ring in rings], dtype=np.int64)])
    return np.concatenate([np.zeros((0, 2)), *rings]), offsets.astype(np.int64)


class RecordedMap:
    """Everything about a recording's map that does not depend on where a scene starts."""

    def __init__(self, shapes: LaneShapes) -> None:
        self.shapes = shapes

    @cached_property
    def intersections(self) -> list[Polygon]:
        """Union of the lanes inside intersections, closed by 1.5 m, in hole-free pieces."""
        lanes = [self.shapes.outline[n] for n in sorted(self.shapes.in_intersection)]
        closed = grow(grow(shapely.union_all(lanes), CLOSING_M), -CLOSING_M)
        return [piece for part in polygon_parts(closed) for piece in hole_free_pieces(part)]

    @cached_property
    def drivable(self) -> list[Polygon]:
        """Union of recorded area and vehicle lanes, grown, in hole-free pieces."""
        recording = self.shapes.recording
        recorded = [Polygon(outer, holes).buffer(0) for outer, holes in recording.drivable]
        lanes = [grow(self.shapes.outline[n], LANE_MARGIN_M) for n in self.shapes.numbers]
        margin = DRIVABLE_MARGIN_NO_SHOULDER_M if recording.kind == "real_ngsim" else DRIVABLE_MARGIN_M
        area = shapely.union_all(recorded + lanes).buffer(margin, quad_segs=2).simplify(DRIVABLE_SIMPLIFY_M)
        return [piece for part in polygon_parts(area) for piece in hole_free_pieces(part)]

    def polygons(self, place: Array, speed: float, on_route: set[int]) -> MapPolygons:
        """Polygons about `place` ``[2]``: drivable area, lanes, intersections."""
        here, fast = Point(place), int(speed >= FAST_MPS)
        radius = DRIVABLE_RADIUS_M[fast]
        drivable = [part for piece in self.drivable for part in _clip(piece, here, radius)]
        lanes = sorted(on_route | self._near(here, LANE_RADIUS_M[fast]))
        areas = [piece for piece in self.intersections if piece.distance(here) < LANE_RADIUS_M[fast]]
        connectors = self.shapes.connectors
        layer = [MapLayer.DRIVABLE_AREA] * len(drivable)
        layer += [MapLayer.LANE_CONNECTOR if n in connectors else MapLayer.LANE for n in lanes]
        layer += [MapLayer.INTERSECTION] * len(areas)
        route = [False] * len(drivable) + [n in on_route for n in lanes] + [False] * len(areas)
        xy, offsets = _pack([*drivable, *(self.shapes.widened(n) for n in lanes), *areas])
        return MapPolygons(xy, offsets, np.array(layer, dtype=np.int8), np.array(route, dtype=np.bool_))

    def _near(self, here: Point, radius: float) -> set[int]:
        found = self.shapes.tree.query(here, predicate="dwithin", distance=radius)
        return {self.shapes.numbers[k] for k in found}

    def red_lights(self, start: int, on_route: set[int]) -> RedPolygons:
        """Polygons of the lanes whose signal is red at some of the 51 steps from `start`."""
        recording = self.shapes.recording
        red = recording.light_state[:, start : start + REFERENCE_STEPS] == RED
        rows = [k for k in np.flatnonzero(red.any(axis=1)) if int(recording.light_lane[k]) in self.shapes.outline]
        lanes = [int(recording.light_lane[k]) for k in rows]
        xy, offsets = _pack([self.shapes.outline[n] for n in lanes])
        return RedPolygons(xy, offsets, np.array([n in on_route for n in lanes], dtype=np.bool_), red[rows])


def _clip(piece: Polygon, here: Point, radius: float) -> list[Polygon]:
    if shapely.hausdorff_distance(here, piece) <= radius * np.cos(np.pi / 64):
        return [piece]
    return polygon_parts(piece.intersection(here.buffer(radius)))
