"""Scenes as large as recorded ones: 60 agents, 220 map polygons, red lights, map coordinates of UTM magnitude.

Two roads of six lanes cross, cut into pieces of 25 m as maps of cities are; the ego drives towards the junction among
cars of its own and the opposite direction, queues, pedestrians, cyclists and cones. Plans follow the route at many
speeds and drift sideways, so that some of them hit somebody, leave the road, or keep away from everything.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from rewards.pdm_closed import plan_pdm_closed
from rlhf_drive.scenes import AgentType, MapLayer, SceneReference, to_ego_frame
from rlhf_drive.scenes.geometry import Path, smooth_step
from rlhf_drive.scenes.junctions import Junction, crossroads
from rlhf_drive.scenes.roads import EVERYWHERE, NOWHERE, CrossSection, RoadMap, combine, corridor

__all__ = ["NUM_AGENTS", "NUM_POLYGONS", "RealSizeScene", "real_size_scene"]

NUM_AGENTS, NUM_POLYGONS = 60, 220
_SECTION = CrossSection(forward=3, backward=3, lane_width=3.5, shoulder=0.5)
_CUTS_M = [25.0 * i for i in range(7)]
_CAR_PARKS = 7
_STEPS, _STEP_S = 51, 0.1
_POSE_TIMES_S = 0.5 * np.arange(1, 9)
_EGO_START_M = -32.0
_UTM = np.array([664_430.0, 3_999_320.0])

Array = NDArray[np.float64]


@dataclass(frozen=True)
class RealSizeScene:
    """One scene with plans for it."""

    reference: SceneReference
    """The world, PDM-Closed's references included."""
    plans: Array
    """``[B, 8, 3]`` plans of this frame."""
    previous: Array
    """``[B, 8, 3]`` plans of the frame 0.5 s earlier, in its ego frame."""


@dataclass(frozen=True)
class _Tracks:
    """Agents in the world frame."""

    pose: Array
    """``[A, 51, 3]``."""
    velocity: Array
    """``[A, 51, 2]``."""
    size: Array
    """``[A, 2]`` length, width."""
    kind: NDArray[np.int8]
    """``[A]``."""


def _pack(rings: list[Array]) -> tuple[Array, NDArray[np.int64]]:
    lengths = [0, *(len(ring) for ring in rings)]
    return np.concatenate(rings), np.cumsum(lengths).astype(np.int64)


def _map(junction: Junction, exit_arm: int) -> RoadMap:
    """The junction's own polygons with its arms cut anew, and car parks beside the first arms."""
    connectors = tuple(lane for lane in junction.map.lanes if lane.connector)
    patches = tuple(area for area in junction.map.areas if area[0] == MapLayer.INTERSECTION)
    roads = []
    parks: list[tuple[MapLayer, Array]] = []
    for a, arm in enumerate(junction.arms):
        there, back = EVERYWHERE if a == exit_arm else NOWHERE, EVERYWHERE if a == 0 else NOWHERE
        roads.append(corridor(arm, _SECTION, 13.9, _CUTS_M, forward_route=there, backward_route=back))
        s, edge = np.arange(5.0, 70.0, 2.5), _SECTION.right_edge
        for low in (0.0, 70.0):
            ring = np.concatenate([arm.pose(s + low, edge)[:, :2], arm.pose(s[::-1] + low, edge - 6.0)[:, :2]])
            parks.append((MapLayer.CARPARK_AREA, ring))
    return combine([*roads, RoadMap(connectors, (*patches, *parks[:_CAR_PARKS]), ())])


def _drive(path: Path, s: float, d: float, speed: float) -> tuple[Array, Array]:
    """Pose ``[51, 3]`` and velocity ``[51, 2]`` of somebody who follows a path at constant speed."""
    pose = path.pose(s + speed * _STEP_S * np.arange(_STEPS), d)
    return pose, speed * np.stack([np.cos(pose[:, 2]), np.sin(pose[:, 2])], axis=1)


