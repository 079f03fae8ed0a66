"""PDMS and EPDMS written plainly with NumPy and shapely, vectorised over all plans of a scene: what the kernels are
timed against and checked with.

Nothing is left out and nothing is slowed down: geometry goes through STR-trees, of which those of the map and of the
agents are built once per scene; filters are matrix products; only the 40 simulated steps and the 41 steps of the lane
counter are loops.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray
from reference_comfort import comfort_v1, comfort_v2, frames
from reference_simulation import DT, interpolate_numpy, simulate_numpy

from rewards.kernels.boxes import EGO_HALF_LENGTH_M, EGO_HALF_WIDTH_M, REAR_AXLE_TO_CENTER_M
from rewards.kernels.collisions import AgentBoxes
from rewards.kernels.polygons import DRIVABLE, INTERSECTION, LANE, ROUTE_LANE
from rewards.prepare import PreparedScene, prepare_scene
from rewards.prepare_epdms import PreparedEpdms, prepare_epdms
from rlhf_drive.scenes import SceneReference, to_ego_frame

__all__ = [
    "PlainScene",
    "collisions",
    "direction",
    "ego_areas",
    "lane_keeping",
    "lights",
    "plain_epdms",
    "plain_pdms",
    "progress",
    "time_to_collision",
]

Array = NDArray[Any]


@dataclass(frozen=True)
class PlainScene:
    """A scene with its shapely geometry."""

    v1: PreparedScene
    """Numbers of v1.1: ego, reference progress."""
    v2: PreparedEpdms
    """Numbers of v2.2: ego, history, human, reference progress."""
    polygons: Array
    """``[P]`` map polygons."""
    flags: Array
    """``[P]`` what they are."""
    agents: dict[str, tuple[AgentBoxes, Array, list[Any]]]
    """Per version: the agents, their polygons ``[A, T]``, and a tree for every step."""
    line: Any
    """Centreline."""
    lights: Array
    """``[R]`` red connectors on the route."""

    @staticmethod
    def of(reference: SceneReference) -> PlainScene:
        v1, v2 = prepare_scene(reference), prepare_epdms(reference)
        flat = np.concatenate([reference.map_xy, np.zeros((len(reference.map_xy), 1))], axis=1)
        xy = to_ego_frame(flat, reference.ego_init[:3])[:, :2]
        polygons = np.array([shapely.Polygon(ring) for ring in np.split(xy, reference.map_offsets[1:-1])])
        lights = [shapely.Polygon(ring) for ring in np.split(v2.lights.xy, v2.lights.offsets[1:-1]) if len(ring)]
        agents = {"v1": _agent_trees(v1.agents), "v2": _agent_trees(v2.agents)}
        line = shapely.LineString(v1.road.centerline)
        return PlainScene(v1, v2, polygons, v1.road.polygons.flags, agents, line, np.array(lights, dtype=object))


def _boxes(x: Array, y: Array, cos: Array, sin: Array, half_length: Any, half_width: Any) -> Array:
    """Shapely boxes, any batch shape."""
    signs = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]], dtype=float)
    along, across = signs[:, 0] * np.asarray(half_length)[..., None], signs[:, 1] * np.asarray(half_width)[..., None]
    corner_x = x[..., None] + along * cos[..., None] - across * sin[..., None]
    corner_y = y[..., None] + along * sin[..., None] + across * cos[..., None]
    return np.asarray(shapely.polygons(np.stack([corner_x, corner_y], axis=-1)))


def _agent_trees(agents: AgentBoxes) -> tuple[AgentBoxes, Array, list[Any]]:
    pose, half = agents.pose, agents.half_size[:, None, :]
    shapes = _boxes(pose[..., 0], pose[..., 1], pose[..., 2], pose[..., 3], half[..., 0], half[..., 1])
    return (
        agents,
        shapes,
        [shapely.STRtree(np.where(v, s, None)) for s, v in zip(shapes.T, agents.valid.T, strict=True)],
    )


@dataclass(frozen=True)
class _Ego:
    """Boxes and areas of all plans and steps."""

    states: Array
    centre: Array
    cos: Array
    sin: Array
    speed: Array
    multiple: Array
    off_road: Array
    oncoming: Array
    centre_in_intersection: Array
    rear_in_intersection: Array


def ego_areas(scene: PlainScene, states: Array) -> _Ego:
    """Where every plan is at every step, ``[B, 41]`` each: prepared polygons queried against a tree of all points."""
    cos, sin = np.cos(states[..., 2]), np.sin(states[..., 2])
    along = REAR_AXLE_TO_CENTER_M + EGO_HALF_LENGTH_M * np.array([1, -1, -1, 1, 0])
    along, across = np.append(along, 0.0), EGO_HALF_WIDTH_M * np.array([1, 1, -1, -1, 0, 0])
    x = states[..., :1] + along * cos[..., None] - across * sin[..., None]
    y = states[..., 1:2] + along * sin[..., None] + across * cos[..., None]
    tree = shapely.STRtree(shapely.points(x.ravel(), y.ravel()))
    polygon, point = tree.query(scene.polygons, predicate="contains_properly")
    inside = np.zeros((x.size, len(scene.polygons)), dtype=bool)
    inside[point, polygon] = True
    inside = inside.reshape(*x.shape, -1)
    lane, drivable = scene.flags & LANE != 0, scene.flags & DRIVABLE != 0
    corners, centre, rear = inside[:, :, :4], inside[:, :, 4], inside[:, :, 5]
    lanes = corners[..., lane]
    crossing = scene.flags & INTERSECTION != 0
    return _Ego(
        states,
        np.stack([x[..., 4], y[..., 4]], axis=-1),
        cos,
        sin,
        np.hypot(states[..., 3], states[..., 4]),
        (lanes.any(axis=2).sum(axis=-1) > 1) & ~lanes.all(axis=2).any(axis=-1),
        ~corners[..., drivable].any(axis=-1).all(axis=-1),
        ~centre[..., scene.flags & ROUTE_LANE != 0].any(axis=-1),
        centre[..., crossing].any(axis=-1),
        rear[..., crossing].any(axis=-1),
    )


def _first(plan: Array, agent: Array, order: Array, agents: int) -> Array:
    """Positions of the first contact of every pair of plan and agent."""
    rank = np.lexsort((order, plan * agents + agent))
    return np.asarray(rank[np.unique((plan * agents + agent)[rank], return_index=True)[1]])


def _angles(ego: _Ego, b: Array, k: Array, target: Array) -> tuple[Array, Array]:
    """Whether targets ``[n, 2]`` are ahead, and behind, of the rear axle."""
    d = target - ego.states[b, k, :2]
    along = (d[:, 0] * ego.cos[b, k] + d[:, 1] * ego.sin[b, k]) / np.hypot(*d.T)
    return along > np.cos(np.radians(30.0)), along < np.cos(np.radians(150.0))


def collisions(scene: PlainScene, ego: _Ego, version: str) -> Array:
    """NC ``[B]``."""
    agents, shapes, trees = scene.agents[version]
    ego_boxes = _boxes(ego.centre[..., 0], ego.centre[..., 1], ego.cos, ego.sin, EGO_HALF_LENGTH_M, EGO_HALF_WIDTH_M)
    found = [trees[k].query(ego_boxes[:, k], predicate="intersects") for k in range(41)]
    b, a = (np.concatenate(part) for part in zip(*found, strict=True))
    k = np.repeat(np.arange(41), [f.shape[1] for f in found])
    pick = _first(b, a, k, len(agents.pose))
    b, a, k = b[pick], a[pick], k[pick]
    tip = ego.centre[b, k] + EGO_HALF_LENGTH_M * np.stack([ego.cos[b, k], ego.sin[b, k]], axis=-1)
    side = EGO_HALF_WIDTH_M * np.stack([-ego.sin[b, k], ego.cos[b, k]], axis=-1)
    front = shapely.intersects(shapely.linestrings(np.stack([tip + side, tip - side], axis=1)), shapes[a, k])
    behind = _angles(ego, b, k, agents.pose[a, k, :2])[1]
    parked = agents.stopped[a] | ~agents.is_agent[a]
    lateral = ego.multiple[b, k] | ego.off_road[b, k]
    fault = (ego.speed[b, k] > 0.05) & (parked | (~behind & (front | lateral)))
    nc = np.ones(len(ego.states))
    np.minimum.at(nc, b[fault], np.where(agents.is_agent[a[fault]], 0.0, 0.5))
    return nc


def time_to_collision(scene: PlainScene, ego: _Ego, version: str) -> Array:
    """TTC ``[B]``."""
    agents, _, trees = scene.agents[version]
    steps = 41 if version == "v1" else 32
    rows = []
    for ahead in (0, 3, 6, 9):
        shift = (ahead * DT * ego.speed)[:, :steps]
        cos, sin = ego.cos[:, :steps], ego.sin[:, :steps]
        x, y = ego.centre[:, :steps, 0] + shift * cos, ego.centre[:, :steps, 1] + shift * sin
        moved = _boxes(x, y, cos, sin, EGO_HALF_LENGTH_M, EGO_HALF_WIDTH_M)
        for k in range(min(steps, len(trees) - ahead)):
            b, a = trees[k + ahead].query(moved[:, k], predicate="intersects")
            rows.append(np.stack([b, a, np.full(len(b), k), np.full(len(b), ahead)]))
    b, a, k, ahead_steps = np.concatenate(rows, axis=1)
    moving = ego.speed[b, k] >= 5e-3
    b, a, k, ahead_steps = b[moving], a[moving], k[moving], ahead_steps[moving]
    pick = _first(b, a, 10 * k + ahead_steps, len(agents.pose))
    b, a, k, ahead_steps = b[pick], a[pick], k[pick], ahead_steps[pick]
    ahead_of, behind = _angles(ego, b, k, agents.pose[a, k + ahead_steps, :2])
    exposed = ego.multiple[b, k] | ego.off_road[b, k] | ego.rear_in_intersection[b, k]
    ttc = np.ones(len(ego.states))
    ttc[b[ahead_of | (exposed & ~behind)]] = 0.0
    return ttc


def direction(ego: _Ego, version: str) -> Array:
    """DDC ``[B]``."""
    counted = ego.oncoming[:, 1:] & ~(ego.centre_in_intersection[:, 1:] & (version == "v2"))
    moved = np.hypot(*np.moveaxis(np.diff(ego.centre, axis=1), -1, 0)) * counted
    padded = np.concatenate([np.zeros((len(moved), 10)), moved], axis=1)
    most = np.lib.stride_tricks.sliding_window_view(padded, 11, axis=1).sum(axis=-1).max(axis=1)
    return np.where(most < 2.0, 1.0, np.where(most < 6.0, 0.5, 0.0))


def lights(scene: PlainScene, ego: _Ego) -> Array:
    """TLC ``[B]``."""
    ego_boxes = _boxes(ego.centre[..., 0], ego.centre[..., 1], ego.cos, ego.sin, EGO_HALF_LENGTH_M, EGO_HALF_WIDTH_M)
    crossed = np.zeros(len(ego.states), dtype=bool)
    for shape, active in zip(scene.lights, scene.v2.lights.active, strict=True):
        shapely.prepare(shape)
        crossed |= shapely.intersects(shape, ego_boxes[:, active[:41]]).any(axis=1)
    return np.where(crossed, 0.0, 1.0)


def lane_keeping(scene: PlainScene, ego: _Ego) -> Array:
    """LK ``[B]``."""
    shapely.prepare(scene.line)
    away = shapely.distance(shapely.points(ego.centre), scene.line) > 0.5
    counter, kept = np.zeros(len(away), dtype=int), np.ones(len(away))
    for k in range(41):
        counted = np.where(away[:, k], counter + 1, 0)
        counter = np.where(ego.centre_in_intersection[:, k], counter, counted)
        kept[counter >= 20] = 0.0
    return kept


def progress(scene: PlainScene, ego: _Ego) -> Array:
    """Metres along the centreline ``[B]``."""
    at = shapely.line_locate_point(scene.line, shapely.points(ego.centre[:, [0, -1]]))
    return np.maximum(at[:, 1] - at[:, 0], 0.0)


def plain_pdms(scene: PlainScene, plans: Array) -> Array:
    """PDMS ``[B]``."""
    states = simulate_numpy(scene.v1.ego_init, interpolate_numpy(scene.v1.ego_init, plans))
    ego = ego_areas(scene, states)
    nc, ttc, dac = collisions(scene, ego, "v1"), time_to_collision(scene, ego, "v1"), ~ego.off_road.any(axis=1)
    direction(ego, "v1")  # Reported by v1.1, though its weight is 0.
    own, most = (
        progress(scene, ego) * nc * dac,
        scene.v1.reference.progress_m * scene.v1.reference.nc * scene.v1.reference.dac,
    )
    most = np.maximum(own, most)
    ep = np.where(most > 5.0, own / np.maximum(most, 5.0), nc * dac != 0.0)
    return np.asarray(nc * dac * (5.0 * ep + 5.0 * ttc + 2.0 * comfort_v1(states)) / 12.0)


def plain_epdms(scene: PlainScene, plans: Array, previous: Array | None = None) -> Array:
    """EPDMS ``[B]`` with the human filter, without EC where there are no previous plans."""
    states = simulate_numpy(scene.v2.ego_init, interpolate_numpy(scene.v2.ego_init, plans))
    ego = ego_areas(scene, states)
    columns = {"nc": collisions(scene, ego, "v2"), "dac": 1.0 - ego.off_road.any(axis=1), "ddc": direction(ego, "v2")}
    columns |= {"tlc": lights(scene, ego)}
    metres = progress(scene, ego)
    most = np.maximum(metres * np.prod(list(columns.values()), axis=0), scene.v2.reference_progress_m)
    ep = np.where(most > 5.0, np.clip(metres / np.maximum(most, 5.0), 0.0, 1.0), 1.0)
    columns |= {"ttc": time_to_collision(scene, ego, "v2"), "lk": lane_keeping(scene, ego)}
    columns = {name: np.ones_like(c) if getattr(scene.v2.human, name) == 0.0 else c for name, c in columns.items()}
    weighted = 5.0 * ep + 5.0 * columns["ttc"] + 2.0 * columns["lk"] + 2.0 * comfort_v2(scene.v2.history, states)
    product = columns["nc"] * columns["dac"] * columns["ddc"] * columns["tlc"]
    if previous is None:
        return np.asarray(product * weighted / 14.0)
    assert scene.v2.previous is not None
    ec = frames(scene.v2.previous.ego_init, states, previous)
    return np.asarray(product * (weighted + 2.0 * ec) / 16.0)
