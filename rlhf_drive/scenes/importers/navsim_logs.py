"""NAVSIM logs: one pickled list of frames at 2 Hz for each recording, read as data without running any of it.

A log has what a policy sees (the ego's past, road users, the driving command, camera images by path) and what the
human did next, but no map and no centreline: to score a scene, its metric cache is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf_drive.errors import DataError
from rlhf_drive.scenes.importers.navsim_map import MapView, empty_map_view
from rlhf_drive.scenes.importers.navsim_names import LOG_NAMES, OTHER_FORM, NotAsWrittenError, array_of, name_of, number
from rlhf_drive.scenes.importers.navsim_observation import history_of_states, observe
from rlhf_drive.scenes.importers.navsim_states import Sightings
from rlhf_drive.scenes.importers.safe_pickle import read_plain, rebuild
from rlhf_drive.scenes.model import HISTORY_TIMES_S, AgentType, Command, Observation
from rlhf_drive.scenes.trajectories import NUM_POSES, to_ego_frame, to_world_frame

__all__ = [
    "MAX_LOG_BYTES",
    "NavsimFrame",
    "human_poses_at",
    "observation_at",
    "past_states_at",
    "read_navsim_log",
]

Array = NDArray[np.float64]

MAX_LOG_BYTES = 2**30
"""Default limit for the size of one log; NAVSIM's have some tens of megabytes."""
_TYPES = {
    "vehicle": AgentType.VEHICLE,
    "pedestrian": AgentType.PEDESTRIAN,
    "bicycle": AgentType.BICYCLE,
    "traffic_cone": AgentType.STATIC,
    "barrier": AgentType.STATIC,
    "czone_sign": AgentType.STATIC,
    "generic_object": AgentType.STATIC,
    "ego": AgentType.VEHICLE,
}
_COMMANDS = (Command.LEFT, Command.STRAIGHT, Command.RIGHT, None)
"""What the four places of `driving_command` stand for; the last is unknown."""
_HISTORY = len(HISTORY_TIMES_S)
_FRAME_US = 500_000
_MAX_SHIFT_US = 200_000


@dataclass(frozen=True)
class NavsimFrame:
    """One frame of a log, world frame."""

    token: str
    """Token of the frame; scenes are named by that of their present frame."""
    time_us: int
    """Microseconds."""
    log: str
    """Name of the log."""
    pose: Array
    """``[3]`` rear axle."""
    velocity: Array
    """``[2]`` body frame, in float32 as NAVSIM takes it."""
    acceleration: Array
    """``[2]`` body frame, likewise."""
    command: Command | None
    """Driving command; None if the log says it is unknown."""
    seen: Sightings
    """Annotated road users; static ones have no velocity, as in NAVSIM's scorer."""
    red: frozenset[str]
    """Ids of the lane connectors that are red."""
    cameras: Mapping[str, str]
    """Image path by camera, below the data set's sensor folder."""

    @property
    def state(self) -> Array:
        """``[11]`` the ego state as NAVSIM builds it of a log: no steering, no yaw rate."""
        return np.concatenate([self.pose, self.velocity, self.acceleration, np.zeros(4)])


def read_navsim_log(path: Path | str, *, max_bytes: int = MAX_LOG_BYTES) -> tuple[NavsimFrame, ...]:
    """All frames of one log.

    Args:
        path: A ``<log>.pkl``.
        max_bytes: Limit for its size.

    Raises:
        DataError: It is missing, cut off, names any class, or holds something else than frames; the message names file
            and reason.

    Example:
        >>> frames = read_navsim_log("navsim_logs/mini/2021.05.12.22.00.38_veh-35_01008_01518.pkl")  # doctest: +SKIP
    """
    path = Path(path)
    value = rebuild(read_plain(path, max_bytes=max_bytes), LOG_NAMES, path)
    if not isinstance(value, list) or not value or not all(isinstance(frame, dict) for frame in value):
        raise DataError(f"{path}: is no NAVSIM log, which is a list of frames. Give a folder of <log>.pkl files.")
    frames = []
    for index, content in enumerate(value):
        try:
            frames.append(_frame(content))
        except KeyError as error:
            raise DataError(f"{path}: frame {index} lacks {error}. Is it a NAVSIM log?") from error
        except OTHER_FORM as error:
            raise DataError(f"{path}: frame {index}: {error}.") from error
    return tuple(frames)


