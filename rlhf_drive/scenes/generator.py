"""Procedural driving scenes: twelve kinds of situation, simulated in closed loop with a human-like expert.

Scene i is drawn from the random stream (seed, i) and nothing else. A drawing in which users overlap or the expert
leaves the road or brakes beyond comfort is drawn again from the next sub-stream, up to `ATTEMPTS` times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from rlhf_drive.errors import DataError, UnknownNameError, did_you_mean
from rlhf_drive.scenes.geometry import Array, Path, box_corners, boxes_overlap, points_in_polygon
from rlhf_drive.scenes.model import REFERENCE_STEPS, MapLayer, Observation, Scene, SceneReference
from rlhf_drive.scenes.observe import Past, observe
from rlhf_drive.scenes.situations_following import curve, cut_in, lead_braking, stop_and_go
from rlhf_drive.scenes.situations_junction import intersection_turn, red_light, roundabout_entry
from rlhf_drive.scenes.situations_merging import merge
from rlhf_drive.scenes.situations_passing import (
    oncoming_narrow,
    parked_cars,
    pedestrian_crossing,
    static_obstacle,
)
from rlhf_drive.scenes.traffic import Recording, simulate
from rlhf_drive.scenes.trajectories import NUM_POSES, to_ego_frame, wrap_angle
from rlhf_drive.scenes.world import EGO_SIZE, NOW, World

__all__ = ["SITUATIONS", "SITUATION_KINDS", "generate_scenes", "observation_of"]

SITUATIONS: Mapping[str, Callable[[np.random.Generator], World]] = MappingProxyType(
    {
        "curve": curve,
        "lead_braking": lead_braking,
        "cut_in": cut_in,
        "oncoming_narrow": oncoming_narrow,
        "pedestrian_crossing": pedestrian_crossing,
        "parked_cars": parked_cars,
        "static_obstacle": static_obstacle,
        "intersection_turn": intersection_turn,
        "red_light": red_light,
        "merge": merge,
        "roundabout": roundabout_entry,
        "stop_and_go": stop_and_go,
    }
)
"""Kind -> drawing of its world."""
SITUATION_KINDS: tuple[str, ...] = tuple(SITUATIONS)
"""Kinds the generator can draw, in their order of turn."""
ATTEMPTS = 12
PAST = (0, 5, 10, 15)
"""Steps at -1.5, -1, -0.5 and 0 s."""
CENTERLINE_AHEAD_M = 450.0
DRIVABLE = (MapLayer.ROADBLOCK, MapLayer.INTERSECTION, MapLayer.CARPARK_AREA)


def generate_scenes(count: int, *, seed: int, kinds: Sequence[str] | None = None, start: int = 0) -> Iterator[Scene]:
    """`count` scenes, kinds taking turns (scene i is of kind ``kinds[i % len(kinds)]``).

    Args:
        count: Number of scenes.
        seed: Scene i depends on (seed, i) and its kind only, so a longer run begins with the shorter one's scenes.
        kinds: Subset of :data:`SITUATION_KINDS`; None or empty for all.
        start: Index of the first scene, so that workers can share the work.

    Yields:
        Scenes without PDM-Closed references (`pdm_reference_*` are ``[0, 3]``) and `challenging` False: both are the
        scorer's to fill in.

    Raises:
        UnknownNameError: A kind does not exist.

    Example:
        >>> scene = next(generate_scenes(1, seed=0))
        >>> scene.kind
        'curve'
    """
    chosen = tuple(kinds) if kinds else SITUATION_KINDS
    for kind in chosen:
        if kind not in SITUATIONS:
            raise UnknownNameError(f"Unknown situation kind {kind!r}. {did_you_mean(kind, SITUATION_KINDS)}")
    if count < 0:
        raise DataError(f"count must not be negative; got {count}. Ask for 0 scenes or more.")
    for i in range(start, start + count):
        yield _scene(chosen[i % len(chosen)], seed, i)


def _scene(kind: str, seed: int, i: int) -> Scene:
    """Draw, simulate and check one scene; the last drawing stands if none of them passes."""
    for attempt in range(ATTEMPTS):
        rng = np.random.default_rng([seed, i, attempt])
        world = SITUATIONS[kind](rng)
        recording = simulate(world)
        if _plausible(world, recording):
            break
    name = f"{kind}-{seed}-{i:06d}"
    placed = _Placement(float(rng.uniform(-np.pi, np.pi)), rng.uniform(-4000.0, 4000.0, 2))
    t0_us = int(rng.integers(1_500_000_000, 1_700_000_000)) * 1_000_000 + int(rng.integers(0, 1_000_000))
    reference = _reference(world, recording, placed, t0_us)
    observation = observation_of(world, recording)
    return Scene(name, kind, name, False, observation, reference)


def observation_of(world: World, recording: Recording) -> Observation:
    """What the ego sees at t=0; of the recording, only the steps `PAST` are read."""
    rows = list(PAST)
    kinds = np.array([int(a.type) for a in world.actors], dtype=np.int8)
    past = Past(recording.ego[rows], recording.pose[rows, 1:], recording.velocity[rows, 1:], _sizes(world)[1:], kinds)
    return observe(world.map, past, world.red[:, NOW], world.paths[0])


@dataclass(frozen=True)
class _Placement:
    """Where a scene lies in the world: the map's frame turned by `angle`, then moved by `offset`."""

    angle: float
    offset: Array

    def points(self, xy: Array) -> Array:
        return self.vectors(xy) + self.offset

    def vectors(self, xy: Array) -> Array:
        cos, sin = np.cos(self.angle), np.sin(self.angle)
        return np.stack([cos * xy[..., 0] - sin * xy[..., 1], sin * xy[..., 0] + cos * xy[..., 1]], axis=-1)

    def poses(self, pose: Array) -> Array:
        return np.concatenate([self.points(pose[..., :2]), wrap_angle(pose[..., 2:3] + self.angle)], axis=-1)

    def states(self, state: Array) -> Array:
        return np.concatenate([self.poses(state[..., :3]), state[..., 3:]], axis=-1)


