"""Reading one recording of the neutral format: a JSON with what it is, an NPZ with what was recorded."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf_drive.errors import DataError
from rlhf_drive.scenes.model import AgentType

__all__ = ["STEP_S", "Array", "Lane", "Recording", "read_recording"]

Array = NDArray[np.float64]

STEP_S = 0.1
"""Seconds between two samples of a recording."""
MAX_SPAN_M = 20_000.0
"""A map that is wider has a broken coordinate, and would fill the memory when it is resampled."""
_KINDS = {
    "WOMD": "real_womd",
    "nuScenes": "real_nuscenes",
    "Argoverse2-Sensor": "real_argoverse2",
    "NGSIM(CommonRoad)": "real_ngsim",
}
_START_LISTS = {
    "recommended": "recommended_start_indices",
    "moving": "moving_start_indices",
    "all": "valid_start_indices",
}
_LANE_LINES = ("lane", "lane_left", "lane_right")
_LINES = (*_LANE_LINES, "drivable", "edge", "crosswalk")
_AGENT_KEYS = ("agents_x", "agents_y", "agents_heading", "agents_vx", "agents_vy")


@dataclass(frozen=True)
class Lane:
    """One lane as recorded; lines run in the direction of travel."""

    center: Array
    """``[n, 2]``."""
    left: Array
    """``[n, 2]`` boundary."""
    right: Array
    """``[n, 2]`` boundary."""
    type: int
    """0 street, 1 freeway, 2 bicycle, 3 sidewalk or crosswalk."""
    limit: float
    """m/s; NaN if not recorded."""
    flag: int
    """1 in an intersection, 0 not, -1 not recorded."""

    @property
    def for_vehicles(self) -> bool:
        """Whether cars drive here."""
        return self.type <= 1


@dataclass(frozen=True)
class Recording:
    """A recording of T samples at 10 Hz with N agents, in the source's axes (metres, radians)."""

    name: str
    """File name without suffix."""
    kind: str
    """Scene kind: `real_womd`, `real_nuscenes`, `real_argoverse2`, `real_ngsim`."""
    cluster: str
    """Recordings near each other share it."""
    starts: Mapping[str, tuple[int, ...]]
    """Sample indices to start at: recommended, moving, all."""
    ego: Array
    """``[T, 5]`` x, y, heading of the box centre, world velocity."""
    agent_pose: Array
    """``[N, T, 3]`` box centres."""
    agent_velocity: Array
    """``[N, T, 2]`` world frame."""
    agent_valid: NDArray[np.bool_]
    """``[N, T]``."""
    agent_size: Array
    """``[N, 2]`` length, width."""
    agent_type: NDArray[np.int8]
    """``[N]`` values of AgentType."""
    lanes: tuple[Lane, ...]
    """All lanes."""
    links: frozenset[tuple[int, int]]
    """Pairs (lane, its successor)."""
    light_lane: NDArray[np.int64]
    """``[K]`` lane that each signal governs."""
    light_state: NDArray[np.int64]
    """``[K, T]`` 0 unknown, 1 red, 2 yellow, 3 green."""
    drivable: tuple[tuple[Array, tuple[Array, ...]], ...]
    """Drivable polygons: outer ring and holes."""
    edges: tuple[Array, ...]
    """Road edges, as recorded."""
    crosswalks: tuple[Array, ...]
    """Closed rings."""
    route: tuple[int, ...]
    """Lanes of the navigation route."""
    logged_route: tuple[int, ...]
    """The lanes of the route that the recording reaches."""


def read_recording(path: Path) -> Recording:
    """Read the recording whose JSON is `path`; its NPZ lies beside it. Nothing is unpickled.

    Raises:
        DataError: A file is missing, truncated, lacks keys, or holds shapes or values that cannot be used.
    """
    info = _read_json(path)
    arrays = _read_arrays(path.with_suffix(".npz"))
    try:
        return _recording(path.stem, info, arrays)
    except KeyError as error:
        raise DataError(f"lacks the key {error}") from error
    except (TypeError, ValueError, IndexError) as error:
        raise DataError(f"cannot be used: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path.name} is not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path.name} must hold a JSON object; got {type(content).__name__}")
    return content


