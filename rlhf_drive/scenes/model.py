"""The world as data: `Scene` = `Observation` (all a policy may see) + `SceneReference` (privileged)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf_drive.errors import DataError
from rlhf_drive.scenes.trajectories import NUM_POSES

__all__ = [
    "HISTORY_TIMES_S",
    "REFERENCE_STEPS",
    "AgentType",
    "Command",
    "MapElement",
    "MapLayer",
    "Observation",
    "Scene",
    "SceneReference",
]

HISTORY_TIMES_S = (-1.5, -1.0, -0.5, 0.0)
"""H = 4 observed past times, seconds relative to now."""
REFERENCE_STEPS = 51
"""Steps of the recorded future at 10 Hz: t = 0.0 … 5.0 s."""


class AgentType(IntEnum):
    """What an agent is; STATIC stands for every non-agent object (cone, barrier, sign, generic)."""

    VEHICLE = 0
    PEDESTRIAN = 1
    BICYCLE = 2
    STATIC = 3


class MapLayer(IntEnum):
    """Polygon layers the scorer distinguishes (NAVSIM `SemanticMapLayer` names)."""

    LANE = 0
    LANE_CONNECTOR = 1
    INTERSECTION = 2
    ROADBLOCK = 3
    DRIVABLE_AREA = 4
    CARPARK_AREA = 5


class MapElement(IntEnum):
    """What an observed polyline is."""

    LANE_CENTER = 0
    LANE_CONNECTOR_CENTER = 1
    ROAD_EDGE = 2
    CROSSWALK = 3


class Command(IntEnum):
    """Driving command over the planning horizon, as NAVSIM gives it."""

    LEFT = 0
    STRAIGHT = 1
    RIGHT = 2


def _checked(obj: object, name: str, shape: tuple[int | None, ...], dtype: type, *, finite: bool = True) -> None:
    """Cast field `name` to a contiguous array of `dtype`, and check its rank, sizes (None = any) and finiteness."""
    array: NDArray[Any] = np.ascontiguousarray(getattr(obj, name), dtype=dtype)
    fits = array.ndim == len(shape) and all(s is None or s == n for s, n in zip(shape, array.shape, strict=True))
    if not fits:
        want = ", ".join("*" if s is None else str(s) for s in shape)
        raise DataError(f"{type(obj).__name__}.{name} must have shape [{want}]; got {list(array.shape)}.")
    if finite and array.dtype.kind == "f" and not np.isfinite(array).all():
        bad = np.argwhere(~np.isfinite(array))[0].tolist()
        raise DataError(f"{type(obj).__name__}.{name} holds a value that is not finite at index {bad}.")
    object.__setattr__(obj, name, array)


def _checked_or_empty(obj: object, name: str, shape: tuple[int, ...], dtype: type) -> None:
    """As :func:`_checked`, but the first axis may be 0: what the source lacks is explicitly empty."""
    _checked(obj, name, (None, *shape[1:]), dtype)
    if len(getattr(obj, name)) not in (0, shape[0]):
        want, empty = (", ".join(map(str, (n, *shape[1:]))) for n in (shape[0], 0))
        got = list(getattr(obj, name).shape)
        raise DataError(f"{type(obj).__name__}.{name} must have shape [{want}], or [{empty}] if unknown; got {got}.")


def _checked_cameras(cameras: object) -> dict[str, str]:
    """The mapping as a new dict; both sides must be text."""
    if not isinstance(cameras, Mapping) or not all(isinstance(v, str) for item in cameras.items() for v in item):
        raise DataError(f"Observation.cameras must map camera names to image paths, both text; got {cameras!r:.200}.")
    return dict(cameras)


def _check_offsets(obj: object, name: str, total: int, items: int) -> None:
    """Offsets must start at 0, never fall, end at `total` and bound `items` items."""
    offsets = getattr(obj, name)
    if len(offsets) != items + 1 or offsets[0] != 0 or offsets[-1] != total or (np.diff(offsets) < 0).any():
        raise DataError(
            f"{type(obj).__name__}.{name} must rise from 0 to {total} with {items + 1} entries; got {len(offsets)}."
        )


def _check_codes(obj: object, name: str, codes: type[IntEnum]) -> None:
    """Every value must be a member of an enumeration."""
    values = getattr(obj, name)
    unknown = values[~np.isin(values, list(codes))]
    if len(unknown):
        raise DataError(f"{type(obj).__name__}.{name} holds {int(unknown[0])}, which is no {codes.__name__}.")


@dataclass(frozen=True)
class Observation:
    """All that a policy may see. Frame: ego rear axle at t=0, x forward, y left; metres, seconds, radians; float32.

    H = 4 past times (`HISTORY_TIMES_S`), A agents, M map polylines with P points in all, R route points.
    """

    ego_history: NDArray[np.float32]
    """``[H, 8]`` x, y, heading, vx, vy, ax, ay (body frame), yaw rate at the rear axle; last row is now."""
    agents: NDArray[np.float32]
    """``[A, H, 5]`` x, y, heading, vx, vy of box centres in the t=0 ego frame; zero where not valid."""
    agents_valid: NDArray[np.bool_]
    """``[A, H]`` whether the agent was seen at that time; every agent is valid at the last (now)."""
    agents_size: NDArray[np.float32]
    """``[A, 2]`` length, width (m)."""
    agents_type: NDArray[np.int8]
    """``[A]`` :class:`AgentType`."""
    map_xy: NDArray[np.float32]
    """``[P, 2]`` points of all polylines, one after the other, each in its direction of travel."""
    map_offsets: NDArray[np.int32]
    """``[M + 1]`` polyline m is ``map_xy[map_offsets[m]:map_offsets[m + 1]]``."""
    map_type: NDArray[np.int8]
    """``[M]`` :class:`MapElement`."""
    map_speed_limit: NDArray[np.float32]
    """``[M]`` m/s; 0 where unknown or not a lane."""
    map_on_route: NDArray[np.bool_]
    """``[M]`` whether the lane belongs to the route (False for other elements)."""
    map_red: NDArray[np.bool_]
    """``[M]`` whether a red light governs the lane now."""
    route_xy: NDArray[np.float32]
    """``[R, 2]`` the navigation route ahead as a polyline along lane centres (not what the human drove)."""
    command: int
    """:class:`Command`."""
    cameras: Mapping[str, str] = field(default_factory=dict)
    """Image at t=0 by camera name, as a path the source gives; empty if it has no cameras."""

    def __post_init__(self) -> None:
        h = len(HISTORY_TIMES_S)
        _checked(self, "ego_history", (h, 8), np.float32)
        _checked(self, "agents", (None, h, 5), np.float32)
        a = len(self.agents)
        _checked(self, "agents_valid", (a, h), np.bool_)
        _checked(self, "agents_size", (a, 2), np.float32)
        _checked(self, "agents_type", (a,), np.int8)
        _checked(self, "map_xy", (None, 2), np.float32)
        _checked(self, "map_type", (None,), np.int8)
        m = len(self.map_type)
        _checked(self, "map_offsets", (m + 1,), np.int32)
        _check_offsets(self, "map_offsets", len(self.map_xy), m)
        _checked(self, "map_speed_limit", (m,), np.float32)
        _checked(self, "map_on_route", (m,), np.bool_)
        _checked(self, "map_red", (m,), np.bool_)
        _checked(self, "route_xy", (None, 2), np.float32)
        object.__setattr__(self, "command", int(Command(self.command)))
        object.__setattr__(self, "cameras", _checked_cameras(self.cameras))

    @property
    def speed_mps(self) -> float:
        """Longitudinal speed now (m/s)."""
        return float(self.ego_history[-1, 3])


@dataclass(frozen=True)
class SceneReference:
    """What only the simulator may see. World frame of the source (UTM or local), float64; metres, seconds, radians.

    A agents, P map polygons with V vertices, R red-light polygons, C centreline points, 51 steps of 0.1 s from now.
    Ego state vector (11): x, y, heading, vx, vy, ax, ay, steering, steering rate, yaw rate, yaw acceleration at the
    rear axle; pose in the world frame, velocity and acceleration in the body frame (NAVSIM `StateIndex`).
    """

    t0_us: int
    """Time of t=0 (microseconds); NAVSIM truncates query times, so the absolute value matters at 1e-5 m."""
    ego_init: NDArray[np.float64]
    """``[11]`` ego state at t=0."""
    prev_t0_us: int
    """Time of the previous frame (about 0.5 s earlier); 0 if unknown."""
    prev_ego_init: NDArray[np.float64]
    """``[11]`` ego state of the previous frame (two-frame comfort); ``[0]`` if unknown."""
    past_times_us: NDArray[np.int64]
    """``[4]`` times of `past_states`; ``[0]`` if unknown."""
    past_states: NDArray[np.float64]
    """``[4, 11]`` logged ego states at about -1.5, -1, -0.5, 0 s (history comfort); ``[0, 11]`` if unknown."""
    human_poses: NDArray[np.float64]
    """``[8, 3]`` the human's future rear-axle poses in the t=0 ego frame, 0.5 … 4.0 s; ``[0, 3]`` if unknown."""
    centerline: NDArray[np.float64]
    """``[C, 3]`` x, y, heading of the route's centreline; from the ego or behind it to >= 400 m ahead where it can."""
    speed_limit: float
    """m/s of the starting lane; NaN if unknown (PDM-Closed then takes 15)."""
    map_xy: NDArray[np.float64]
    """``[V, 2]`` vertices of simple, unclosed polygons."""
    map_offsets: NDArray[np.int64]
    """``[P + 1]`` polygon p is ``map_xy[map_offsets[p]:map_offsets[p + 1]]``."""
    map_layer: NDArray[np.int8]
    """``[P]`` :class:`MapLayer`."""
    map_on_route: NDArray[np.bool_]
    """``[P]`` lane or connector whose id is among NAVSIM's `route_lane_ids`."""
    red_xy: NDArray[np.float64]
    """Vertices of lane-connector polygons that are red at some step."""
    red_offsets: NDArray[np.int64]
    """``[R + 1]``."""
    red_on_route: NDArray[np.bool_]
    """``[R]`` only these count."""
    red_active: NDArray[np.bool_]
    """``[R, 51]`` red at that step."""
    agent_pose: NDArray[np.float64]
    """``[A, 51, 3]`` box-centre poses; arbitrary where not valid."""
    agent_velocity: NDArray[np.float64]
    """``[A, 51, 2]`` world-frame velocity; "stopped" uses the first valid step."""
    agent_valid: NDArray[np.bool_]
    """``[A, 51]`` presence."""
    agent_size: NDArray[np.float64]
    """``[A, 2]`` length, width."""
    agent_type: NDArray[np.int8]
    """``[A]`` :class:`AgentType`."""
    pdm_reference_v1: NDArray[np.float64]
    """``[41, 3]`` PDM-Closed reference as NAVSIM v1.1 chooses it, 10 Hz, world frame; ``[0, 3]`` until computed."""
    pdm_reference_v2: NDArray[np.float64]
    """``[41, 3]`` the same by v2.2; ``[0, 3]`` until computed."""

    def __post_init__(self) -> None:
        _checked(self, "ego_init", (11,), np.float64)
        _checked_or_empty(self, "prev_ego_init", (11,), np.float64)
        _checked_or_empty(self, "past_times_us", (4,), np.int64)
        _checked_or_empty(self, "past_states", (4, 11), np.float64)
        _checked_or_empty(self, "human_poses", (NUM_POSES, 3), np.float64)
        if len(self.past_times_us) != len(self.past_states):
            raise DataError(
                f"SceneReference has {len(self.past_times_us)} past_times_us for {len(self.past_states)} past_states."
            )
        _checked(self, "centerline", (None, 3), np.float64)
        for xy, offsets in (("map_xy", "map_offsets"), ("red_xy", "red_offsets")):
            _checked(self, xy, (None, 2), np.float64)
            _checked(self, offsets, (None,), np.int64)
        _checked(self, "map_layer", (None,), np.int8)
        _checked(self, "map_on_route", (len(self.map_layer),), np.bool_)
        _check_offsets(self, "map_offsets", len(self.map_xy), len(self.map_layer))
        _checked(self, "red_on_route", (None,), np.bool_)
        _checked(self, "red_active", (len(self.red_on_route), REFERENCE_STEPS), np.bool_)
        _check_offsets(self, "red_offsets", len(self.red_xy), len(self.red_on_route))
        _checked(self, "agent_type", (None,), np.int8)
        a = len(self.agent_type)
        _checked(self, "agent_pose", (a, REFERENCE_STEPS, 3), np.float64)
        _checked(self, "agent_velocity", (a, REFERENCE_STEPS, 2), np.float64)
        _checked(self, "agent_valid", (a, REFERENCE_STEPS), np.bool_)
        _checked(self, "agent_size", (a, 2), np.float64)
        for name in ("pdm_reference_v1", "pdm_reference_v2"):
            _checked(self, name, (None, 3), np.float64)
        if len(self.centerline) < 2:
            raise DataError(f"SceneReference.centerline needs at least two points; got {len(self.centerline)}.")
        if (self.agent_size < 0.0).any():
            raise DataError(f"SceneReference.agent_size must not be negative; got {self.agent_size.min():g} m.")
        _check_codes(self, "map_layer", MapLayer)
        _check_codes(self, "agent_type", AgentType)
        if len(self.map_layer) == 0:
            raise DataError("SceneReference holds no map polygon: an empty map would make every plan leave the road.")
        object.__setattr__(self, "t0_us", int(self.t0_us))
        object.__setattr__(self, "prev_t0_us", int(self.prev_t0_us))
        object.__setattr__(self, "speed_limit", float(self.speed_limit))


@dataclass(frozen=True)
class Scene:
    """One driving situation."""

    token: str
    """Unique name."""
    kind: str
    """Situation kind: a generator kind (`cut_in`, …) or the data set it was imported from."""
    cluster: str
    """Recordings (or generator seeds) that overlap share a cluster; a split never divides one."""
    challenging: bool
    """Constant velocity below 0.8 PDMS while the human reaches 0.8."""
    observation: Observation
    """All that a policy may see."""
    reference: SceneReference
    """What only the scorer may see."""

    def with_reference(self, **changes: object) -> Scene:
        """The scene with fields of its reference replaced; the observation stays the same object."""
        known = {f.name for f in fields(SceneReference)}
        if unknown := set(changes) - known:
            raise DataError(f"SceneReference has no field {sorted(unknown)}.")
        return replace(self, reference=replace(self.reference, **changes))  # type: ignore[arg-type]
