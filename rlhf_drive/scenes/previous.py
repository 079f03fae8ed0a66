"""The frame before: what a policy saw 0.5 s ago, for NAVSIM's two-frame extended comfort.

The observation of that moment is derived from today's: its history moves on by one row, agents and map turn into the
ego frame of then. Two things are not known and are filled in: the ego's state at -2.0 s is carried back with constant
acceleration and yaw rate, and agents have no row for that time. Lights and command are those of now.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from rlhf_drive.errors import DataError
from rlhf_drive.scenes.model import Observation, Scene
from rlhf_drive.scenes.trajectories import NUM_POSES, POSE_DT_S, to_ego_frame, to_world_frame

__all__ = ["PREVIOUS_SUFFIX", "human_previous", "previous_observation", "previous_scene"]

PREVIOUS_SUFFIX = "@prev"
"""Added to the token of a scene whose observation is that of the previous frame."""
_NOW, _BEFORE = 3, 2


def previous_observation(observation: Observation) -> Observation:
    """The observation 0.5 s earlier, in the ego frame of that time.

    Args:
        observation: What is seen now, with its history at -1.5, -1.0, -0.5 and 0 s.

    Returns:
        An observation whose last row is the state at -0.5 s. Agents that were not seen then are left out.
    """
    origin = observation.ego_history[_BEFORE, :3].astype(np.float64)
    history = np.concatenate([_half_second_before(observation.ego_history[0])[None], observation.ego_history[:_NOW]])
    history[:, :3] = to_ego_frame(history[:, :3], origin)
    there = np.flatnonzero(observation.agents_valid[:, _BEFORE])
    valid = np.concatenate([np.zeros((len(there), 1), np.bool_), observation.agents_valid[there, :_NOW]], axis=1)
    agents = np.zeros((len(there), 4, 5))
    agents[:, 1:] = observation.agents[there, :_NOW]
    agents[..., :3] = to_ego_frame(agents[..., :3], origin)
    agents[..., 3:] = _turned(agents[..., 3:], origin[2])
    return replace(
        observation,
        ego_history=history.astype(np.float32),
        agents=np.where(valid[..., None], agents, 0.0).astype(np.float32),
        agents_valid=valid,
        agents_size=observation.agents_size[there],
        agents_type=observation.agents_type[there],
        map_xy=_points(observation.map_xy, origin),
        route_xy=_points(_route_from(observation, origin), origin),
    )


def previous_scene(scene: Scene) -> Scene:
    """The scene as a policy saw it 0.5 s earlier; its token ends in `PREVIOUS_SUFFIX`.

    Only the observation moves. The reference stays that of now, so the scene must not be scored.
    """
    return replace(scene, token=scene.token + PREVIOUS_SUFFIX, observation=previous_observation(scene.observation))


def human_previous(scene: Scene) -> NDArray[np.float64]:
    """``[8, 3]`` the human's drive as a plan of the previous frame, in the ego frame of that time.

    The first pose is where the ego is now, the others are its first seven future poses.

    Raises:
        DataError: The scene holds no human drive, or no ego state of the previous frame.
    """
    reference = scene.reference
    if reference.human_poses.shape != (NUM_POSES, 3) or reference.prev_ego_init.shape != (11,):
        raise DataError(f"Scene {scene.token!r} does not hold what the human drove and where the ego was 0.5 s ago.")
    drive = np.concatenate([np.zeros((1, 3)), reference.human_poses[:-1]])
    return to_ego_frame(to_world_frame(drive, reference.ego_init[:3]), reference.prev_ego_init[:3])


def _half_second_before(row: NDArray[np.float32]) -> NDArray[np.float64]:
    """``[8]`` the ego 0.5 s before `row` with the same acceleration and yaw rate; it does not reverse."""
    x, y, heading, vx, vy, ax, ay, yaw_rate = row.astype(np.float64)
    earlier = max(vx - ax * POSE_DT_S, min(vx, 0.0))
    middle = heading - 0.5 * yaw_rate * POSE_DT_S
    travel = 0.5 * (vx + earlier) * POSE_DT_S
    place = (x - travel * np.cos(middle), y - travel * np.sin(middle), heading - yaw_rate * POSE_DT_S)
    return np.array([*place, earlier, vy, ax, ay, yaw_rate])


def _route_from(observation: Observation, origin: NDArray[np.float64]) -> NDArray[np.float64]:
    """The route, begun where the ego was: a route starts beside the ego, and keeps its distance from it."""
    route = observation.route_xy.astype(np.float64)
    if len(route) == 0 or np.hypot(*origin[:2]) < 0.1:
        return route
    return np.concatenate([origin[None, :2] + route[:1], route])


def _points(xy: NDArray[np.floating], origin: NDArray[np.float64]) -> NDArray[np.float32]:
    return to_ego_frame(np.concatenate([xy, np.zeros((len(xy), 1))], axis=1), origin)[:, :2].astype(np.float32)


def _turned(vectors: NDArray[np.float64], angle: float) -> NDArray[np.float64]:
    """Vectors ``[..., 2]`` in a frame that is turned by `angle`."""
    cos, sin = np.cos(angle), np.sin(angle)
    return np.stack([cos * vectors[..., 0] + sin * vectors[..., 1], cos * vectors[..., 1] - sin * vectors[..., 0]], -1)
