"""Junction maps of the generator: crossroads (and T), roundabout, on-ramp."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass

import numpy as np

from rlhf_drive.scenes.geometry import Array, Path, connect, join, path_from_points, resample, smooth_step
from rlhf_drive.scenes.model import MapLayer
from rlhf_drive.scenes.roads import (
    EVERYWHERE,
    NOWHERE,
    POINT_SPACING_M,
    CrossSection,
    Lane,
    RoadMap,
    combine,
    corridor,
    crosswalk,
)

__all__ = ["Junction", "OnRamp", "crossroads", "on_ramp", "roundabout"]

ARM_LENGTH_M = 150.0
ARM_CUTS_M = (0.0, 30.0, 70.0, 110.0)
RING_WIDTH_M = 5.2
JOIN_RAD = float(np.deg2rad(34.0))
"""Angle on the ring between an arm and the points where its lanes join."""


@dataclass(frozen=True)
class Junction:
    """A junction with arms; arm 0 is the ego's."""

    map: RoadMap
    arms: tuple[Path, ...]
    """Reference lines outwards, s=0 at the junction."""
    section: CrossSection
    """Lanes of every arm: `forward` leave the junction, `backward` enter it."""
    curves: dict[tuple[int, int], dict[int, Array]]
    """Lane centres through the junction from arm a to arm b, by lane of the arms (0 beside the middle)."""

    def length(self, a: int, b: int) -> float:
        """Metres from entering the junction to leaving it."""
        curve = next(iter(self.curves[a, b].values()))
        return float(np.hypot(*np.diff(curve, axis=0).T).sum())

    def way(self, a: int, b: int, lane: int = 0) -> Path:
        """Path from arm a over the junction to arm b; s=0 where it enters the junction.

        `lane` is the arms' lane; where no connector starts from it, the turn's own lane is taken.
        """
        parallel = self.curves[a, b]
        lane = lane if lane in parallel else next(iter(parallel))
        before = self.arms[a].pose(np.arange(ARM_LENGTH_M, -0.5, -10.0), self.section.center(-lane - 1))[:, :2]
        after = self.arms[b].pose(np.arange(0.0, ARM_LENGTH_M + 0.5, 10.0), self.section.center(lane))[:, :2]
        return path_from_points(join([before, parallel[lane], after]), -ARM_LENGTH_M)


@dataclass(frozen=True)
class OnRamp:
    """A ramp that joins the rightmost of the main lanes."""

    map: RoadMap
    ramp: Path
    """From the ramp into the rightmost main lane; s=0 beside the reference's s=0."""
    main: tuple[Path, ...]
    """Main lanes, leftmost first."""
    gore: float
    """Arclength on the ramp where the lanes begin to touch."""
    end: float
    """Arclength on the ramp where it has become the main lane."""


def _ribbon(
    center: Array, width: float, limit: float, on_route: bool, signal: int = -1, *, connector: bool = True
) -> Lane:
    """Lane of constant width along a curve."""
    slope = np.gradient(center, axis=0)
    normal = np.stack([-slope[:, 1], slope[:, 0]], axis=1) / np.hypot(slope[:, 0], slope[:, 1])[:, None]
    return Lane(
        center, center + 0.5 * width * normal, center - 0.5 * width * normal, limit, on_route, connector, signal
    )


def _arms(angles: list[float], first: float) -> list[Path]:
    """Straight lines outwards from the middle; s=0 at the arm's junction end, `first` metres from the middle."""
    arms = []
    for angle in angles:
        u = np.array([np.cos(angle), np.sin(angle)])
        arms.append(path_from_points(np.stack([first * u, (first + ARM_LENGTH_M) * u]), 0.0))
    return arms


def _end(arm: Path, section: CrossSection, lane: int) -> Array:
    """Pose of an arm lane at the junction: lanes >= 0 leave it, lanes < 0 enter it."""
    pose = arm.pose(0.0, section.center(lane))
    return pose if lane >= 0 else np.asarray(pose + np.array([0.0, 0.0, np.pi]))


