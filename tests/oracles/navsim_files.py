"""Metric caches and logs written as NAVSIM's packages write them, by classes that stand in for theirs.

Only names, attributes and ways of pickling are modelled, as far as they reach the file.
"""

from __future__ import annotations

import lzma
import pickle
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import shapely

from rlhf_drive.scenes import AgentType, MapLayer, Observation, SceneReference, to_world_frame

PDM = "navsim.planning.simulation.planner.pdm_planner"
STATE = "nuplan.common.actor_state"
REAR_AXLE_TO_CENTER = 1.461
LAYERS = {
    MapLayer.LANE: 0,
    MapLayer.INTERSECTION: 1,
    MapLayer.DRIVABLE_AREA: 5,
    MapLayer.LANE_CONNECTOR: 11,
    MapLayer.CARPARK_AREA: 15,
    MapLayer.ROADBLOCK: 17,
}
TYPES = {AgentType.VEHICLE: 0, AgentType.PEDESTRIAN: 1, AgentType.BICYCLE: 2, AgentType.STATIC: 6}
NAMES = {AgentType.VEHICLE: "vehicle", AgentType.PEDESTRIAN: "pedestrian", AgentType.BICYCLE: "bicycle"}


class _Slots:
    """Pickled as a pair of None and the slots' values, as classes with ``__slots__`` are."""

    def __init__(self, **values: Any) -> None:
        self.values = values

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        import copyreg

        return copyreg.__newobj__, (type(self),), (None, self.values)  # type: ignore[attr-defined]


class _Dict:
    """Pickled with its attributes as a dict."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


class _Call:
    """Pickled as a call of its class."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self.args


