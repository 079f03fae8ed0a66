"""Ego states and road users of a metric cache as arrays, world frame."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlhf_drive.scenes.importers.navsim_names import (
    NotAsWrittenError,
    argument,
    array_of,
    attribute,
    enum_value,
    is_a,
    number,
)
from rlhf_drive.scenes.model import AgentType
from rlhf_drive.scenes.trajectories import wrap_angle

__all__ = ["Sightings", "ego_state", "ego_states", "resampled_reference", "se2", "sightings", "time_us"]

Array = NDArray[np.float64]

STEPS = 41
STEP_S = 0.1
_AGENT_TYPES = {0: AgentType.VEHICLE, 1: AgentType.PEDESTRIAN, 2: AgentType.BICYCLE, 7: AgentType.VEHICLE}
"""By the number of nuPlan's `TrackedObjectType`; all others stand still for the scorer, whatever they do."""


@dataclass(frozen=True)
class Sightings:
    """Road users at one moment, world frame."""

    tokens: tuple[str, ...]
    """``[n]`` track tokens."""
    pose: Array
    """``[n, 3]`` box centres."""
    velocity: Array
    """``[n, 2]`` m/s."""
    size: Array
    """``[n, 2]`` length, width."""
    type: NDArray[np.int8]
    """``[n]`` :class:`AgentType`."""

    @classmethod
    def of(cls, rows: Sequence[tuple[str, Sequence[float], int]]) -> Sightings:
        """Of token, (x, y, heading, vx, vy, length, width) and type."""
        table = np.array([row[1] for row in rows], dtype=np.float64).reshape(-1, 7)
        kinds = np.array([row[2] for row in rows], dtype=np.int8)
        return cls(tuple(row[0] for row in rows), table[:, :3], table[:, 3:5], table[:, 5:], kinds)

    def chosen(self, rows: NDArray[np.bool_]) -> Sightings:
        """Those where `rows` ``[n]`` is true."""
        tokens = tuple(token for token, kept in zip(self.tokens, rows, strict=True) if kept)
        return Sightings(tokens, self.pose[rows], self.velocity[rows], self.size[rows], self.type[rows])


def time_us(point: object) -> int:
    """Microseconds of a `TimePoint`."""
    return int(number(attribute(point, "time_us")))


def se2(pose: object) -> tuple[float, float, float]:
    """x, y, heading of a `StateSE2`."""
    return number(attribute(pose, "x")), number(attribute(pose, "y")), number(attribute(pose, "heading"))


def _vector(value: object) -> tuple[float, float]:
    return number(attribute(value, "_x")), number(attribute(value, "_y"))


def _rear_axle(state: object, dynamics: object) -> tuple[float, float, float]:
    """The rear axle: as cached by nuPlan, else behind the centre by the vehicle's distance."""
    footprint = attribute(state, "_car_footprint")
    if "rear_axle" in footprint.state:
        return se2(footprint.state["rear_axle"])
    x, y, heading = se2(attribute(footprint, "_center"))
    behind = number(attribute(dynamics, "_rear_axle_to_center_dist"))
    return x - behind * float(np.cos(heading)), y - behind * float(np.sin(heading)), heading


def ego_state(state: object) -> Array:
    """``[11]`` the state vector of an `EgoState`."""
    dynamics = attribute(state, "_dynamic_car_state")
    return np.array(
        [
            *_rear_axle(state, dynamics),
            *_vector(attribute(dynamics, "_rear_axle_velocity_2d")),
            *_vector(attribute(dynamics, "_rear_axle_acceleration_2d")),
            number(attribute(state, "_tire_steering_angle")),
            number(attribute(dynamics, "_tire_steering_rate")),
            number(attribute(dynamics, "_angular_velocity")),
            number(attribute(dynamics, "_angular_acceleration")),
        ]
    )


def ego_states(trajectory: object) -> tuple[NDArray[np.int64], Array]:
    """Times ``[n]`` (microseconds, rising) and states ``[n, 11]`` of an `InterpolatedTrajectory`."""
    states = array_of(argument(trajectory, "InterpolatedTrajectory"))
    times = np.array([time_us(attribute(state, "_time_point")) for state in states], dtype=np.int64)
    if len(times) < 2 or (np.diff(times) <= 0).any():
        raise NotAsWrittenError(f"a trajectory of {len(times)} states whose times do not rise")
    return times, np.stack([ego_state(state) for state in states])


def resampled_reference(trajectory: object, t0_us: int) -> Array:
    """``[41, 3]`` rear-axle poses every 0.1 s, as the scorer asks the planner's trajectory for them.

    Query times are truncated to microseconds and clipped to the trajectory; x and y are linear, the heading is
    unwrapped over all states first.
    """
    times, states = ego_states(trajectory)
    asked = ((STEP_S * np.arange(STEPS) + t0_us * 1e-6) * 1e6).astype(np.int64)
    if asked[0] < times[0] - 1_000_000 or asked[-1] > times[-1] + 1_000_000:
        raise NotAsWrittenError("the reference trajectory lies more than a second apart from t=0")
    at, knots = (asked - times[0]).astype(np.float64), (times - times[0]).astype(np.float64)
    columns = [states[:, 0], states[:, 1], np.unwrap(states[:, 2])]
    x, y, heading = (np.interp(at, knots, column) for column in columns)
    return np.stack([x, y, wrap_angle(heading)], axis=-1)


def _row(item: object) -> tuple[str, Sequence[float], int]:
    box = attribute(item, "_box")
    token = attribute(attribute(item, "_metadata"), "track_token")
    if type(token) is not str:
        raise NotAsWrittenError("a road user without track token")
    kind = _AGENT_TYPES.get(enum_value(attribute(item, "_tracked_object_type"), "TrackedObjectType"))
    velocity = _vector(attribute(item, "_velocity")) if "_velocity" in item.state else (0.0, 0.0)  # type: ignore[attr-defined]
    size = number(attribute(box, "_length")), number(attribute(box, "_width"))
    return token, (*se2(attribute(box, "_center")), *velocity, *size), AgentType.STATIC if kind is None else kind


def sightings(items: Iterable[object]) -> Sightings:
    """Of `Agent` and `StaticObject` records; static ones have no velocity."""
    return Sightings.of([_row(item) for item in items])


def detected(tracks: object) -> list[object]:
    """The road users of `DetectionsTracks`."""
    return list(array_of(attribute(attribute(tracks, "tracked_objects"), "tracked_objects")))


def first_seen_us(item: object) -> int:
    """When a road user was first annotated (microseconds)."""
    return int(number(attribute(attribute(item, "_metadata"), "timestamp_us")))


def is_observation(value: object) -> bool:
    """Whether `value` is NAVSIM's observation."""
    return is_a(value, "PDMObservation")