def _numbers(value: object, shape: tuple[int | None, ...], what: str) -> Array:
    """An array of finite numbers; None in `shape` is any size."""
    content = array_of(value)
    array = content if isinstance(content, np.ndarray) else np.asarray(_checked_list(content, shape, what))
    if array.dtype.kind not in "fiu" and array.size:
        raise NotAsWrittenError(f"{what} holds no numbers")
    array = array.astype(np.float64)
    if array.size == 0 and shape[0] is None:
        array = np.zeros((0, *(n or 0 for n in shape[1:])))
    if array.ndim != len(shape) or any(n not in (None, m) for n, m in zip(shape, array.shape, strict=True)):
        raise NotAsWrittenError(f"{what} has shape {list(array.shape)}")
    if not np.isfinite(array).all():
        raise NotAsWrittenError(f"{what} holds a value that is not finite")
    return array


def _checked_list(content: list[Any], shape: tuple[int | None, ...], what: str) -> list[Any]:
    """`content`, if it holds numbers, or rows of them; lists within lists could be an array of any size."""
    rows = content if len(shape) > 1 else [content]
    for row in rows:
        if not isinstance(row, list | tuple) or (len(shape) > 1 and len(row) != shape[1]):
            raise NotAsWrittenError(f"{what} holds no rows of {shape[-1]} numbers")
        if not set(map(type, row)) <= {int, float, bool}:
            raise NotAsWrittenError(f"{what} holds no numbers")
    return content


def _lights(content: object) -> frozenset[str]:
    """Ids of the lane connectors that are red."""
    pairs = [array_of(item) for item in array_of(content)]
    if any(len(pair) != 2 for pair in pairs):
        raise NotAsWrittenError("traffic_lights are no pairs of id and state")
    return frozenset(name_of(name) for name, red in pairs if red)


def _frame(content: dict[str, Any]) -> NavsimFrame:
    position = _numbers(content["ego2global_translation"], (3,), "ego2global_translation")
    heading = _yaw(_numbers(content["ego2global_rotation"], (4,), "ego2global_rotation"))
    pose = np.array([position[0], position[1], heading])
    motion = _numbers(content["ego_dynamic_state"], (4,), "ego_dynamic_state").astype(np.float32).astype(np.float64)
    return NavsimFrame(
        token=_text(content["token"], "token"),
        time_us=int(number(content["timestamp"])),
        log=_text(content["log_name"], "log_name"),
        pose=pose,
        velocity=motion[:2],
        acceleration=motion[2:],
        command=_command(content["driving_command"]),
        seen=_sightings(content["anns"], pose),
        red=_lights(content["traffic_lights"]),
        cameras=_cameras(content.get("cams") or {}),
    )


def _text(value: object, what: str) -> str:
    if not isinstance(value, str) or not value:
        raise NotAsWrittenError(f"{what} is no text")
    return value


def _yaw(rotation: Array) -> float:
    """Yaw of a quaternion w, x, y, z, taken off first (rotation = roll after pitch after yaw), as pyquaternion does."""
    length = float(np.linalg.norm(rotation))
    if length < 1e-6:
        raise NotAsWrittenError("ego2global_rotation is no rotation")
    w, x, y, z = (float(part) for part in rotation / length)
    return float(np.arctan2(2.0 * (w * z - x * y), 1.0 - 2.0 * (y * y + z * z)))


def _command(value: object) -> Command | None:
    """The command of a one-hot vector over left, straight, right, unknown."""
    places = _numbers(value, (None,), "driving_command")
    if len(places) not in (3, 4):
        raise NotAsWrittenError(f"driving_command has {len(places)} places")
    return _COMMANDS[int(places.argmax())] if places.any() else None


