"""Scenes from real recordings in the neutral format: one JSON and one NPZ each.

A recording is read once, and what its starts share (polygons, drivable area, neighbours of lanes) is made once.
Whatever cannot be used becomes a :class:`Refused` with its reason; the rest is imported.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from rlhf_drive.errors import DataError
from rlhf_drive.scenes.model import Scene, SceneReference

if TYPE_CHECKING:
    from rlhf_drive.scenes.importers.recorded_agents import Tracks
    from rlhf_drive.scenes.importers.recorded_ego import EgoLog
    from rlhf_drive.scenes.importers.recorded_map import RecordedMap
    from rlhf_drive.scenes.importers.recorded_observation import MapLines
    from rlhf_drive.scenes.importers.recorded_route import Route, RouteFinder

__all__ = ["Refused", "Starts", "import_recording", "import_recordings", "recording_paths"]

Starts = Literal["recommended", "moving", "all"]
"""Which samples become scenes: 2 s apart, every usable one that moves, or every usable one."""

_CLOCK_US = 100_000_000
"""Time of a recording's first sample: positive, so that times before it never turn negative."""
_STEP_US = 100_000
_HISTORY_US = np.array([-1_500_000, -1_000_000, -500_000, 0])


@dataclass(frozen=True)
class Refused:
    """A recording or a start that was not imported."""

    token: str
    """Token of the scene, or name of the recording if none of its starts could be used."""
    reason: str
    """What is wrong."""


def recording_paths(folder: Path) -> list[Path]:
    """JSON paths of all recordings in `folder`, sorted; a file without its partner counts, to be refused by name.

    Raises:
        DataError: The folder holds no recording.
    """
    folder = Path(folder)
    names = {path.stem for path in folder.glob("*.npz")}
    names |= {path.stem for path in folder.glob("*.json") if path.stem not in names and _describes_recording(path)}
    if not names:
        raise DataError(f"{folder} holds no recordings (pairs of <name>.json and <name>.npz). Check scenes.path.")
    return [folder / f"{name}.json" for name in sorted(names)]


def _describes_recording(path: Path) -> bool:
    """Whether a JSON without NPZ is a recording's, rather than a list that lies beside them."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return True
    return isinstance(content, dict) and "dataset" in content


def import_recordings(
    folder: Path, *, starts: Starts, steering: bool = True, workers: int = 1
) -> Iterator[Scene | Refused]:
    """Scenes of all recordings in `folder`, ordered by recording and start, whatever the number of workers.

    Args:
        folder: Folder of ``<name>.json`` and ``<name>.npz``.
        starts: Which samples become scenes.
        steering: Whether state 0 gets the steering angle that holds the recorded yaw rate.
        workers: Processes; 1 stays in this one.

    Yields:
        Scenes without progress references (`pdm_reference_v1` and `_v2` are empty), or refusals.

    Raises:
        DataError: The folder holds no recording.
    """
    paths, convert = recording_paths(folder), partial(import_recording, starts=starts, steering=steering)
    if workers <= 1:
        for path in paths:
            yield from convert(path)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for items in pool.map(convert, paths):
            yield from items


def import_recording(path: Path, starts: Starts, steering: bool = True) -> list[Scene | Refused]:
    """All scenes of one recording, in order of their starts; the unit of parallel work.

    Args:
        path: The recording's JSON; its NPZ lies beside it.
        starts: Which samples become scenes.
        steering: Whether state 0 gets the steering angle that holds the recorded yaw rate.

    Returns:
        One scene or refusal per start; a single refusal if nothing of the recording can be used.
    """
    path = Path(path)
    try:
        source, indices = _open(path, starts)
    except DataError as error:
        return [Refused(path.stem, str(error))]
    found: list[Scene | Refused] = []
    for index in indices:
        token = f"{path.stem}__{index:03d}"
        try:
            found.append(_scene(source, token, index, steering))
        except DataError as error:
            found.append(Refused(token, str(error)))
    return found


@dataclass(frozen=True)
class _Source:
    """What all scenes of one recording share."""

    ego: EgoLog
    tracks: Tracks
    map: RecordedMap
    routes: RouteFinder
    lines: MapLines


def _open(path: Path, starts: Starts) -> tuple[_Source, tuple[int, ...]]:
    """Read a recording and prepare what its scenes share; its start indices."""
    import shapely

    from rlhf_drive.scenes.importers.recorded_agents import fill_tracks
    from rlhf_drive.scenes.importers.recorded_ego import EgoLog
    from rlhf_drive.scenes.importers.recorded_lanes import LaneShapes
    from rlhf_drive.scenes.importers.recorded_map import RecordedMap
    from rlhf_drive.scenes.importers.recorded_observation import MapLines
    from rlhf_drive.scenes.importers.recorded_reading import read_recording
    from rlhf_drive.scenes.importers.recorded_route import RouteFinder

    recording = read_recording(path)
    try:
        shapes = LaneShapes(recording)
        world = RecordedMap(shapes)
        lines = MapLines(recording, frozenset(shapes.connectors))
        source = _Source(EgoLog(recording), fill_tracks(recording), world, RouteFinder(shapes), lines)
        if not world.drivable:
            raise DataError("the map is empty: the drivable area has no size")
    except shapely.errors.ShapelyError as error:
        raise DataError(f"degenerate geometry: {error}") from error
    return source, recording.starts[starts]


def _scene(source: _Source, token: str, start: int, steering: bool) -> Scene:
    import shapely

    from rlhf_drive.scenes.importers.recorded_observation import observe_recording

    source.ego.check_window(start)
    recording = source.ego.recording
    try:
        route = source.routes.find(source.ego.pose[start], float(source.ego.speed[start]))
        reference = _reference(source, route, start, steering)
    except shapely.errors.ShapelyError as error:
        raise DataError(f"degenerate geometry: {error}") from error
    observation = observe_recording(source.ego, source.tracks, source.lines, route, start)
    return Scene(token, recording.kind, recording.cluster, False, observation, reference)


def _reference(source: _Source, route: Route, start: int, steering: bool) -> SceneReference:
    """The privileged part of a scene."""
    from rlhf_drive.scenes.importers.recorded_agents import future_agents

    ego, recording = source.ego, source.ego.recording
    state = ego.state(start, steering=steering)
    shapes = source.map.polygons(state[:2], float(state[3]), route.lanes)
    red = source.map.red_lights(start, route.lanes)
    who, pose, velocity, valid = future_agents(source.tracks, start, state[:2])
    now = _CLOCK_US + _STEP_US * start
    return SceneReference(
        t0_us=now,
        ego_init=state,
        prev_t0_us=now + int(_HISTORY_US[2]),
        prev_ego_init=ego.state(start - 5, steering=steering),
        past_times_us=now + _HISTORY_US,
        past_states=ego.past(start),
        human_poses=ego.human_poses(start),
        centerline=route.centerline,
        speed_limit=route.speed_limit,
        map_xy=shapes.xy,
        map_offsets=shapes.offsets,
        map_layer=shapes.layer,
        map_on_route=shapes.on_route,
        red_xy=red.xy,
        red_offsets=red.offsets,
        red_on_route=red.on_route,
        red_active=red.active,
        agent_pose=pose,
        agent_velocity=velocity,
        agent_valid=valid,
        agent_size=recording.agent_size[who],
        agent_type=recording.agent_type[who],
        pdm_reference_v1=np.zeros((0, 3)),
        pdm_reference_v2=np.zeros((0, 3)),
    )