class Stand:
    """The stand-in classes, by name."""

    def __init__(self) -> None:
        self.modules: dict[str, ModuleType] = {}
        for module, name, base in (
            (f"{STATE}.state_representation", "StateSE2", _Slots),
            (f"{STATE}.state_representation", "StateVector2D", _Slots),
            (f"{STATE}.state_representation", "TimePoint", _Slots),
            (f"{STATE}.ego_state", "EgoState", _Dict),
            (f"{STATE}.car_footprint", "CarFootprint", _Dict),
            (f"{STATE}.dynamic_car_state", "DynamicCarState", _Dict),
            (f"{STATE}.vehicle_parameters", "VehicleParameters", _Call),
            (f"{STATE}.agent", "Agent", _Dict),
            (f"{STATE}.static_object", "StaticObject", _Dict),
            (f"{STATE}.oriented_box", "OrientedBox", _Dict),
            (f"{STATE}.scene_object", "SceneObjectMetadata", _Dict),
            (f"{STATE}.tracked_objects", "TrackedObjects", _Dict),
            (f"{STATE}.tracked_objects_types", "TrackedObjectType", _Call),
            ("nuplan.common.maps.maps_datatypes", "SemanticMapLayer", _Call),
            ("nuplan.planning.simulation.observation.observation_type", "DetectionsTracks", _Dict),
            ("nuplan.planning.simulation.trajectory.interpolated_trajectory", "InterpolatedTrajectory", _Call),
            ("nuplan.planning.simulation.trajectory.trajectory_sampling", "TrajectorySampling", _Dict),
            ("navsim.common.dataclasses", "Trajectory", _Dict),
            ("navsim.common.enums", "SceneFrameType", _Call),
            ("navsim.planning.metric_caching.metric_cache", "MetricCache", _Dict),
            ("navsim.planning.metric_caching.metric_cache", "MapParameters", _Dict),
            (f"{PDM}.observation.pdm_observation", "PDMObservation", _Dict),
            (f"{PDM}.observation.pdm_occupancy_map", "PDMOccupancyMap", _Call),
            (f"{PDM}.observation.pdm_occupancy_map", "PDMDrivableMap", _Call),
            (f"{PDM}.utils.pdm_path", "PDMPath", _Call),
        ):
            cls = type(name, (base,), {"__module__": module})
            setattr(self, name, cls)
            for end in range(1, module.count(".") + 2):
                above = ".".join(module.split(".")[:end])
                self.modules.setdefault(above, ModuleType(above))
            setattr(self.modules[module], name, cls)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    @contextmanager
    def importable(self) -> Iterator[None]:
        """Let pickle find the classes while it writes."""
        sys.modules.update(self.modules)
        try:
            yield
        finally:
            for name in self.modules:
                del sys.modules[name]

    def dump(self, path: Path, cache: Any, protocol: int = 5) -> Path:
        """Write `cache` as NAVSIM does."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with self.importable():
            path.write_bytes(lzma.compress(pickle.dumps(cache, protocol), preset=0))
        return path


STAND = Stand()


def pose(xyh: Sequence[float]) -> Any:
    """`StateSE2` of NumPy numbers."""
    return STAND.StateSE2(x=np.float64(xyh[0]), y=np.float64(xyh[1]), heading=np.float64(xyh[2]))


def vector(xy: Sequence[float]) -> Any:
    """`StateVector2D`."""
    return STAND.StateVector2D(_x=np.float64(xy[0]), _y=np.float64(xy[1]), _array=np.asarray(xy, dtype=np.float64))


def ego(time_us: int, state: np.ndarray, *, cached_rear_axle: bool = True) -> Any:
    """`EgoState`; nuPlan caches the rear axle in the footprint once somebody has asked for it."""
    offset = REAR_AXLE_TO_CENTER * np.array([np.cos(state[2]), np.sin(state[2])])
    center = pose([state[0] + offset[0], state[1] + offset[1], state[2]])
    footprint = STAND.CarFootprint(_center=center, _length=5.176, _width=2.297, _height=1.777)
    footprint._vehicle_parameters = STAND.VehicleParameters(2.297, 4.049, 1.127, 1.67, 3.089, "pacifica", "gen1", 1.777)
    if cached_rear_axle:
        footprint.rear_axle = pose(state[:3])
    return STAND.EgoState(
        _car_footprint=footprint,
        _tire_steering_angle=float(state[7]),
        _is_in_auto_mode=True,
        _time_point=STAND.TimePoint(time_us=int(time_us)),
        _dynamic_car_state=STAND.DynamicCarState(
            _rear_axle_to_center_dist=REAR_AXLE_TO_CENTER,
            _angular_velocity=state[9],
            _angular_acceleration=state[10],
            _rear_axle_velocity_2d=vector(state[3:5]),
            _rear_axle_acceleration_2d=vector(state[5:7]),
            _tire_steering_rate=state[8],
        ),
    )


def road_user(ref: SceneReference, token: str, a: int, k: int, first_us: int) -> Any:
    """`Agent` or `StaticObject` a at step k."""
    box = STAND.OrientedBox(
        _center=pose(ref.agent_pose[a, k]), _length=ref.agent_size[a, 0], _width=ref.agent_size[a, 1], _height=1.6
    )
    kind = AgentType(int(ref.agent_type[a]))
    shared = {
        "_metadata": STAND.SceneObjectMetadata(
            timestamp_us=first_us, token=token, track_id=None, track_token=token, category_name=None
        ),
        "instance_token": None,
        "_tracked_object_type": STAND.TrackedObjectType(TYPES[kind]),
        "_box": box,
    }
    if kind == AgentType.STATIC:
        return STAND.StaticObject(**shared, velocity=vector([0.0, 0.0]), predictions=None)
    return STAND.Agent(**shared, _velocity=vector(ref.agent_velocity[a, k]), _predictions=[], _angular_velocity=None)


def outline(ref: SceneReference, a: int, k: int) -> shapely.Polygon:
    """Corners front left, rear left, rear right, front right."""
    x, y, heading = ref.agent_pose[a, k]
    half = ref.agent_size[a] / 2.0
    corners = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]) * half
    cos, sin = np.cos(heading), np.sin(heading)
    return shapely.Polygon(corners @ np.array([[cos, sin], [-sin, cos]]) + [x, y])


def rings(xy: np.ndarray, offsets: np.ndarray) -> list[shapely.Polygon]:
    return [shapely.Polygon(ring) for ring in np.split(xy, offsets[1:-1])] if len(offsets) > 1 else []


def tracks(items: list[Any]) -> Any:
    return STAND.DetectionsTracks(tracked_objects=STAND.TrackedObjects(tracked_objects=items))


def objects(items: Sequence[Any]) -> np.ndarray:
    """An array of objects with one dimension."""
    array = np.empty(len(items), dtype=object)
    array[:] = list(items)
    return array


def asked_us(t0_us: int, step: int) -> int:
    """When the scorer asks for a step: truncated to a microsecond, so that what it gets is what lies there."""
    return int((0.1 * step + t0_us * 1e-6) * 1e6)


def metric_cache(
    ref: SceneReference,
    version: str,
    *,
    log: str = "log",
    token: str = "token",
    agent_tokens: Sequence[str] | None = None,
    map_tokens: Sequence[str] | None = None,
    past: Sequence[Any] = (),
    first_us: dict[str, int] | None = None,
    **changes: Any,
) -> Any:
    """`MetricCache` of `version` (``v1.1``, ``v2.2``) that describes `ref`.

    Args:
        ref: The world; its reference of that version becomes the planner's trajectory.
        version: Which.
        log: Name of the log.
        token: Token of the scene.
        agent_tokens: Track tokens, default ``trk0`` and so on.
        map_tokens: Ids of polygons, default their numbers.
        past: `DetectionsTracks` of the frames before.
        first_us: When a road user was first annotated; t=0 unless given.
        changes: Attributes to replace.
    """
    steps = 51 if version == "v1.1" else 41
    names = list(agent_tokens or [f"trk{a}" for a in range(len(ref.agent_type))])
    seen_us = dict.fromkeys(names, ref.t0_us) | (first_us or {})
    made = [
        [(names[a], road_user(ref, names[a], a, k, seen_us[names[a]])) for a in np.flatnonzero(ref.agent_valid[:, k])]
        for k in range(steps)
    ]
    boxes = [[outline(ref, a, k) for a in np.flatnonzero(ref.agent_valid[:, k])] for k in range(steps)]
    unique: dict[str, Any] = {}
    for step in made:
        for name, item in step:
            unique.setdefault(name, item)
    ids = list(map_tokens or [str(100 + p) for p in range(len(ref.map_layer))])
    reds = rings(ref.red_xy, ref.red_offsets)
    lit = [[r for r in np.flatnonzero(ref.red_active[:, k]) if ref.red_on_route[r]] for k in range(steps)]
    lights = [([f"red_light_{900 + r}" for r in step], objects([reds[r] for r in step])) for step in lit]
    observation = STAND.PDMObservation(
        _sample_interval=0.1,
        _observation_samples=steps - 1,
        _collided_track_ids=[],
        _red_light_token="red_light",
        _unique_objects=unique,
        _initialized=True,
        _occupancy_maps=[
            STAND.PDMOccupancyMap([name for name, _ in step], box, 10) for step, box in zip(made, boxes, strict=True)
        ],
    )
    planned = ref.pdm_reference_v1 if version == "v1.1" else ref.pdm_reference_v2
    fields: dict[str, Any] = {
        "file_path": Path("exp") / log / "unknown" / token / "metric_cache.pkl",
        "trajectory": STAND.InterpolatedTrajectory(
            [ego(asked_us(ref.t0_us, k), np.concatenate([p, np.zeros(8)])) for k, p in enumerate(planned)]
        ),
        "ego_state": ego(ref.t0_us, ref.ego_init, cached_rear_axle=False),
        "observation": observation,
        "centerline": STAND.PDMPath([pose(p) for p in ref.centerline]),
        "route_lane_ids": [ids[p] for p in np.flatnonzero(ref.map_on_route)],
        "drivable_area_map": STAND.PDMDrivableMap(
            ids,
            [STAND.SemanticMapLayer(LAYERS[MapLayer(int(layer))]) for layer in ref.map_layer],
            rings(ref.map_xy, ref.map_offsets),
            10,
        ),
    }
    if version == "v2.2":
        observation._occupancy_maps_tl = lights
        observation._detections_tracks = [tracks([item for _, item in step]) for step in made]
        sampling = STAND.TrajectorySampling(num_poses=8, time_horizon=4.0, interval_length=0.5)
        human = STAND.Trajectory(poses=ref.human_poses, trajectory_sampling=sampling) if len(ref.human_poses) else None
        past_states = [ego(t, s) for t, s in zip(ref.past_times_us, ref.past_states, strict=True)]
        fields |= {
            "log_name": log,
            "timepoint": STAND.TimePoint(time_us=ref.t0_us),
            "scene_type": STAND.SceneFrameType(0 if human is not None else 1),
            "human_trajectory": human,
            "past_human_trajectory": STAND.InterpolatedTrajectory(past_states),
            "past_detections_tracks": list(past),
            "current_tracked_objects": [tracks([item for name, item in made[0] if seen_us[name] == ref.t0_us])],
            "future_tracked_objects": observation._detections_tracks[1:],
            "map_parameters": STAND.MapParameters(map_root="", map_version="", map_name=""),
        }
    return STAND.MetricCache(**{**fields, **changes})


def quaternion(yaw: float, pitch: float = 0.0, roll: float = 0.0) -> list[float]:
    """w, x, y, z of the rotation by yaw, then pitch, then roll about fixed axes."""

    def about(axis: int, angle: float) -> np.ndarray:
        q = np.zeros(4)
        q[0], q[1 + axis] = np.cos(angle / 2), np.sin(angle / 2)
        return q

    def times(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        vector = a[0] * b[1:] + b[0] * a[1:] + np.cross(a[1:], b[1:])
        return np.array([a[0] * b[0] - a[1:] @ b[1:], *vector])

    return times(about(0, roll), times(about(1, pitch), about(2, yaw))).tolist()


def log_frames(
    observation: Observation,
    states: np.ndarray,
    times_us: Sequence[int],
    tokens: Sequence[str],
    *,
    log: str = "log",
    red: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Frames of a NAVSIM log in which frame 3 sees `observation`.

    Args:
        observation: What is seen; its agents are at frames 0 to 3, of which the later ones see nobody.
        states: ``[n, 11]`` ego states, world frame; frame 3 is now.
        times_us: ``[n]``.
        tokens: ``[n]``.
        log: Name of the log.
        red: Ids of red connectors.
    """
    frames = []
    for k, (state, time_us, token) in enumerate(zip(states, times_us, tokens, strict=True)):
        here = np.flatnonzero(observation.agents_valid[:, k]) if k < 4 else np.zeros(0, dtype=np.int64)
        agents = observation.agents[here, min(k, 3)].astype(np.float64)
        world = to_world_frame(agents[:, :3], states[3])
        turn = states[3, 2] - state[2]
        delta = world[:, :2] - state[:2]
        cos, sin = np.cos(state[2]), np.sin(state[2])
        boxes = np.zeros((len(here), 7))
        boxes[:, 0] = cos * delta[:, 0] + sin * delta[:, 1]
        boxes[:, 1] = cos * delta[:, 1] - sin * delta[:, 0]
        boxes[:, 3:5], boxes[:, 5], boxes[:, 6] = observation.agents_size[here], 1.6, world[:, 2] - state[2]
        velocity = np.zeros((len(here), 3))
        velocity[:, 0] = np.cos(turn) * agents[:, 3] - np.sin(turn) * agents[:, 4]
        velocity[:, 1] = np.sin(turn) * agents[:, 3] + np.cos(turn) * agents[:, 4]
        frames.append(
            {
                "token": token,
                "frame_idx": k,
                "timestamp": int(time_us),
                "log_name": log,
                "scene_token": "scene",
                "map_location": "us-ma-boston",
                "roadblock_ids": ["1", "2"],
                "ego2global_translation": np.array([*state[:2], 1.0]),
                "ego2global_rotation": quaternion(state[2]),
                "ego_dynamic_state": [float(v) for v in state[3:7]],
                "driving_command": np.eye(4, dtype=np.int64)[observation.command],
                "traffic_lights": [(int(i), True) for i in red] + [(7, False)],
                "anns": {
                    "gt_boxes": boxes,
                    "gt_names": np.array(
                        [NAMES.get(AgentType(int(observation.agents_type[a])), "barrier") for a in here]
                    ),
                    "gt_velocity_3d": velocity,
                    "instance_tokens": [f"i{a}" for a in here],
                    "track_tokens": [f"track{a}" for a in here],
                },
                "cams": {"CAM_F0": {"data_path": f"{log}/CAM_F0/{k}.jpg", "cam_intrinsic": np.eye(3)}, "CAM_B0": {}},
                "lidar_path": f"{log}/{k}.pcd",
            }
        )
    return frames
