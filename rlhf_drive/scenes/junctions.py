"""Junction maps of the generator: crossroads (and T), roundabout, on-ramp."""

from __future__ import annotations

import dataclasses
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


@dataclass(frozen=True)
class Junction:
    """A junction with arms; `ways[(a, b)]` are the lane centres from arm a to arm b, one per parallel lane."""

    map: RoadMap
    ways: dict[tuple[int, int], tuple[Path, ...]]
    """Paths with s=0 where the vehicle enters the junction; arm 0 is the ego's."""
    length: dict[tuple[int, int], float]
    """Arclength where the way leaves the junction."""
    reach: float
    """Distance of the arms' ends from the middle, metres."""


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


def _pose(point: Array, heading: float) -> Array:
    return np.array([point[0], point[1], heading])


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


def _way(arm_in: Path, arm_out: Path, section: CrossSection, lane: int, middle: Array) -> Path:
    """Path from an arm's inbound lane over `middle` to another arm's outbound lane; s=0 where `middle` begins."""
    before = arm_in.pose(np.arange(ARM_LENGTH_M, -0.5, -10.0), section.center(-lane - 1))[:, :2]
    after = arm_out.pose(np.arange(0.0, ARM_LENGTH_M + 0.5, 10.0), section.center(lane))[:, :2]
    return path_from_points(join([before, middle, after]), -ARM_LENGTH_M)


def _length(points: Array) -> float:
    return float(np.hypot(*np.diff(points, axis=0).T).sum())


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
    reach = section.left_edge + corner
    arms = _arms(angles, reach)
    cuts = [0.0, 30.0, 70.0, 110.0]
    lanes: list[Lane] = []
    maps, ways, length = [], {}, {}
    for a, arm in enumerate(arms):
        there, back = EVERYWHERE if a == route else NOWHERE, EVERYWHERE if a == 0 else NOWHERE
        maps.append(corridor(arm, section, limit, cuts, forward_route=there, backward_route=back))
        for b, arm_out in enumerate(arms):
            if a == b:
                continue
            turn = np.angle(np.exp(1j * (angles[b] - angles[a] - np.pi)))
            parallel = range(section.forward) if abs(turn) < 0.6 else [0 if turn > 0 else section.forward - 1]
            signal = int(abs(np.cos(angles[a] - angles[0])) < 0.7) if signals else -1
            paths = []
            for lane in parallel:
                curve = resample(connect(_end(arm, section, -lane - 1), _end(arm_out, section, lane)), 2.0)
                lanes.append(_ribbon(curve, section.lane_width, limit, a == 0 and b == route, signal))
                paths.append(_way(arm, arm_out, section, lane, curve))
            ways[a, b], length[a, b] = tuple(paths), _length(curve)
    patch, kerbs = _patch(arms, section)
    stripes = tuple(crosswalk(arm, section, 1.0, walks) for arm in arms) if walks > 0 else ()
    inner = RoadMap(tuple(lanes), ((MapLayer.INTERSECTION, patch),), tuple(kerbs), stripes)
    return Junction(combine([*maps, inner]), ways, length, reach)


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
    reach, width, delta = radius + 12.0, 5.2, np.deg2rad(34.0)
    arms = _arms(angles, reach)
    maps: list[RoadMap] = []
    lanes: list[Lane] = []
    ways: dict[tuple[int, int], tuple[Path, ...]] = {}
    length: dict[tuple[int, int], float] = {}
    areas: list[tuple[MapLayer, Array]] = []
    edges = [_ring(radius - 0.5 * width - 0.3, 0.0, 2 * np.pi)]
    gone = (angles[route] - angles[0]) % (2 * np.pi)
    for a, arm in enumerate(arms):
        there, back = EVERYWHERE if a == route else NOWHERE, EVERYWHERE if a == 0 else NOWHERE
        maps.append(corridor(arm, section, limit, [0.0, 30.0, 70.0, 110.0], forward_route=there, backward_route=back))
        low, high = angles[a] - delta, angles[a] + delta
        entry = resample(connect(_end(arm, section, -1), _ring_pose(radius, high), 0.36), 2.0)
        leave = resample(connect(_ring_pose(radius, low), _end(arm, section, 0), 0.36), 2.0)
        lanes.append(_ribbon(entry, 4.2, limit, a == 0))
        lanes.append(_ribbon(leave, 4.2, limit, a == route))
        following = angles[(a + 1) % len(arms)] + (2 * np.pi if a + 1 == len(arms) else 0.0)
        for begin, end in ((low, high), (high, following - delta)):
            on_route = 0.1 < (0.5 * (begin + end) - angles[0]) % (2 * np.pi) < gone - 0.1
            lanes.append(_ribbon(_ring(radius, begin, end), width, limit, on_route, connector=False))
            bounds = [_ring(radius + k * (0.5 * width + 0.3), begin - 0.01, end + 0.01) for k in (1, -1)]
            areas.append((MapLayer.ROADBLOCK, np.concatenate([bounds[0], bounds[1][::-1]])))
        funnel, kerbs = _funnel(arm, section, radius, radius + 0.5 * width + 0.3, low, high)
        areas.append((MapLayer.INTERSECTION, funnel))
        edges += [*kerbs, _ring(radius + 0.5 * width + 0.3, high, following - delta)]
        for b in range(len(arms)):
            stop = angles[b] - delta
            stop += 2 * np.pi * np.ceil((high - stop) / (2 * np.pi))
            middle = [entry, _ring(radius, high, stop)]
            last = resample(connect(_ring_pose(radius, stop), _end(arms[b], section, 0), 0.36), 2.0)
            curve = join([*middle, last])
            ways[a, b], length[a, b] = (_way(arm, arms[b], section, 0, curve),), _length(curve)
    inner = RoadMap(tuple(lanes), tuple(areas), tuple(edges))
    return Junction(combine([*maps, inner]), ways, length, reach)


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
