"""Planned trajectories: the carrier, its frame, and conversions between frames."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlhf_drive.errors import DataError

__all__ = ["NUM_POSES", "POSE_DT_S", "Trajectories", "to_ego_frame", "to_world_frame", "wrap_angle"]

NUM_POSES = 8
"""T: future poses of a plan, at 2 Hz over 4 s."""
POSE_DT_S = 0.5
"""Seconds between two poses of a plan."""


def wrap_angle(angle: NDArray[np.float64]) -> NDArray[np.float64]:
    """Angle in [-pi, pi), radians."""
    return (angle + np.pi) % (2.0 * np.pi) - np.pi


def to_world_frame(poses: NDArray[np.floating], origin: NDArray[np.floating]) -> NDArray[np.float64]:
    """Poses given in the frame of `origin`, expressed in the world frame.

    Args:
        poses: ``[..., 3]`` x, y (m), heading (rad) in the frame of `origin`.
        origin: ``[3]`` world pose of that frame.

    Returns:
        ``[..., 3]`` float64 world poses, heading in [-pi, pi).
    """
    local = np.asarray(poses, dtype=np.float64)
    x, y, heading = (float(v) for v in origin[:3])
    cos, sin = np.cos(heading), np.sin(heading)
    return np.stack(
        [
            x + cos * local[..., 0] - sin * local[..., 1],
            y + sin * local[..., 0] + cos * local[..., 1],
            wrap_angle(local[..., 2] + heading),
        ],
        axis=-1,
    )


def to_ego_frame(poses: NDArray[np.floating], origin: NDArray[np.floating]) -> NDArray[np.float64]:
    """World poses expressed in the frame of `origin`; the inverse of :func:`to_world_frame`."""
    world = np.asarray(poses, dtype=np.float64)
    x, y, heading = (float(v) for v in origin[:3])
    cos, sin = np.cos(heading), np.sin(heading)
    dx, dy = world[..., 0] - x, world[..., 1] - y
    return np.stack([cos * dx + sin * dy, cos * dy - sin * dx, wrap_angle(world[..., 2] - heading)], axis=-1)


@dataclass(frozen=True)
class Trajectories:
    """N planned trajectories and the scene each belongs to: ``Trajectories(poses_NT3, np.repeat(range(S), G))``."""

    poses: NDArray[np.float64]
    """``[N, T, 3]`` x, y (m), heading (rad) of the rear axle in the t=0 ego frame, at 0.5 s … 4.0 s."""
    scene_index: NDArray[np.int64]
    """``[N]`` index of the row's scene in the batch it was planned for (scene-major: ``n // G``)."""
    dt_s: float = POSE_DT_S
    """Seconds between poses."""

    def __post_init__(self) -> None:
        poses = np.asarray(self.poses, dtype=np.float64)
        index = np.asarray(self.scene_index, dtype=np.int64)
        if poses.ndim != 3 or poses.shape[2] != 3:
            raise DataError(f"Trajectories need poses [N, T, 3]; got shape {poses.shape}.")
        if index.shape != poses.shape[:1]:
            raise DataError(f"scene_index must be [N] = [{poses.shape[0]}]; got shape {index.shape}.")
        object.__setattr__(self, "poses", poses)
        object.__setattr__(self, "scene_index", index)

    def __len__(self) -> int:
        return int(self.poses.shape[0])