def _sightings(content: Any, ego: Array) -> Sightings:
    """Boxes ``x, y, z, length, width, height, heading`` and velocities of the ego frame, moved to the world frame."""
    if not isinstance(content, dict):
        raise NotAsWrittenError("anns is no mapping")
    boxes = _numbers(content["gt_boxes"], (None, 7), "gt_boxes")
    velocity = _numbers(content["gt_velocity_3d"], (None, 3), "gt_velocity_3d")
    names, tokens = ([name_of(name) for name in array_of(content[key])] for key in ("gt_names", "track_tokens"))
    if not len(boxes) == len(velocity) == len(names) == len(tokens) or len(set(tokens)) != len(tokens):
        raise NotAsWrittenError("anns hold lists of different lengths or a track token twice")
    if unknown := set(names) - set(_TYPES):
        raise NotAsWrittenError(f"gt_names has {sorted(unknown)[0][:60]!r}; known: {', '.join(_TYPES)}")
    kind = np.array([_TYPES[name] for name in names], dtype=np.int8)
    cos, sin = np.cos(ego[2]), np.sin(ego[2])
    turned = np.stack(
        [cos * velocity[:, 0] - sin * velocity[:, 1], sin * velocity[:, 0] + cos * velocity[:, 1]], axis=1
    )
    turned[kind == AgentType.STATIC] = 0.0
    pose = to_world_frame(boxes[:, [0, 1, 6]], ego)
    return Sightings(tuple(tokens), pose, turned, boxes[:, 3:5], kind)


def _cameras(content: Any) -> dict[str, str]:
    """Path of every camera that has one."""
    if not isinstance(content, dict) or not all(isinstance(camera, dict) for camera in content.values()):
        raise NotAsWrittenError("cams is no mapping of cameras")
    return {str(name): name_of(camera["data_path"]) for name, camera in content.items() if camera.get("data_path")}


def past_states_at(frames: Sequence[NavsimFrame], index: int) -> tuple[NDArray[np.int64], Array]:
    """Times ``[4]`` and ego states ``[4, 11]`` of frame `index` and the three before it.

    Raises:
        DataError: There are fewer frames before it, or they are not half a second apart.
    """
    _check_window(frames, index, index - _HISTORY + 1, index)
    past = frames[index - _HISTORY + 1 : index + 1]
    return np.array([frame.time_us for frame in past], dtype=np.int64), np.stack([frame.state for frame in past])


def human_poses_at(frames: Sequence[NavsimFrame], index: int) -> Array:
    """``[8, 3]`` where the human drove in the 4 s after frame `index`, in its ego frame.

    Raises:
        DataError: There are fewer frames after it, or they are not half a second apart.
    """
    _check_window(frames, index, index, index + NUM_POSES)
    future = np.stack([frame.pose for frame in frames[index + 1 : index + NUM_POSES + 1]])
    return to_ego_frame(future, frames[index].pose)


def observation_at(frames: Sequence[NavsimFrame], index: int, view: MapView | None = None) -> Observation:
    """What is seen at frame `index`: four frames of history, road users followed by their track token.

    Args:
        frames: A log.
        index: The present frame.
        view: The map part; without it nothing of the map is seen and the route is empty.

    Raises:
        DataError: There are fewer than three frames before it, or they are not half a second apart.
    """
    times, states = past_states_at(frames, index)
    now = frames[index]
    seen = [frame.seen for frame in frames[index - _HISTORY + 1 : index + 1]]
    history = history_of_states(times, states)
    view = view or empty_map_view()
    return observe(history, seen, now.pose, view, command=now.command, cameras=now.cameras)


def _check_window(frames: Sequence[NavsimFrame], index: int, first: int, last: int) -> None:
    """Frames `first` to `last` must exist and follow each other at 2 Hz."""
    now = frames[index]
    if first < 0 or last >= len(frames):
        raise DataError(
            f"Frame {now.token} of log {now.log} needs frames {first} to {last}; the log has 0 to {len(frames) - 1}."
        )
    gaps = np.diff([frame.time_us for frame in frames[first : last + 1]])
    if len(gaps) and (np.abs(gaps - _FRAME_US) > _MAX_SHIFT_US).any():
        worst = int(gaps[np.abs(gaps - _FRAME_US).argmax()])
        raise DataError(
            f"Frame {now.token} of log {now.log} has a neighbour {worst / 1e6:g} s apart, where 0.5 s belong: "
            "frames are missing."
        )
