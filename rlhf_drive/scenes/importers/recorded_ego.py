"""The ego of a recording as the scorer sees it: rear-axle states, past and human plan (rules 1 to 4)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from rlhf_drive.errors import DataError
from rlhf_drive.scenes.importers.recorded_reading import STEP_S, Array, Recording
from rlhf_drive.scenes.trajectories import to_ego_frame

__all__ = ["FUTURE_STEPS", "PAST_STEPS", "EgoLog"]

REAR_AXLE_TO_CENTRE_M = 1.461
WHEEL_BASE_M = 3.089
STEERING_LIMIT_RAD = 0.6
STEERING_SPEED_MPS = 0.5
FIT_SAMPLES = 7
PAST_STEPS = 18
"""Samples needed before t=0: 1.5 s and half a fit."""
FUTURE_STEPS = 50
"""Samples needed after t=0: the 5 s for which agents are given."""
_HISTORY_STEPS = (-15, -10, -5, 0)
_PLAN_STEPS = np.arange(5, 41, 5)


@dataclass(frozen=True)
class EgoLog:
    """The logged ego of one recording, rear axle, sampled at 10 Hz."""

    recording: Recording
    """Source."""

    @cached_property
    def pose(self) -> Array:
        """``[T, 3]`` rear axle, 1.461 m behind the recorded box centre; heading as recorded."""
        centre, heading = self.recording.ego[:, :2], self.recording.ego[:, 2]
        offset = REAR_AXLE_TO_CENTRE_M * np.stack([np.cos(heading), np.sin(heading)], axis=1)
        return np.concatenate([centre - offset, heading[:, None]], axis=1)

    @cached_property
    def speed(self) -> Array:
        """``[T]`` recorded velocity along the heading."""
        heading, velocity = self.recording.ego[:, 2], self.recording.ego[:, 3:]
        return np.asarray(np.cos(heading) * velocity[:, 0] + np.sin(heading) * velocity[:, 1])

    @cached_property
    def _heading(self) -> Array:
        return np.asarray(np.unwrap(self.recording.ego[:, 2]))

    def check_window(self, start: int) -> None:
        """Refuse a start without enough samples around it, or with a value that is not finite among them.

        Raises:
            DataError: Why the start cannot be used.
        """
        first, last, count = start - PAST_STEPS, start + FUTURE_STEPS, len(self.recording.ego)
        if first < 0 or last >= count:
            raise DataError(f"start {start} needs samples {first} … {last}; the recording has {count}")
        if not np.isfinite(self.recording.ego[first : last + 1]).all():
            raise DataError("the ego track holds a value that is not finite")

    def _slope(self, values: Array, index: int) -> float:
        """First derivative at `index` of a quadratic fitted to the 7 samples around it."""
        half = FIT_SAMPLES // 2
        k = np.arange(-half, half + 1)
        return float(k @ values[index - half : index + half + 1] / (k @ k) / STEP_S)

    def state(self, index: int, *, steering: bool) -> Array:
        """``[11]`` ego state, accelerations from centred fits; with `steering`, the angle that holds the yaw rate.

        The scorer's bicycle otherwise starts every turn with straight wheels.
        """
        speed, yaw_rate = float(self.speed[index]), self._slope(self._heading, index)
        state = np.zeros(11)
        state[:3] = self.pose[index]
        state[3:7] = speed, 0.0, self._slope(self.speed, index), speed * yaw_rate
        if steering and speed > STEERING_SPEED_MPS:
            angle = np.arctan(yaw_rate * WHEEL_BASE_M / speed)
            state[7] = np.clip(angle, -STEERING_LIMIT_RAD, STEERING_LIMIT_RAD)
            state[9] = speed * np.tan(state[7]) / WHEEL_BASE_M
        return state

    def past(self, start: int) -> Array:
        """``[4, 11]`` states at -1.5, -1, -0.5 and 0 s, without steering."""
        return np.stack([self.state(start + step, steering=False) for step in _HISTORY_STEPS])

    def human_poses(self, start: int) -> Array:
        """``[8, 3]`` what the human drove, 0.5 … 4 s, in the frame of t=0."""
        return to_ego_frame(self.pose[start + _PLAN_STEPS], self.pose[start])

    def seen_history(self, start: int) -> Array:
        """``[4, 8]`` x, y, heading, vx, vy, ax, ay, yaw rate at the four past times, in the frame of t=0.

        Accelerations and yaw rates come from quadratic fits to samples up to each time, never after it.
        """
        rows = np.zeros((len(_HISTORY_STEPS), 8))
        for row, step in zip(rows, _HISTORY_STEPS, strict=True):
            index = start + step
            speed, yaw_rate = float(self.speed[index]), _one_sided_slope(self._heading[: index + 1])
            row[:3] = to_ego_frame(self.pose[index], self.pose[start])
            row[3:] = speed, 0.0, _one_sided_slope(self.speed[: index + 1]), speed * yaw_rate, yaw_rate
        return rows


def _one_sided_slope(values: Array) -> float:
    """Slope at the last sample of a quadratic fitted to the last 7 samples, or to as many as there are."""
    last = values[-FIT_SAMPLES:]
    time = STEP_S * np.arange(1 - len(last), 1)
    powers = np.vander(time, min(3, len(last)))
    coefficients = np.linalg.lstsq(powers, last, rcond=None)[0]
    return float(coefficients[-2]) if len(coefficients) > 1 else 0.0