def _read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except FileNotFoundError as error:
        raise DataError(f"{path.name} is missing") from error
    except (
        OSError,
        ValueError,
        TypeError,
        AttributeError,
        EOFError,
        KeyError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise DataError(f"{path.name} is not a complete NPZ archive of plain arrays: {error}") from error


def _recording(name: str, info: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> Recording:
    if info["dataset"] not in _KINDS:
        raise DataError(f"data set {info['dataset']!r} is unknown; known: {', '.join(_KINDS)}")
    if abs(float(info["dt"]) - STEP_S) > 1e-6:
        raise DataError(f"samples must be {STEP_S} s apart; got {info['dt']}")
    lines = {key: _polylines(arrays, key) for key in _LINES}
    lanes = _lanes(arrays, lines)
    pose, velocity, valid = _tracks(arrays)
    route = tuple(int(lane) for lane in arrays["route_lane"] if lanes[int(lane)].for_vehicles)
    reached = arrays["route_lane"][: int(arrays["route_lane_n_logged"])]
    logged = tuple(int(lane) for lane in reached if int(lane) in route)
    return Recording(
        name=name,
        kind=_KINDS[info["dataset"]],
        cluster=f"recorded-{info['leak_cluster']}",
        starts={key: tuple(int(i) for i in info[listed]) for key, listed in _START_LISTS.items()},
        ego=_array(arrays, "ego", (valid.shape[1], 5), finite=False),
        agent_pose=pose,
        agent_velocity=velocity,
        agent_valid=valid,
        agent_size=_array(arrays, "agents_size", (len(valid), 2)),
        agent_type=_agent_types(arrays["agents_type"], len(valid)),
        lanes=lanes,
        links=frozenset((int(a), int(b)) for a, b in _indices(arrays["lane_succ"], len(lanes), "lane_succ")),
        light_lane=_indices(arrays["tl_lane"], len(lanes), "tl_lane"),
        light_state=np.asarray(arrays["tl_state"], dtype=np.int64).reshape(len(arrays["tl_lane"]), valid.shape[1]),
        drivable=_drivable(lines["drivable"], arrays["drivable_poly"], arrays["drivable_hole"]),
        edges=tuple(line for line in lines["edge"] if len(line) > 1),
        crosswalks=tuple(ring for ring in lines["crosswalk"] if len(ring) > 2),
        route=route,
        logged_route=logged,
    )


def _array(
    arrays: Mapping[str, NDArray[Any]], key: str, shape: tuple[int | None, ...], *, finite: bool = True
) -> Array:
    array = np.asarray(arrays[key], dtype=np.float64)
    if array.ndim != len(shape) or any(s not in (None, n) for s, n in zip(shape, array.shape, strict=True)):
        raise DataError(f"{key} has shape {list(array.shape)}; expected {list(shape)}")
    if finite and not np.isfinite(array).all():
        raise DataError(f"{key} holds a value that is not finite")
    return array


def _indices(array: NDArray[Any], count: int, key: str) -> NDArray[np.int64]:
    """Lane indices as integers, each inside the list of lanes."""
    index = np.asarray(array, dtype=np.int64)
    if index.size and (index.min() < 0 or index.max() >= count):
        raise DataError(f"{key} names a lane outside 0 … {count - 1}")
    return index


def _agent_types(array: NDArray[Any], count: int) -> NDArray[np.int8]:
    """One known `AgentType` per agent."""
    if array.shape != (count,) or not np.isin(array, list(AgentType)).all():
        raise DataError(f"agents_type must hold {count} of the numbers {', '.join(str(int(t)) for t in AgentType)}")
    return np.asarray(array, dtype=np.int8)


def _polylines(arrays: Mapping[str, NDArray[Any]], key: str) -> list[Array]:
    xy = _array(arrays, f"{key}_xy", (None, 2))
    if len(xy) and (span := float(np.ptp(xy, axis=0).max())) > MAX_SPAN_M:
        raise DataError(f"{key}_xy spans {span:.3g} m; at most {MAX_SPAN_M:g} m is the map of one recording")
    offsets = np.asarray(arrays[f"{key}_off"], dtype=np.int64)
    if offsets.ndim != 1 or offsets[0] != 0 or offsets[-1] != len(xy) or (np.diff(offsets) < 0).any():
        raise DataError(f"{key}_off must rise from 0 to {len(xy)}")
    return [xy[a:b] for a, b in pairwise(offsets)]


def _lanes(arrays: Mapping[str, NDArray[Any]], lines: Mapping[str, list[Array]]) -> tuple[Lane, ...]:
    keys = ("lane_type", "lane_speed_limit", "lane_in_intersection")
    columns = [lines[key] for key in _LANE_LINES] + [arrays[key] for key in keys]
    if len({len(column) for column in columns}) != 1:
        raise DataError("the arrays of the lanes differ in length")
    lanes = tuple(Lane(c, a, b, int(t), float(v), int(f)) for c, a, b, t, v, f in zip(*columns, strict=True))
    if not any(lane.for_vehicles for lane in lanes):
        raise DataError("the map is empty: no lane for vehicles")
    for number, lane in enumerate(lanes):
        if lane.for_vehicles:
            short = min(len(lane.center), len(lane.left), len(lane.right)) < 2
            if short or np.hypot(*np.diff(lane.center, axis=0).T).sum() < 1e-3:
                raise DataError(f"lane {number} is degenerate: a line without length")
    return lanes


def _drivable(
    rings: list[Array], owner: NDArray[Any], hole: NDArray[Any]
) -> tuple[tuple[Array, tuple[Array, ...]], ...]:
    """Outer ring and holes of each polygon; none where the map has no drivable area apart from its lanes."""
    polygons = []
    for polygon in np.unique(owner):
        mine = [(rings[i], bool(hole[i])) for i in np.flatnonzero(owner == polygon) if len(rings[i]) > 2]
        outer = [ring for ring, is_hole in mine if not is_hole]
        if outer:
            polygons.append((outer[0], tuple(ring for ring, is_hole in mine if is_hole)))
    if not polygons:
        raise DataError("the map is empty: no drivable area")
    return tuple(polygons)


def _tracks(arrays: Mapping[str, NDArray[Any]]) -> tuple[Array, Array, NDArray[np.bool_]]:
    """Poses ``[N, T, 3]``, velocities ``[N, T, 2]`` and validity of the agents."""
    valid = np.asarray(arrays["agents_valid"], dtype=np.bool_)
    if valid.ndim != 2:
        raise DataError(f"agents_valid has shape {list(valid.shape)}; expected [N, T]")
    columns = [np.where(valid, _array(arrays, key, valid.shape, finite=False), 0.0) for key in _AGENT_KEYS]
    for key, column in zip(_AGENT_KEYS, columns, strict=True):
        if not np.isfinite(column).all():
            raise DataError(f"{key} holds a value that is not finite")
    return np.stack(columns[:3], axis=-1), np.stack(columns[3:], axis=-1), valid
