"""Planners without weights that every policy is measured against."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from rewards.plan_motion import human_plan, pdm_closed_plan
from rewards.two_frame import has_previous_frame
from rlhf_drive.errors import DataError, UnknownNameError, did_you_mean
from rlhf_drive.scenes import NUM_POSES, POSE_DT_S, Scene, Trajectories
from rlhf_drive.scenes.previous import human_previous

__all__ = ["BASELINES", "PREVIOUS", "BaselinePlanner", "baseline_planners"]

Array = NDArray[np.float64]
PlanFunction = Callable[[Sequence[Scene]], Trajectories]

_POSE_TIMES_S = POSE_DT_S * np.arange(1, NUM_POSES + 1)


def _one_per_scene(poses: Sequence[Array]) -> Trajectories:
    return Trajectories(np.array(poses, dtype=np.float64).reshape(-1, NUM_POSES, 3), np.arange(len(poses)))


def _human(scenes: Sequence[Scene]) -> Trajectories:
    """What the human drove; privileged, an upper mark rather than a competitor."""
    return _one_per_scene([_needed(human_plan(scene), scene, "human drive", "human") for scene in scenes])


def _human_previous(scenes: Sequence[Scene]) -> Trajectories:
    """The human's drive as a plan of the previous frame."""
    return _one_per_scene([human_previous(scene) if has_previous_frame(scene) else _UNKNOWN for scene in scenes])


def _pdm_closed(scenes: Sequence[Scene]) -> Trajectories:
    """PDM-Closed as NAVSIM runs it, read from the reference stored with the scene; it knows the map exactly."""
    return _one_per_scene(
        [_needed(pdm_closed_plan(scene), scene, "PDM-Closed reference", "pdm_closed") for scene in scenes]
    )


def _needed(plan: Array | None, scene: Scene, what: str, baseline: str) -> Array:
    if plan is None:
        raise DataError(
            f"Scene {scene.token!r} holds no {what}. Add it when the scenes are written, or leave {baseline!r} out of "
            "the baselines."
        )
    return plan


def _constant_velocity(scenes: Sequence[Scene]) -> Trajectories:
    """Straight on at the longitudinal speed of now: ``x = max(vx, 0) t, y = 0, heading = 0``."""
    return _one_per_scene([_straight_on(scene.reference.ego_init) for scene in scenes])


def _constant_velocity_previous(scenes: Sequence[Scene]) -> Trajectories:
    """Straight on at the speed of the previous frame."""
    return _one_per_scene(
        [_straight_on(scene.reference.prev_ego_init) if has_previous_frame(scene) else _UNKNOWN for scene in scenes]
    )


def _straight_on(ego: Array) -> Array:
    poses = np.zeros((NUM_POSES, 3))
    poses[:, 0] = max(float(ego[3]), 0.0) * _POSE_TIMES_S
    return poses


def _stand_still(scenes: Sequence[Scene]) -> Trajectories:
    """Stays where it is from the first pose on; the same in the previous frame, where that one was."""
    return _one_per_scene([np.zeros((NUM_POSES, 3))] * len(scenes))


_UNKNOWN = np.full((NUM_POSES, 3), np.nan)
"""Stands for a plan where there is no previous frame; it is not scored."""

BASELINES: Mapping[str, PlanFunction] = MappingProxyType(
    {
        "human": _human,
        "pdm_closed": _pdm_closed,
        "constant_velocity": _constant_velocity,
        "stand_still": _stand_still,
    }
)
"""Plan function by name: S scenes to S trajectories, one per scene, in each scene's t=0 ego frame."""

PREVIOUS: Mapping[str, PlanFunction] = MappingProxyType(
    {
        "human": _human_previous,
        "constant_velocity": _constant_velocity_previous,
        "stand_still": _stand_still,
    }
)
"""Plan function of the frame 0.5 s earlier, in the ego frame of that time; NaN where that frame is not known.
PDM-Closed has none: only its reference of now is stored."""


@dataclass(frozen=True)
class BaselinePlanner:
    """A baseline as a planner that :func:`rlhf_drive.compare.evaluate` accepts."""

    name: str
    """Name under which its results are reported."""
    function: PlanFunction
    """S scenes to S trajectories."""
    previous: PlanFunction | None = None
    """The same for the previous frame; None where the baseline has no such plan."""

    def plan(self, scenes: Sequence[Scene]) -> Trajectories:
        """One trajectory per scene."""
        return self.function(scenes)

    def plan_previous(self, scenes: Sequence[Scene]) -> Trajectories | None:
        """One trajectory per scene in the frame before, or None."""
        return self.previous(scenes) if self.previous is not None else None


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
    return [BaselinePlanner(name, BASELINES[name], PREVIOUS.get(name)) for name in names]