def crossroads(
    angles: list[float],
    section: CrossSection,
    *,
    corner: float,
    limit: float,
    route: int,
    signals: bool,
    walks: float = 0.0,
) -> Junction:
    """Junction of three or four straight arms.

    Args:
        angles: Outward direction of each arm, rising; arm 0 is the ego's.
        section: Lanes of every arm; `forward` leave the junction, `backward` (as many) enter it.
        corner: Radius of the kerbs, metres.
        limit: Speed limit, m/s.
        route: The arm the ego leaves by.
        signals: Whether lights govern the connectors (group 0: arms 0 and opposite; group 1: the others).
        walks: Width of the zebra crossings on the arms, 0 for none.
    """
    arms = _arms(angles, section.left_edge + corner)
    lanes: list[Lane] = []
    curves: dict[tuple[int, int], dict[int, Array]] = {}
    for a, b in itertools.permutations(range(len(arms)), 2):
        turn = np.angle(np.exp(1j * (angles[b] - angles[a] - np.pi)))
        parallel = range(section.forward) if abs(turn) < 0.6 else [0 if turn > 0 else section.forward - 1]
        signal = int(abs(np.cos(angles[a] - angles[0])) < 0.7) if signals else -1
        curves[a, b] = {
            lane: resample(connect(_end(arms[a], section, -lane - 1), _end(arms[b], section, lane)), 2.0)
            for lane in parallel
        }
        lanes += [
            _ribbon(curve, section.lane_width, limit, a == 0 and b == route, signal) for curve in curves[a, b].values()
        ]
    patch, kerbs = _patch(arms, section)
    stripes = tuple(crosswalk(arm, section, 1.0, walks) for arm in arms) if walks > 0 else ()
    inner = RoadMap(tuple(lanes), ((MapLayer.INTERSECTION, patch),), tuple(kerbs), stripes)
    return Junction(combine([*_arm_roads(arms, section, limit, route), inner]), tuple(arms), section, curves)


def _arm_roads(arms: list[Path], section: CrossSection, limit: float, route: int) -> list[RoadMap]:
    """The arms' roads: the way in on arm 0 and the way out on arm `route` belong to the route."""
    roads = []
    for a, arm in enumerate(arms):
        there, back = EVERYWHERE if a == route else NOWHERE, EVERYWHERE if a == 0 else NOWHERE
        roads.append(corridor(arm, section, limit, list(ARM_CUTS_M), forward_route=there, backward_route=back))
    return roads


def _patch(arms: list[Path], section: CrossSection) -> tuple[Array, list[Array]]:
    """INTERSECTION polygon and its kerbs, counter-clockwise from arm 0."""
    kerbs = []
    for arm, following in zip(arms, arms[1:] + arms[:1], strict=True):
        start = arm.pose(0.0, section.left_edge)
        start[2] += np.pi
        curve = connect(start, following.pose(0.0, section.right_edge), 0.3)
        kerbs.append(resample(curve, POINT_SPACING_M))
    return np.concatenate(kerbs), kerbs


def roundabout(angles: list[float], section: CrossSection, *, radius: float, limit: float, route: int) -> Junction:
    """One-lane ring, driven counter-clockwise, with three or four arms of one lane per direction.

    Args:
        angles: Outward direction of each arm, rising from arm 0 (the ego's) by at least 75 degrees.
        section: Lanes of every arm (1 + 1).
        radius: Radius of the ring lane's centre, metres.
        limit: Speed limit, m/s.
        route: The arm the ego leaves by.
    """
    arms, outer = _arms(angles, radius + 12.0), radius + 0.5 * RING_WIDTH_M + 0.3
    lanes, areas, edges = _ring_road(angles, radius, limit, route)
    entries, exits = [], []
    for a, arm in enumerate(arms):
        low, high = angles[a] - JOIN_RAD, angles[a] + JOIN_RAD
        entries.append(resample(connect(_end(arm, section, -1), _ring_pose(radius, high), 0.36), 2.0))
        exits.append(resample(connect(_ring_pose(radius, low), _end(arm, section, 0), 0.36), 2.0))
        lanes += [_ribbon(entries[a], 4.2, limit, a == 0), _ribbon(exits[a], 4.2, limit, a == route)]
        funnel, kerbs = _funnel(arm, section, radius, outer, low, high)
        areas.append((MapLayer.INTERSECTION, funnel))
        edges += kerbs
    curves = {}
    for a, b in itertools.product(range(len(arms)), repeat=2):
        begin, stop = angles[a] + JOIN_RAD, angles[b] - JOIN_RAD
        stop += 2 * np.pi * np.ceil((begin - stop) / (2 * np.pi))
        curves[a, b] = {0: join([entries[a], _ring(radius, begin, stop), exits[b]])}
    inner = RoadMap(tuple(lanes), tuple(areas), tuple(edges))
    return Junction(combine([*_arm_roads(arms, section, limit, route), inner]), tuple(arms), section, curves)


