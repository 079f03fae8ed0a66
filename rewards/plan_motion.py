"""How plans move, whatever they score: reversing, standing still, heading change, curvature and jerk.

A plan's path starts at the origin, where the ego is at t=0, and goes through its T poses, ``dt = 0.5 s`` apart. All
functions take finite plans ``[N, T, 3]`` in the t=0 ego frame.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from rlhf_drive.scenes import NUM_POSES, POSE_DT_S, Scene, to_ego_frame, wrap_angle

__all__ = [
    "MOTION",
    "MOVING_M",
    "REVERSAL_M",
    "STANDSTILL_M",
    "MotionQuantity",
    "human_plan",
    "motion_ratio",
    "pdm_closed_plan",
    "reach_m",
    "reversing",
]

Array = NDArray[np.float64]

REVERSAL_M = 0.05
"""A plan's last step reverses if it goes back by more than this."""
STANDSTILL_M = 1.0
"""A plan that never gets farther than this from its start stands still; a token's rounding moves it less."""
MOVING_M = 4.0
"""A reference that gets at least this far in 4 s moves."""
_CURVATURE_PATH_M = 2.0
"""Shorter paths count as this long, so that a turn of the wheels on the spot is not an endless curvature."""
_REFERENCE_ROWS = np.arange(5, 5 * NUM_POSES + 1, 5)
"""Rows of a 10 Hz reference at the times of a plan's poses."""


def _steps(plans: Array) -> tuple[Array, Array]:
    """Step ``[N, T, 2]`` and heading change ``[N, T]`` between successive poses, the first from the origin."""
    path = np.concatenate([np.zeros((len(plans), 1, 3)), plans], axis=1)
    return np.diff(path[..., :2], axis=1), wrap_angle(np.diff(path[..., 2], axis=1))


def reversing(plans: Array) -> NDArray[np.bool_]:
    """``[N]`` whether the last step goes back by more than `REVERSAL_M` along the heading of the pose before it."""
    steps, heading = _steps(plans)[0][:, -1], plans[:, -2, 2]
    return np.asarray(steps[:, 0] * np.cos(heading) + steps[:, 1] * np.sin(heading) < -REVERSAL_M)


def reach_m(plans: Array) -> Array:
    """``[N]`` greatest distance of a pose from the start, metres."""
    return np.asarray(np.hypot(plans[..., 0], plans[..., 1]).max(axis=1))


def _heading_change(plans: Array) -> Array:
    """``[N]`` sum of absolute heading changes, rad."""
    return np.asarray(np.abs(_steps(plans)[1]).sum(axis=1))


def _curvature(plans: Array) -> Array:
    """``[N]`` heading change per path length, rad/m; paths below 2 m count as 2 m."""
    steps, turns = _steps(plans)
    length = np.hypot(steps[..., 0], steps[..., 1]).sum(axis=1)
    return np.asarray(np.abs(turns).sum(axis=1) / np.maximum(length, _CURVATURE_PATH_M))


def _longitudinal_jerk(plans: Array) -> Array:
    """``[N]`` RMS of the second difference of speed / dt², m/s³; speed is a step along the heading midway, / dt."""
    steps, turns = _steps(plans)
    middle = plans[..., 2] - 0.5 * turns
    speed = (steps[..., 0] * np.cos(middle) + steps[..., 1] * np.sin(middle)) / POSE_DT_S
    return _rms(np.diff(speed, n=2, axis=1) / POSE_DT_S**2)


def _lateral_jerk(plans: Array) -> Array:
    """``[N]`` RMS of the difference of lateral acceleration (path speed x yaw rate) / dt, m/s³."""
    steps, turns = _steps(plans)
    acceleration = np.hypot(steps[..., 0], steps[..., 1]) * turns / POSE_DT_S**2
    return _rms(np.diff(acceleration, axis=1) / POSE_DT_S)


def _rms(values: Array) -> Array:
    return np.asarray(np.sqrt((values**2).mean(axis=1)))


@dataclass(frozen=True)
class MotionQuantity:
    """A number per plan that is compared with the human's."""

    function: Callable[[Array], Array]
    """Plans ``[N, T, 3]`` to values ``[N]`` of at least 0."""
    floor: float
    """Added to both means of a ratio: what rounding alone may give, so that a human who drives straight on is no
    division by zero."""
    ceiling: float
    """Values above count as this, so that a few wild plans do not decide a mean."""
    unit: str
    """Unit of values, floor and ceiling."""


MOTION: Mapping[str, MotionQuantity] = MappingProxyType(
    {
        "heading_change": MotionQuantity(_heading_change, 0.02, np.pi, "rad"),
        "curvature": MotionQuantity(_curvature, 0.002, 0.5, "1/m"),
        "longitudinal_jerk": MotionQuantity(_longitudinal_jerk, 0.1, 20.0, "m/s³"),
        "lateral_jerk": MotionQuantity(_lateral_jerk, 0.1, 20.0, "m/s³"),
    }
)
"""Quantities by name."""


def motion_ratio(quantity: MotionQuantity, plans: Array, human: Array) -> float:
    """How much of a quantity plans have for one part of the human's: 1 = alike.

    ``(mean(min(plan, ceiling)) + floor) / (mean(min(human, ceiling)) + floor)``

    Args:
        quantity: One of `MOTION`.
        plans: ``[N, T, 3]``, N at least 1.
        human: ``[N, T, 3]`` the human's drive in the scene of each row.
    """
    own, other = (float(np.minimum(quantity.function(rows), quantity.ceiling).mean()) for rows in (plans, human))
    return (own + quantity.floor) / (other + quantity.floor)


def human_plan(scene: Scene) -> Array | None:
    """``[8, 3]`` what the human drove, t=0 ego frame; None where the scene does not hold it."""
    poses = scene.reference.human_poses
    return poses if len(poses) == NUM_POSES else None


def pdm_closed_plan(scene: Scene) -> Array | None:
    """``[8, 3]`` the PDM-Closed reference (v1's, else v2's) in the t=0 ego frame; None where neither is computed."""
    for states in (scene.reference.pdm_reference_v1, scene.reference.pdm_reference_v2):
        if len(states) > _REFERENCE_ROWS[-1]:
            return to_ego_frame(states[_REFERENCE_ROWS], scene.reference.ego_init[:3])
    return None
