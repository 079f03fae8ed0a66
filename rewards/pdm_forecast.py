"""What PDM-Closed expects the others to do: constant velocity along the box, red lights that stay red.

Follows NAVSIM `pdm_planner/observation/pdm_observation.py` and `pdm_object_manager.py`. The planner sees only t=0:
no recorded future enters. Frame: ego rear axle at t=0; metres, seconds, radians. A objects that were kept, R red
on-route connectors, ``N = A + R`` shapes; samples every 0.2 s from 0 to 5.0 s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from rewards.kernels.boxes import EGO_HALF_LENGTH_M, EGO_HALF_WIDTH_M, REAR_AXLE_TO_CENTER_M
from rewards.pdm_polygons import box_corners, point_in_rings, polygon_centroid, polygons_intersect
from rlhf_drive.scenes import AgentType, SceneReference, to_ego_frame, wrap_angle

__all__ = ["NUM_SAMPLES", "SAMPLE_DT_S", "Forecast", "Shapes", "build_forecast"]

NUM_SAMPLES = 26
"""Samples of the forecast: 0.0, 0.2 … 5.0 s."""
SAMPLE_DT_S = 0.2
"""Seconds between two samples."""
_RADIUS_M = 100.0
_KEPT_NEAREST = {AgentType.VEHICLE: 50, AgentType.PEDESTRIAN: 25, AgentType.BICYCLE: 10, AgentType.STATIC: 50}


class Shapes(NamedTuple):
    """All polygons the planner reckons with: first the A objects, then the R red connectors."""

    vertices: NDArray[np.float64]
    """``[26, V, 2]`` vertices of all shapes at each sample."""
    offsets: NDArray[np.int64]
    """``[N + 1]`` shape n has the vertices ``vertices[k, offsets[n]:offsets[n + 1]]``."""
    centroid: NDArray[np.float64]
    """``[26, N, 2]`` area centroid at each sample."""
    speed: NDArray[np.float64]
    """``[N]`` magnitude of the velocity (m/s); 0 for static objects and red lights."""
    heading: NDArray[np.float64]
    """``[N]`` heading of the box at t=0; 0 for red lights."""
    red: NDArray[np.bool_]
    """``[N]`` whether the shape is a red connector."""
    ignored: NDArray[np.bool_]
    """``[N]`` overlaps the ego at t=0 (a red connector: contains it), so it is nobody's leader and no collision."""
    world_heading: float
    """Heading of the frame in the world (rad)."""


@dataclass(frozen=True)
class Forecast:
    """The shapes, and where they come from in the scene."""

    shapes: Shapes
    """Polygons at every sample."""
    agent: NDArray[np.int64]
    """``[A]`` row of the kept object in the scene's agents."""
    pose: NDArray[np.float64]
    """``[A, 26, 3]`` box-centre pose at each sample; the heading is that of t=0 throughout."""
    red_row: NDArray[np.int64]
    """``[R]`` row of each red connector among the scene's red polygons."""


def _kept_objects(reference: SceneReference, pose: NDArray[np.float64]) -> NDArray[np.int64]:
    """Rows of the objects the planner keeps: seen at t=0, within 100 m, the nearest of each type."""
    distance = np.hypot(pose[:, 0] - REAR_AXLE_TO_CENTER_M, pose[:, 1])
    near = reference.agent_valid[:, 0] & (distance <= _RADIUS_M)
    kept = []
    for kind, count in _KEPT_NEAREST.items():
        rows = np.flatnonzero(near & (reference.agent_type == kind))
        kept.append(np.sort(rows[np.argsort(distance[rows], kind="stable")[:count]]))
    return np.concatenate(kept)


