"""A scene made ready for scoring many plans: t=0 ego frame, spatial index, agent boxes, the reference's progress."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rewards.kernels.collisions import AgentBoxes, RedLights
from rewards.kernels.polygons import DRIVABLE, INTERSECTION, LANE, ROUTE_LANE, build_polygon_index
from rewards.kernels.progress import arclengths
from rewards.kernels.score import V1_RULES, Road, score_states
from rewards.kernels.simulate import NUM_STATES, simulate_references
from rewards.kernels.windows import agent_windows
from rlhf_drive.errors import DataError
from rlhf_drive.scenes import AgentType, MapLayer, SceneReference, to_ego_frame

__all__ = [
    "PreparedScene",
    "ReferencePlan",
    "prepare_agents",
    "prepare_ego",
    "prepare_lights",
    "prepare_road",
    "prepare_scene",
]

_STOPPED_MPS = 0.05
_DRIVABLE_LAYERS = (MapLayer.ROADBLOCK, MapLayer.INTERSECTION, MapLayer.DRIVABLE_AREA, MapLayer.CARPARK_AREA)
_LANE_LAYERS = (MapLayer.LANE, MapLayer.LANE_CONNECTOR)


@dataclass(frozen=True)
class ReferencePlan:
    """What PDM-Closed achieves in the scene: the other half of the pair that ego progress compares."""

    progress_m: float
    """Metres along the centreline in 4 s."""
    nc: float
    """Its no-at-fault-collision score."""
    dac: float
    """Its drivable area compliance."""


@dataclass(frozen=True)
class PreparedScene:
    """All that scoring needs of one scene, float64, in the t=0 ego frame (rear axle, x forward, y left)."""

    road: Road
    """Map polygons and centreline."""
    agents: AgentBoxes
    """Logged road users over 51 steps."""
    ego_init: NDArray[np.float64]
    """``[11]`` ego state at t=0; its pose is 0, 0, 0."""
    origin: NDArray[np.float64]
    """``[3]`` world pose of the frame."""
    t0_us: int
    """Time of t=0 (microseconds)."""
    reference: ReferencePlan
    """PDM-Closed of v1.1, simulated."""


def _points_in_frame(xy: NDArray[np.float64], origin: NDArray[np.float64]) -> NDArray[np.float64]:
    padded = np.concatenate([xy, np.zeros((len(xy), 1))], axis=1)
    return np.ascontiguousarray(to_ego_frame(padded, origin)[:, :2])


def prepare_ego(reference: SceneReference) -> NDArray[np.float64]:
    """``[11]`` ego state at t=0 in its own frame: the pose becomes zero, the rest is in the body frame already."""
    state = reference.ego_init.copy()
    state[:3] = 0.0
    return state


def prepare_road(reference: SceneReference) -> Road:
    """Map polygons with their roles and the centreline, in the t=0 ego frame.

    Raises:
        DataError: All points of the centreline are in one place.
    """
    origin = reference.ego_init[:3]
    lane = np.isin(reference.map_layer, _LANE_LAYERS)
    flags = (
        LANE * lane
        + DRIVABLE * np.isin(reference.map_layer, _DRIVABLE_LAYERS)
        + ROUTE_LANE * (lane & reference.map_on_route)
        + INTERSECTION * (reference.map_layer == MapLayer.INTERSECTION)
    ).astype(np.uint8)
    polygons = build_polygon_index(_points_in_frame(reference.map_xy, origin), reference.map_offsets, flags)
    if (reference.centerline[:, :2] == reference.centerline[0, :2]).all():
        raise DataError(
            f"SceneReference.centerline has {len(reference.centerline)} points in one place; progress needs a line."
        )
    line = _points_in_frame(reference.centerline[:, :2], origin)
    return Road(polygons, line, arclengths(line))


def prepare_agents(
    pose_AT3: NDArray[np.float64],
    velocity_AT2: NDArray[np.float64],
    valid_AT: NDArray[np.bool_],
    size_A2: NDArray[np.float64],
    type_A: NDArray[np.int8],
    origin: NDArray[np.float64],
) -> AgentBoxes:
    """Moving boxes for the collision rules.

    Args:
        pose_AT3: ``[A, T, 3]`` box-centre poses in the world frame of `origin`; arbitrary where not valid.
        velocity_AT2: ``[A, T, 2]`` velocity (m/s); only the first sighting's speed matters.
        valid_AT: ``[A, T]`` presence.
        size_A2: ``[A, 2]`` length, width (m).
        type_A: ``[A]`` `AgentType`.
        origin: ``[3]`` world pose of the frame the boxes are wanted in; zeros if they are in it already.
    """
    local = to_ego_frame(pose_AT3, origin)
    pose = np.stack([local[..., 0], local[..., 1], np.cos(local[..., 2]), np.sin(local[..., 2])], axis=-1)
    half_size = np.ascontiguousarray(size_A2, dtype=np.float64) / 2.0
    first = valid_AT.argmax(axis=1)
    speed = np.hypot(*velocity_AT2[np.arange(len(first)), first].T)
    pose, valid = np.ascontiguousarray(pose), np.ascontiguousarray(valid_AT, dtype=np.bool_)
    windows = agent_windows(pose, half_size, valid)
    return AgentBoxes(
        pose=pose,
        half_size=half_size,
        valid=valid,
        is_agent=np.asarray(type_A) != AgentType.STATIC,
        stopped=speed <= _STOPPED_MPS,
        bounds=np.concatenate([windows[..., :2].min(axis=1), windows[..., 2:].max(axis=1)], axis=1),
        windows=windows,
    )


def prepare_lights(reference: SceneReference) -> RedLights:
    """Red connectors on the route, step by step; those off the route are dropped."""
    kept = np.flatnonzero(reference.red_on_route)
    spans = [slice(reference.red_offsets[r], reference.red_offsets[r + 1]) for r in kept]
    xy = np.concatenate([np.zeros((0, 2)), *(reference.red_xy[span] for span in spans)])
    lengths = np.array([0, *(span.stop - span.start for span in spans)], dtype=np.int64)
    active = np.ascontiguousarray(reference.red_active[kept])
    return RedLights(_points_in_frame(xy, reference.ego_init[:3]), np.cumsum(lengths), active)


def prepare_scene(reference: SceneReference) -> PreparedScene:
    """Everything of a scene that does not depend on the plan.

    Raises:
        DataError: `pdm_reference_v1` has not been computed yet, or its simulation is not finite; or as
            :func:`prepare_road`.
    """
    if reference.pdm_reference_v1.shape != (NUM_STATES, 3):
        raise DataError(
            f"SceneReference.pdm_reference_v1 must be [{NUM_STATES}, 3] to normalise ego progress; got shape "
            f"{list(reference.pdm_reference_v1.shape)}. Compute it with rewards.pdm_closed.attach_references, "
            "or, for a NAVSIM metric cache, import the cache of v1.1."
        )
    origin = reference.ego_init[:3].copy()
    road = prepare_road(reference)
    agents = prepare_agents(
        reference.agent_pose,
        reference.agent_velocity,
        reference.agent_valid,
        reference.agent_size,
        reference.agent_type,
        origin,
    )
    ego_init = prepare_ego(reference)
    states = simulate_references(ego_init, to_ego_frame(reference.pdm_reference_v1, origin)[None])
    metrics = score_states(road, agents, states, rules=V1_RULES)
    if not metrics.valid[0]:
        raise DataError("SceneReference.pdm_reference_v1 leads to simulated states that are not finite.")
    plan = ReferencePlan(float(metrics.progress_m[0]), float(metrics.nc[0]), float(metrics.dac[0]))
    return PreparedScene(road, agents, ego_init, origin, reference.t0_us, plan)
