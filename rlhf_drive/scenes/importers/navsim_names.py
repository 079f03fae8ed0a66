"""The names that NAVSIM's files may use, and how to look into the records they become."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf_drive.scenes.importers.pickled_values import (
    NUMPY_NAMES,
    PATH_NAMES,
    Admitted,
    PickledArray,
    Record,
    record_class,
)

__all__ = [
    "CACHE_NAMES",
    "LOG_NAMES",
    "OTHER_FORM",
    "NotAsWrittenError",
    "argument",
    "array_of",
    "attribute",
    "enum_value",
    "is_a",
    "name_of",
    "number",
]

_CLASSES = {
    "navsim.common.dataclasses": ("Trajectory",),
    "navsim.common.enums": ("SceneFrameType",),
    "navsim.planning.metric_caching.metric_cache": ("MapParameters", "MetricCache"),
    "navsim.planning.simulation.planner.pdm_planner.observation.pdm_observation": ("PDMObservation",),
    "navsim.planning.simulation.planner.pdm_planner.observation.pdm_occupancy_map": (
        "PDMDrivableMap",
        "PDMOccupancyMap",
    ),
    "navsim.planning.simulation.planner.pdm_planner.utils.pdm_path": ("PDMPath",),
    "nuplan.common.actor_state.agent": ("Agent",),
    "nuplan.common.actor_state.agent_state": ("AgentState",),
    "nuplan.common.actor_state.car_footprint": ("CarFootprint",),
    "nuplan.common.actor_state.dynamic_car_state": ("DynamicCarState",),
    "nuplan.common.actor_state.ego_state": ("EgoState",),
    "nuplan.common.actor_state.oriented_box": ("OrientedBox",),
    "nuplan.common.actor_state.scene_object": ("SceneObject", "SceneObjectMetadata"),
    "nuplan.common.actor_state.state_representation": ("Point2D", "StateSE2", "StateVector2D", "TimePoint"),
    "nuplan.common.actor_state.static_object": ("StaticObject",),
    "nuplan.common.actor_state.tracked_objects": ("TrackedObjects",),
    "nuplan.common.actor_state.tracked_objects_types": ("TrackedObjectType",),
    "nuplan.common.actor_state.vehicle_parameters": ("VehicleParameters",),
    "nuplan.common.actor_state.waypoint": ("Waypoint",),
    "nuplan.common.maps.maps_datatypes": ("SemanticMapLayer",),
    "nuplan.planning.simulation.observation.observation_type": ("DetectionsTracks",),
    "nuplan.planning.simulation.trajectory.interpolated_trajectory": ("InterpolatedTrajectory",),
    "nuplan.planning.simulation.trajectory.trajectory_sampling": ("TrajectorySampling",),
    "shapely.io": ("from_wkb",),
}

LOG_NAMES: dict[tuple[str, str], Admitted] = NUMPY_NAMES | PATH_NAMES
"""Logs are plain containers with numbers, text and arrays."""
CACHE_NAMES: dict[tuple[str, str], Admitted] = LOG_NAMES | {
    (module, name): record_class(module, name) for module, names in _CLASSES.items() for name in names
}
"""The classes of metric caches of both versions."""


class NotAsWrittenError(ValueError):
    """A file holds something else than NAVSIM would write."""


OTHER_FORM = (ValueError, TypeError, AttributeError, LookupError, OverflowError, RecursionError)
"""What looking into a value of another form raises, :class:`NotAsWrittenError` included. A pickle may put anything
anywhere, and one odd file must cost its own scene alone."""


def is_a(value: object, kind: str) -> bool:
    """Whether `value` is a record of the class `kind` (name without module)."""
    return isinstance(value, Record) and value.kind == kind


def attribute(value: object, name: str) -> Any:
    """An attribute of a record.

    Raises:
        NotAsWrittenError: It is no record, or lacks the attribute.
    """
    if not isinstance(value, Record):
        raise NotAsWrittenError(f"a {type(value).__name__} where an object with {name} belongs")
    if name not in value.state:
        raise NotAsWrittenError(f"its {value.kind} lacks {name}")
    return value.state[name]


def argument(value: object, kind: str, index: int = 0) -> Any:
    """What the constructor of a record of class `kind` got at `index`.

    Raises:
        NotAsWrittenError: It is no such record.
    """
    if not isinstance(value, Record) or value.kind != kind or len(value.args) <= index:
        raise NotAsWrittenError(f"a {_kind(value)} where a {kind} belongs")
    return value.args[index]


def number(value: object) -> float:
    """A finite number below 2**63, which times in microseconds keep as well.

    Raises:
        NotAsWrittenError: It is none.
    """
    if type(value) not in (int, float) or not abs(value) < 2.0**63:  # type: ignore[arg-type]
        raise NotAsWrittenError(f"{value if isinstance(value, float) else 'a ' + _kind(value)} where a number belongs")
    return float(value)  # type: ignore[arg-type]


def enum_value(value: object, kind: str) -> int:
    """The number behind a member of an enumeration.

    Raises:
        NotAsWrittenError: It is no member of `kind`.
    """
    code = argument(value, kind)
    if type(code) is not int:
        raise NotAsWrittenError(f"a {kind} that is no number")
    return code


def name_of(value: object) -> str:
    """A name or number as text; anything else could be text of any length.

    Raises:
        NotAsWrittenError: It is neither.
    """
    if not isinstance(value, str | int | np.integer):
        raise NotAsWrittenError(f"a {_kind(value)} where a name belongs")
    return str(value)


def array_of(value: object) -> NDArray[Any] | list[Any]:
    """The content of an array, list or tuple.

    Raises:
        NotAsWrittenError: It is none, or an array of no dimension.
    """
    if isinstance(value, PickledArray) and (isinstance(value.array, list) or value.array.ndim > 0):
        return value.array
    if isinstance(value, list | tuple):
        return list(value)
    raise NotAsWrittenError(f"a {_kind(value)} where an array belongs")


def _kind(value: object) -> str:
    return value.kind if isinstance(value, Record) else type(value).__name__