def _constant_velocity(
    reference: SceneReference, agent: NDArray[np.int64], pose: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Poses ``[A, 26, 3]`` and speeds ``[A]``: the full speed along the box, forwards or backwards."""
    velocity = reference.agent_velocity[agent, 0]
    static = reference.agent_type[agent] == AgentType.STATIC
    speed = np.where(static, 0.0, np.hypot(velocity[:, 0], velocity[:, 1]))
    course = np.arctan2(velocity[:, 1], velocity[:, 0])
    forwards = np.abs(wrap_angle(reference.agent_pose[agent, 0, 2] - course)) < np.pi / 2
    signed = np.where(forwards, speed, -speed)
    travelled = signed[:, None] * (SAMPLE_DT_S * np.arange(NUM_SAMPLES))
    poses = np.repeat(pose[:, None], NUM_SAMPLES, axis=1)
    poses[..., 0] += travelled * np.cos(pose[:, None, 2])
    poses[..., 1] += travelled * np.sin(pose[:, None, 2])
    return poses, speed


@njit(cache=True, nogil=True)
def _boxes(pose: NDArray[np.float64], size: NDArray[np.float64], vertices: NDArray[np.float64]) -> None:
    """Write the corners of the A boxes at every sample into ``vertices[:, :4 * A]``."""
    for a in range(len(pose)):
        for k in range(pose.shape[1]):
            vertices[k, 4 * a : 4 * a + 4] = box_corners(
                pose[a, k, 0], pose[a, k, 1], pose[a, k, 2], size[a, 0] / 2.0, size[a, 1] / 2.0
            )


@njit(cache=True, nogil=True)
def _overlapping_ego(
    vertices: NDArray[np.float64], offsets: NDArray[np.int64], red: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Whether each shape ``vertices[offsets[n]:offsets[n + 1]]`` meets (red: contains) the ego box at the origin."""
    ego = box_corners(REAR_AXLE_TO_CENTER_M, 0.0, 0.0, EGO_HALF_LENGTH_M, EGO_HALF_WIDTH_M)
    ring = np.array([0, 4])
    overlaps = np.empty(len(red), dtype=np.bool_)
    for n in range(len(red)):
        shape = vertices[offsets[n] : offsets[n + 1]]
        overlaps[n] = polygons_intersect(shape, ego, ring)
        if red[n] and overlaps[n]:
            overlaps[n] = _contains(shape, ego)
    return overlaps


@njit(cache=True, nogil=True)
def _contains(region: NDArray[np.float64], box: NDArray[np.float64]) -> bool:
    """Whether a box lies inside a simple polygon: a corner does, and no edge of the polygon meets the box."""
    if not point_in_rings(box[0, 0], box[0, 1], region, np.array([0, len(region)])):
        return False
    ring = np.array([0, len(box)])
    edge = np.empty((2, 2))
    for i in range(len(region)):
        edge[0], edge[1] = region[i - 1], region[i]
        if polygons_intersect(edge, box, ring):
            return False
    return True


@njit(cache=True, nogil=True)
def _centroids(vertices: NDArray[np.float64], offsets: NDArray[np.int64]) -> NDArray[np.float64]:
    """Centroids ``[R, 2]`` of the polygons ``vertices[offsets[n]:offsets[n + 1]]``."""
    centroids = np.empty((len(offsets) - 1, 2))
    for n in range(len(centroids)):
        centroids[n] = polygon_centroid(vertices[offsets[n] : offsets[n + 1]])
    return centroids


def _red_polygons(reference: SceneReference) -> tuple[NDArray[np.int64], list[NDArray[np.float64]]]:
    """Rows and vertices ``[n, 2]``, in the ego frame, of the on-route connectors that are red now."""
    polygon = np.diff(reference.red_offsets) >= 3
    rows = np.flatnonzero(reference.red_on_route & reference.red_active[:, 0] & polygon)
    world = np.pad(reference.red_xy, ((0, 0), (0, 1)))
    local = to_ego_frame(world, reference.ego_init[:3])[:, :2]
    return rows, [local[reference.red_offsets[r] : reference.red_offsets[r + 1]] for r in rows]


def build_forecast(reference: SceneReference) -> Forecast:
    """The planner's forecast of a scene, from what is visible at t=0.

    Args:
        reference: The scene; of the agents and lights only step 0 is read.

    Returns:
        Shapes at 26 samples in the t=0 ego frame.
    """
    seen = to_ego_frame(np.where(reference.agent_valid[:, :1], reference.agent_pose[:, 0], 0.0), reference.ego_init[:3])
    agent = _kept_objects(reference, seen)
    pose, speed = _constant_velocity(reference, agent, seen[agent])
    red_row, polygons = _red_polygons(reference)
    corners = 4 * len(agent)
    offsets = np.cumsum([0, *(4 for _ in agent), *(len(polygon) for polygon in polygons)])
    vertices = np.empty((NUM_SAMPLES, offsets[-1], 2))
    _boxes(pose, reference.agent_size[agent], vertices)
    vertices[:, corners:] = np.concatenate([np.zeros((0, 2)), *polygons])
    red = np.arange(len(offsets) - 1) >= len(agent)
    centroid = np.empty((NUM_SAMPLES, len(red), 2))
    centroid[:, ~red] = pose[..., :2].swapaxes(0, 1)
    centroid[:, red] = _centroids(vertices[0, corners:], offsets[len(agent) :] - corners)
    shapes = Shapes(
        vertices=vertices,
        offsets=offsets,
        centroid=centroid,
        speed=np.concatenate([speed, np.zeros(len(red_row))]),
        heading=np.concatenate([pose[:, 0, 2], np.zeros(len(red_row))]),
        red=red,
        ignored=_overlapping_ego(vertices[0], offsets, red),
        world_heading=float(reference.ego_init[2]),
    )
    return Forecast(shapes, agent, pose, red_row)