def _sizes(world: World) -> Array:
    """``[n, 2]`` of everybody, the ego first."""
    return np.array([EGO_SIZE] + [(a.length, a.width) for a in world.actors])


def _plausible(world: World, recording: Recording) -> bool:
    """No overlaps (pedestrians may brush past one another); the ego stays on the road and brakes within comfort."""
    size, pose = _sizes(world), recording.pose
    if bool((recording.ego[:, 5] < -4.3).any()):
        return False
    grown = size[1:] + 0.3
    if bool(boxes_overlap(pose[:, :1], size[:1], pose[:, 1:], grown).any()):
        return False
    first, second = np.triu_indices(len(size), 1)
    bulky = (first > 0) & (size[first, 0] + size[second, 0] > 2.5)
    first, second = first[bulky], second[bulky]
    if bool(boxes_overlap(pose[::10, first], size[first], pose[::10, second], size[second]).any()):
        return False
    corners = box_corners(pose[NOW : NOW + 41 : 2, 0], size[0] + 0.2).reshape(-1, 2)
    return bool(_drivable(world, corners).all())


def _drivable(world: World, points: Array) -> NDArray[np.bool_]:
    """Whether each point lies in some drivable polygon."""
    inside = np.zeros(len(points), dtype=bool)
    low, high = points.min(axis=0), points.max(axis=0)
    for layer, ring in world.map.areas:
        if layer in DRIVABLE and (ring.max(axis=0) >= low).all() and (ring.min(axis=0) <= high).all():
            inside |= points_in_polygon(points, ring)
    return inside


def _centerline(route: Path, ego: Array) -> Array:
    """``[C, 3]`` centre of the route, 25 m behind the ego to 450 m ahead; straight beyond the map."""
    s, _ = route.nearest(ego[:2])
    return route.pose(np.arange(max(s - 25.0, route.start), s + CENTERLINE_AHEAD_M, 1.0))


def _pack(rings: list[Array]) -> tuple[Array, NDArray[np.int64]]:
    """Vertices and offsets of ragged rings."""
    offsets = np.concatenate([[0], np.cumsum([len(r) for r in rings])]).astype(np.int64)
    return (np.concatenate(rings) if rings else np.zeros((0, 2))), offsets


def _reference(world: World, recording: Recording, placed: _Placement, t0_us: int) -> SceneReference:
    """The privileged part, placed in the world."""
    lanes, areas = world.map.lanes, world.map.areas
    kinds = [MapLayer.LANE_CONNECTOR if lane.connector else MapLayer.LANE for lane in lanes]
    map_xy, map_offsets = _pack([lane.polygon for lane in lanes] + [ring for _, ring in areas])
    lit = [lane for lane in lanes if lane.signal >= 0 and world.red[lane.signal, NOW:].any()]
    red_xy, red_offsets = _pack([lane.polygon for lane in lit])
    ego = placed.states(recording.ego)
    future = [NOW + 5 * (k + 1) for k in range(NUM_POSES)]
    now = slice(NOW, NOW + REFERENCE_STEPS)
    agent_pose = placed.poses(recording.pose[now, 1:]).transpose(1, 0, 2)
    return SceneReference(
        t0_us=t0_us,
        ego_init=ego[NOW],
        prev_t0_us=t0_us - 500_000,
        prev_ego_init=ego[NOW - 5],
        past_times_us=np.array([t0_us - 500_000 * k for k in (3, 2, 1, 0)]),
        past_states=ego[list(PAST)],
        human_poses=to_ego_frame(ego[future, :3], ego[NOW, :3]),
        centerline=placed.poses(_centerline(world.paths[0], recording.ego[NOW])),
        speed_limit=world.limit,
        map_xy=placed.points(map_xy),
        map_offsets=map_offsets,
        map_layer=np.array([*kinds, *(layer for layer, _ in areas)], dtype=np.int8),
        map_on_route=np.array([lane.on_route for lane in lanes] + [False] * len(areas)),
        red_xy=placed.points(red_xy),
        red_offsets=red_offsets,
        red_on_route=np.array([lane.on_route for lane in lit], dtype=bool),
        red_active=np.array([world.red[lane.signal, now] for lane in lit]).reshape(-1, REFERENCE_STEPS),
        agent_pose=agent_pose,
        agent_velocity=placed.vectors(recording.velocity[now, 1:]).transpose(1, 0, 2),
        agent_valid=np.ones(agent_pose.shape[:2], dtype=bool),
        agent_size=_sizes(world)[1:],
        agent_type=np.array([int(a.type) for a in world.actors], dtype=np.int8),
        pdm_reference_v1=np.zeros((0, 3)),
        pdm_reference_v2=np.zeros((0, 3)),
    )