def _tracks(junction: Junction, exit_arm: int, rng: np.random.Generator) -> _Tracks:
    """60 agents: 18 around the ego, 12 oncoming, 12 queueing, 6 leaving, 6 on foot, 3 cyclists, 3 cones."""
    ways = {(a, b, lane): junction.way(a, b, lane) for a, b in junction.curves for lane in junction.curves[a, b]}
    straight = [ways[0, 2, lane] for lane in range(3)]
    car, bus, person, bicycle, cone = (4.7, 1.9), (11.5, 2.6), (0.6, 0.6), (1.8, 0.6), (0.4, 0.4)
    rows: list[tuple[tuple[Array, Array], tuple[float, float], AgentType]] = []

    def add(path: Path, s: float, d: float, speed: float, size: tuple[float, float], kind: AgentType) -> None:
        rows.append((_drive(path, s, d, speed), size, kind))

    for i, gap in enumerate((-28.0, -14.0, 15.0, 27.0, 39.0, 51.0)):
        for lane in range(3):
            if lane == 1 and gap == -14.0:
                gap = -17.0
            s, speed = _EGO_START_M + gap + rng.uniform(-2.5, 2.5) + 1.461, rng.uniform(6.0, 11.0)
            add(straight[lane], s, rng.normal(0.0, 0.2), speed, bus if (i + lane) % 7 == 6 else car, AgentType.VEHICLE)
    for i in range(12):
        s = -60.0 + 11.0 * (i // 3) + rng.uniform(-2.0, 2.0)
        add(ways[2, 0, i % 3], s, 0.0, rng.uniform(7.0, 12.0), car, AgentType.VEHICLE)
    for i in range(12):
        arm, lane = (1, 3)[i % 2], (i // 2) % 3
        add(ways[arm, 4 - arm, lane], -4.0 - 7.0 * (i // 6), 0.0, 0.0, car, AgentType.VEHICLE)
    for i in range(6):
        add(
            ways[exit_arm, 0, next(iter(junction.curves[exit_arm, 0]))], 5.0 + 9.0 * i, 0.0, 8.0, car, AgentType.VEHICLE
        )
    for i in range(6):
        edge = _SECTION.right_edge + rng.uniform(-2.0, 0.5)
        way = junction.arms[i % 4].reverse()
        add(way, -25.0 + 4.0 * i, edge - 1.0, rng.uniform(0.0, 1.6), person, AgentType.PEDESTRIAN)
    for i in range(3):
        add(straight[2], _EGO_START_M + 6.0 + 13.0 * i, -2.0, rng.uniform(3.0, 6.0), bicycle, AgentType.BICYCLE)
    for i in range(3):
        add(straight[2], _EGO_START_M + 14.0 + 3.0 * i, -1.7 + 0.2 * i, 0.0, cone, AgentType.STATIC)
    motion, sizes, kinds = zip(*rows, strict=True)
    pose, velocity = (np.stack(part) for part in zip(*motion, strict=True))
    return _Tracks(pose, velocity, np.array(sizes), np.array([int(kind) for kind in kinds], dtype=np.int8))


def _plans(route: Path, s: float, ego: Array, speed: float, count: int, rng: np.random.Generator) -> Array:
    """Plans ``[count, 8, 3]`` along the route at 0.2 … 1.4 times the speed; every eighth drifts up to 12 m sideways."""
    factor = rng.uniform(0.2, 1.4, (count, 1))
    drift = np.where(np.arange(count) % 8 == 7, 12.0, 2.5)[:, None] * rng.uniform(-1.0, 1.0, (count, 1))
    travel = speed * (_POSE_TIMES_S + (factor - 1.0) * _POSE_TIMES_S**2 / 4.0)
    poses = route.pose(s + travel, drift * smooth_step(_POSE_TIMES_S / 4.0)) + rng.normal(0.0, 0.04, (count, 8, 3)) * (
        1.0,
        1.0,
        0.2,
    )
    return to_ego_frame(poses, ego)


def _place(points: Array, angle: float) -> Array:
    """Points or poses ``[..., 2 or 3]`` of the junction's frame in the world."""
    cos, sin = np.cos(angle), np.sin(angle)
    turned = np.stack([cos * points[..., 0] - sin * points[..., 1], sin * points[..., 0] + cos * points[..., 1]], -1)
    return np.concatenate([turned + _UTM, points[..., 2:] + angle], axis=-1)


def real_size_scene(seed: int, plans: int = 64) -> RealSizeScene:
    """A scene of its own for every seed: straight on, left or right; lights on the route turn red in odd ones."""
    rng = np.random.default_rng(seed)
    exit_arm = (2, 2, 1, 3)[seed % 4]
    angles = [0.5 * np.pi * a + rng.uniform(-0.12, 0.12) for a in range(4)]
    junction = crossroads(angles, _SECTION, corner=9.0, limit=13.9, route=exit_arm, signals=True)
    route = junction.way(0, exit_arm, 1)
    speed, angle = rng.uniform(8.0, 11.0), float(rng.uniform(-np.pi, np.pi))
    past_s = _EGO_START_M + speed * np.array([-1.5, -1.0, -0.5, 0.0])
    past = np.zeros((4, 11))
    past[:, :3], past[:, 3] = route.pose(past_s, 0.1), speed
    own = [_plans(route, s, ego[:3], speed, plans, rng) for s, ego in zip(past_s[2:], past[2:], strict=True)]
    tracks, road = _tracks(junction, exit_arm, rng), _map(junction, exit_arm)
    past[:, :3] = _place(past[:, :3], angle)
    reference = _reference(road, tracks, past, _route_line(route, angle), angle, seed)
    v1, v2 = (plan_pdm_closed(reference, version=version).reference for version in ("v1", "v2"))
    return RealSizeScene(replace(reference, pdm_reference_v1=v1, pdm_reference_v2=v2), own[1], own[0])


def _route_line(route: Path, angle: float) -> Array:
    """Centreline ``[250, 3]`` from 25 m behind the ego."""
    return _place(route.pose(_EGO_START_M - 25.0 + np.arange(250.0)), angle)


def _reference(road: RoadMap, tracks: _Tracks, past: Array, line: Array, angle: float, seed: int) -> SceneReference:
    """All of it in the world frame; the human goes on at constant speed along the centreline."""
    layers = [MapLayer.LANE_CONNECTOR if lane.connector else MapLayer.LANE for lane in road.lanes]
    layers += [layer for layer, _ in road.areas]
    map_xy, map_offsets = _pack([lane.polygon for lane in road.lanes] + [ring for _, ring in road.areas])
    red = [lane for lane in road.lanes if lane.connector and (lane.on_route or lane.signal == 1)]
    red_xy, red_offsets = _pack([lane.polygon for lane in red])
    active = np.ones((len(red), _STEPS), dtype=bool)
    own = np.array([lane.on_route for lane in red])
    active[own] = np.arange(_STEPS) >= (20 if seed % 2 else _STEPS)
    distance = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(line[:, :2], axis=0).T))])
    at = 25.0 + past[-1, 3] * _POSE_TIMES_S
    human = np.stack([np.interp(at, distance, np.unwrap(c) if i == 2 else c) for i, c in enumerate(line.T)], axis=-1)
    cos, sin = np.cos(angle), np.sin(angle)
    t0_us = 1_600_000_000_123_456 + 1_000_000 * seed
    return SceneReference(
        t0_us=t0_us,
        ego_init=past[-1],
        prev_t0_us=t0_us - 500_000,
        prev_ego_init=past[-2],
        past_times_us=t0_us - 500_000 * np.arange(3, -1, -1),
        past_states=past,
        human_poses=to_ego_frame(human, past[-1, :3]),
        centerline=line,
        speed_limit=13.9,
        map_xy=_place(map_xy, angle),
        map_offsets=map_offsets,
        map_layer=np.array(layers, dtype=np.int8),
        map_on_route=np.array([lane.on_route for lane in road.lanes] + [False] * len(road.areas)),
        red_xy=_place(red_xy, angle),
        red_offsets=red_offsets,
        red_on_route=own,
        red_active=active,
        agent_pose=_place(tracks.pose, angle),
        agent_velocity=tracks.velocity @ np.array([[cos, sin], [-sin, cos]]),
        agent_valid=np.ones(tracks.pose.shape[:2], dtype=bool),
        agent_size=tracks.size,
        agent_type=tracks.kind,
        pdm_reference_v1=np.zeros((0, 3)),
        pdm_reference_v2=np.zeros((0, 3)),
    )
