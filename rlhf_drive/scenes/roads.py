"""Maps of the generator: lanes with their polygons, drivable areas, edges and crosswalks, and the plain road."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from rlhf_drive.scenes.geometry import Array, Path, path_from_curvature, resample, smooth_step
from rlhf_drive.scenes.model import MapLayer

__all__ = ["CrossSection", "Lane", "RoadMap", "bending_road", "combine", "corridor", "crosswalk", "lane_path"]

POINT_SPACING_M = 2.5
EVERYWHERE = (-1e9, 1e9)
NOWHERE = (1e9, -1e9)


@dataclass(frozen=True)
class Lane:
    """One piece of lane in its direction of travel; its polygon lies between `left` and `right`."""

    center: Array
    """``[n, 2]``."""
    left: Array
    """``[m, 2]`` boundary."""
    right: Array
    """``[m, 2]`` boundary."""
    limit: float
    """Speed limit, m/s."""
    on_route: bool
    """Whether its roadblock belongs to the ego's route."""
    connector: bool = False
    """LANE_CONNECTOR (inside a junction) instead of LANE."""
    signal: int = -1
    """Traffic-light group that governs it, -1 for none."""

    @property
    def polygon(self) -> Array:
        """Unclosed ring ``[2m, 2]``."""
        return np.concatenate([self.left, self.right[::-1]])


@dataclass(frozen=True)
class RoadMap:
    """Everything that does not move."""

    lanes: tuple[Lane, ...]
    areas: tuple[tuple[MapLayer, Array], ...]
    """ROADBLOCK, INTERSECTION and CARPARK_AREA polygons, unclosed rings."""
    edges: tuple[Array, ...]
    """Road edges as polylines."""
    crosswalks: tuple[Array, ...] = ()
    """Four corners each."""


@dataclass(frozen=True)
class CrossSection:
    """Lanes of a road, right-hand traffic, about a reference line that separates the two directions."""

    forward: int
    backward: int
    lane_width: float
    shoulder: float
    """Carriageway beyond the outermost lane, metres."""
    parking: float = 0.0
    """Width of a parking strip along the forward right edge."""

    def center(self, lane: int) -> float:
        """Left offset of a lane's centre: 0, 1, … forward from the middle outwards, -1, -2, … backward."""
        return -(lane + 0.5) * self.lane_width if lane >= 0 else (-lane - 0.5) * self.lane_width

    @property
    def right_edge(self) -> float:
        """Left offset of the forward side's edge (negative)."""
        return -(self.forward * self.lane_width + self.shoulder)

    @property
    def left_edge(self) -> float:
        """Left offset of the backward side's edge."""
        return self.backward * self.lane_width + self.shoulder


def combine(maps: list[RoadMap]) -> RoadMap:
    """One map out of several."""
    return RoadMap(
        tuple(lane for m in maps for lane in m.lanes),
        tuple(area for m in maps for area in m.areas),
        tuple(edge for m in maps for edge in m.edges),
        tuple(walk for m in maps for walk in m.crosswalks),
    )


def bending_road(bends: list[tuple[float, float, float]], low: float, high: float) -> Path:
    """Reference line from `low` to `high` (whole metres) with bends eased in and out over up to 6 m.

    Args:
        bends: (first arclength, last arclength, radius; positive turns left).
        low: Arclength of the first vertex, <= 0.
        high: Arclength of the last vertex.
    """
    s = np.arange(low, high + 0.5)
    curvature = np.zeros(len(s))
    for first, last, radius in bends:
        ease = min(6.0, 0.3 * (last - first))
        curvature += (smooth_step((s - first) / ease) - smooth_step((s - last + ease) / ease)) / radius
    return path_from_curvature(curvature, low)


def lane_path(reference: Path, section: CrossSection, lane: int) -> Path:
    """Centre of a lane in its own direction of travel; s=0 lies beside the reference's s=0."""
    path = reference.offset(section.center(lane))
    return path if lane >= 0 else path.reverse()


def corridor(
    reference: Path,
    section: CrossSection,
    limit: float,
    cuts: list[float],
    *,
    forward_route: tuple[float, float] = NOWHERE,
    backward_route: tuple[float, float] = NOWHERE,
) -> RoadMap:
    """A road along `reference`, cut into roadblocks and lanes at the arclengths `cuts`.

    Args:
        reference: Line between the two directions.
        section: Its lanes.
        limit: Speed limit, m/s.
        cuts: Rising arclengths; k+1 cuts make k pieces.
        forward_route: Pieces whose middle lies in this range are on the route, forward lanes.
        backward_route: The same for the backward lanes.
    """
    lanes: list[Lane] = []
    areas: list[tuple[MapLayer, Array]] = []
    for low, high in itertools.pairwise(cuts):
        line = resample(reference.between(low, high), POINT_SPACING_M)
        normal = reference.pose(np.linspace(low, high, len(line)))[:, 2]
        left = np.stack([-np.sin(normal), np.cos(normal)], axis=1)
        middle = 0.5 * (low + high)
        for lane in range(-section.backward, section.forward):
            route = forward_route if lane >= 0 else backward_route
            on_route = route[0] <= middle <= route[1]
            lanes.append(_lane(line, left, section, lane, limit, on_route))
        areas += _blocks(line, left, section)
    s = np.arange(cuts[0], cuts[-1], POINT_SPACING_M)
    edges = [reference.pose(s, d)[:, :2] for d in (section.right_edge, section.left_edge)]
    return RoadMap(tuple(lanes), tuple(areas), tuple(edges))


def _lane(line: Array, left: Array, section: CrossSection, lane: int, limit: float, on_route: bool) -> Lane:
    """One lane along `line` with unit normals `left`."""
    center = section.center(lane)
    half = 0.5 * section.lane_width
    ways = [line + o * left for o in (center, center + half, center - half)]
    if lane < 0:
        ways = [ways[0][::-1], ways[2][::-1], ways[1][::-1]]
    return Lane(ways[0], ways[1], ways[2], limit, on_route)


def _blocks(line: Array, left: Array, section: CrossSection) -> list[tuple[MapLayer, Array]]:
    """ROADBLOCK of each direction and the parking strip of one piece."""
    bounds = [(MapLayer.ROADBLOCK, 0.0 if section.backward else section.left_edge, section.right_edge)]
    if section.backward:
        bounds.append((MapLayer.ROADBLOCK, section.left_edge, 0.0))
    if section.parking > 0:
        bounds.append((MapLayer.CARPARK_AREA, section.right_edge, section.right_edge - section.parking))
    return [(layer, np.concatenate([line + a * left, (line + b * left)[::-1]])) for layer, a, b in bounds]


def crosswalk(reference: Path, section: CrossSection, s: float, width: float) -> Array:
    """Corners ``[4, 2]`` of a zebra crossing over the whole road at arclength `s`."""
    ends = [
        (s, section.right_edge),
        (s + width, section.right_edge),
        (s + width, section.left_edge),
        (s, section.left_edge),
    ]
    return np.stack([reference.pose(a, d)[:2] for a, d in ends])
