"""Planners without weights that every policy is measured against."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from rlhf_drive.errors import DataError, UnknownNameError, did_you_mean
from rlhf_drive.scenes import NUM_POSES, POSE_DT_S, Scene, Trajectories, to_ego_frame

__all__ = ["BASELINES", "BaselinePlanner", "baseline_planners"]

PlanFunction = Callable[[Sequence[Scene]], Trajectories]

_POSE_TIMES_S = POSE_DT_S * np.arange(1, NUM_POSES + 1)
_REFERENCE_ROWS = np.round(_POSE_TIMES_S / 0.1).astype(np.int64)
"""Rows 5, 10, …, 40 of a 10 Hz reference: the times of a plan's poses."""


def _one_per_scene(poses_ST3: NDArray[np.float64]) -> Trajectories:
    return Trajectories(poses_ST3.reshape(-1, NUM_POSES, 3), np.arange(len(poses_ST3)))


def _human(scenes: Sequence[Scene]) -> Trajectories:
    """What the human drove; privileged, an upper mark rather than a competitor."""
    return _one_per_scene(np.array([scene.reference.human_poses for scene in scenes]))


def _pdm_closed(scenes: Sequence[Scene]) -> Trajectories:
    """PDM-Closed as NAVSIM v1.1 runs it, read from the reference stored with the scene; it knows the map exactly."""
    return _one_per_scene(np.array([_pdm_closed_poses(scene) for scene in scenes]))


def _pdm_closed_poses(scene: Scene) -> NDArray[np.float64]:
    rows, needed = len(scene.reference.pdm_reference_v1), int(_REFERENCE_ROWS[-1]) + 1
    if rows < needed:
        raise DataError(
            f"Scene {scene.token!r} holds no PDM-Closed reference (pdm_reference_v1 has {rows} rows, needs {needed}). "
            "Compute it when the scenes are written, or leave 'pdm_closed' out of the baselines."
        )
    return to_ego_frame(scene.reference.pdm_reference_v1[_REFERENCE_ROWS], scene.reference.ego_init[:3])


def _constant_velocity(scenes: Sequence[Scene]) -> Trajectories:
    """Straight on at the longitudinal speed of now: ``x = max(vx, 0) t, y = 0, heading = 0``."""
    poses = np.zeros((len(scenes), NUM_POSES, 3))
    speed_S = np.array([max(float(scene.reference.ego_init[3]), 0.0) for scene in scenes])
    poses[:, :, 0] = speed_S[:, None] * _POSE_TIMES_S
    return _one_per_scene(poses)


def _stand_still(scenes: Sequence[Scene]) -> Trajectories:
    """Stays where it is from the first pose on."""
    return _one_per_scene(np.zeros((len(scenes), NUM_POSES, 3)))


BASELINES: Mapping[str, PlanFunction] = MappingProxyType(
    {
        "human": _human,
        "pdm_closed": _pdm_closed,
        "constant_velocity": _constant_velocity,
        "stand_still": _stand_still,
    }
)
"""Plan function by name: S scenes to S trajectories, one per scene, in each scene's t=0 ego frame."""


@dataclass(frozen=True)
class BaselinePlanner:
    """A baseline as a planner that :func:`rlhf_drive.compare.evaluate` accepts."""

    name: str
    """Name under which its results are reported."""
    function: PlanFunction
    """S scenes to S trajectories."""

    def plan(self, scenes: Sequence[Scene]) -> Trajectories:
        """One trajectory per scene."""
        return self.function(scenes)


def baseline_planners(names: Sequence[str]) -> list[BaselinePlanner]:
    """The named baselines as planners, in the given order.

    Example:
        >>> [planner.name for planner in baseline_planners(["stand_still"])]
        ['stand_still']

    Raises:
        UnknownNameError: A name is not in `BASELINES`.
    """
    for name in names:
        if name not in BASELINES:
            raise UnknownNameError(f"Unknown baseline {name!r} in compare.baselines. {did_you_mean(name, BASELINES)}")
    return [BaselinePlanner(name, BASELINES[name]) for name in names]