def _ring_road(
    angles: list[float], radius: float, limit: float, route: int
) -> tuple[list[Lane], list[tuple[MapLayer, Array]], list[Array]]:
    """Ring lanes, their ROADBLOCK sectors, and the edges: of the island, and outside between the arms."""
    half = 0.5 * RING_WIDTH_M + 0.3
    lanes: list[Lane] = []
    areas: list[tuple[MapLayer, Array]] = []
    edges = [_ring(radius - half, 0.0, 2 * np.pi)]
    gone = (angles[route] - angles[0]) % (2 * np.pi)
    for angle, after in itertools.pairwise([*angles, angles[0] + 2 * np.pi]):
        joints = (angle - JOIN_RAD, angle + JOIN_RAD, after - JOIN_RAD)
        for begin, end in itertools.pairwise(joints):
            on_route = 0.1 < (0.5 * (begin + end) - angles[0]) % (2 * np.pi) < gone - 0.1
            lanes.append(_ribbon(_ring(radius, begin, end), RING_WIDTH_M, limit, on_route, connector=False))
            bounds = [_ring(radius + side * half, begin - 0.01, end + 0.01) for side in (1, -1)]
            areas.append((MapLayer.ROADBLOCK, np.concatenate([bounds[0], bounds[1][::-1]])))
        edges.append(_ring(radius + half, joints[1], joints[2]))
    return lanes, areas, edges


def _ring(radius: float, begin: float, end: float) -> Array:
    angle = np.linspace(begin, end, max(3, int(radius * abs(end - begin) / 1.5)))
    return radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _ring_pose(radius: float, angle: float) -> Array:
    return np.array([radius * np.cos(angle), radius * np.sin(angle), angle + 0.5 * np.pi])


def _funnel(
    arm: Path, section: CrossSection, inner: float, outer: float, low: float, high: float
) -> tuple[Array, list[Array]]:
    """INTERSECTION polygon between an arm's end and the ring, and its two kerbs."""
    start = arm.pose(0.0, section.left_edge)
    start[2] += np.pi
    enter = connect(start, _ring_pose(outer, high), 0.36)[::2]
    leave = connect(_ring_pose(outer, low), arm.pose(0.0, section.right_edge), 0.36)[::2]
    return np.concatenate([leave, enter, _ring(inner, high, low)]), [enter, leave]


def on_ramp(
    reference: Path, section: CrossSection, *, begin: float, end: float, apart: float, limit: float, ego_on_ramp: bool
) -> OnRamp:
    """One-way main road along `reference` with a ramp that joins from the right.

    Args:
        reference: Left boundary of the main lanes.
        section: Main lanes (`backward` = 0).
        begin: Arclength where the ramp starts to approach.
        end: Arclength where it has become the rightmost main lane.
        apart: Distance of the ramp's centre from that lane's before `begin`, metres.
        limit: Speed limit, m/s.
        ego_on_ramp: Which of the two the route follows.
    """
    s = reference.start + np.arange(len(reference.xy))
    right, width = section.center(section.forward - 1), section.lane_width
    gap = apart * (1.0 - smooth_step((s - begin) / (end - begin)))
    ramp = reference.offset(right - gap)
    gore_main = float(s[np.argmax(gap < width + section.shoulder)])
    cuts = sorted([-60.0, -10.0, 40.0, 90.0, 130.0, 170.0, gore_main])
    keep = [c for c in cuts if c == gore_main or abs(c - gore_main) > 12.0]
    main_route = (gore_main, 1e9) if ego_on_ramp else EVERYWHERE
    highway = corridor(reference, section, limit, keep, forward_route=main_route)
    right_edge = [
        reference.pose(np.arange(a, b, POINT_SPACING_M), section.right_edge)[:, :2]
        for a, b in ((keep[0], gore_main), (end, keep[-1]))
    ]
    roads = [dataclasses.replace(highway, edges=(*right_edge, highway.edges[1]))]
    gore = ramp.nearest(reference.pose(gore_main, right - float(np.interp(gore_main, s, gap)))[:2])[0]
    stop = ramp.nearest(reference.pose(end, right)[:2])[0]
    one = CrossSection(1, 0, width, section.shoulder)
    line = ramp.offset(0.5 * width)
    line_gore = line.nearest(ramp.pose(gore)[:2])[0]
    ramp_cuts = [line_gore - 80.0, line_gore - 40.0, line_gore]
    route = EVERYWHERE if ego_on_ramp else NOWHERE
    roads.append(corridor(line, one, limit, ramp_cuts, forward_route=route))
    curve = resample(ramp.between(gore, stop), POINT_SPACING_M)
    connector = _ribbon(curve, width, limit, ego_on_ramp)
    at = np.arange(gore - 6.0, stop + 0.5, POINT_SPACING_M)
    outside = ramp.pose(at, -0.5 * width - section.shoulder)[:, :2]
    nose = ramp.pose(at[:1], 0.5 * width)[:, :2]
    main_side = resample(reference.between(gore_main, end), POINT_SPACING_M)
    area = (MapLayer.INTERSECTION, np.concatenate([main_side, outside[::-1], nose]))
    roads.append(RoadMap((connector,), (area,), (outside,)))
    main = tuple(reference.offset(section.center(k)) for k in range(section.forward))
    return OnRamp(combine(roads), ramp, main, gore, stop)
