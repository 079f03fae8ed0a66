"""Observations of NAVSIM scenes: of a log's frames, or of what a metric cache alone tells about t=0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from rlhf_drive.scenes.importers.navsim_cache import NavsimCache
from rlhf_drive.scenes.importers.navsim_map import MapView, map_view
from rlhf_drive.scenes.importers.navsim_states import Sightings
from rlhf_drive.scenes.model import HISTORY_TIMES_S, Command, Observation
from rlhf_drive.scenes.trajectories import to_ego_frame, wrap_angle

__all__ = ["SIGHT_M", "history_of_states", "observe", "observe_cache"]

Array = NDArray[np.float64]

SIGHT_M = 80.0
"""Road users farther away now are not seen."""


def observe_cache(cache: NavsimCache) -> Observation:
    """What a metric cache alone tells about the moment of planning.

    The ego's past is the logged one (v2.2), or the present velocity carried back (v1.1). Road users are those of the
    annotated frames the cache keeps: v2.2 has three before t=0, v1.1 none. The command follows from the centreline.
    For the map, see :mod:`rlhf_drive.scenes.importers.navsim_map`.
    """
    reference = cache.reference
    states = reference.past_states if len(reference.past_states) else _carried_back(reference.ego_init)
    times = reference.past_times_us if len(reference.past_times_us) else np.array(HISTORY_TIMES_S) * 1e6
    history = history_of_states(times, states)
    return observe(history, cache.seen, reference.ego_init[:3], map_view(cache))


def _carried_back(state: Array) -> Array:
    """``[4, 11]`` the state's velocity and heading at the four observed times; accelerations at the last only."""
    states = np.tile(state, (len(HISTORY_TIMES_S), 1))
    states[:-1, 5:] = 0.0
    cos, sin = np.cos(state[2]), np.sin(state[2])
    back = np.array(HISTORY_TIMES_S)
    states[:, 0] += back * (cos * state[3] - sin * state[4])
    states[:, 1] += back * (sin * state[3] + cos * state[4])
    return states


def history_of_states(times_us: NDArray[np.int64] | Array, states: Array) -> Array:
    """``[4, 8]`` x, y, heading, vx, vy, ax, ay, yaw rate at the observed times, in the frame of the last.

    NAVSIM logs no yaw rate: it is the difference to the frame before, and the first frame takes that of the second.

    Args:
        times_us: ``[4]``.
        states: ``[4, 11]`` ego states, world frame.
    """
    pose = to_ego_frame(states[:, :3], states[-1, :3])
    rate = wrap_angle(np.diff(states[:, 2])) / (np.diff(times_us) * 1e-6)
    return np.concatenate([pose, states[:, 3:7], np.concatenate([rate[:1], rate])[:, None]], axis=1)


def observe(
    history: Array,
    seen: Sequence[Sightings | None],
    origin: Array,
    view: MapView,
    *,
    command: Command | None = None,
    cameras: Mapping[str, str] | None = None,
) -> Observation:
    """The observation in the ego frame at t=0.

    Args:
        history: ``[4, 8]`` the ego's past, as :func:`history_of_states` gives it.
        seen: Road users at the four observed times, world frame; None where nobody looked.
        origin: ``[3]`` the ego's pose now.
        view: The map part.
        command: What the navigation says; None takes the turn of the map part.
        cameras: Image path by camera.
    """
    agents, valid, now = _agents(seen, origin)
    offsets = np.concatenate([[0], np.cumsum([len(line) for line in view.lines])]).astype(np.int32)
    return Observation(
        ego_history=history.astype(np.float32),
        agents=agents.astype(np.float32),
        agents_valid=valid,
        agents_size=now.size.astype(np.float32),
        agents_type=now.type,
        map_xy=np.concatenate([np.zeros((0, 2)), *view.lines]).astype(np.float32),
        map_offsets=offsets,
        map_type=view.kind,
        map_speed_limit=np.zeros(len(view.lines), dtype=np.float32),
        map_on_route=view.on_route,
        map_red=view.red,
        route_xy=view.route.astype(np.float32),
        command=int(view.command if command is None else command),
        cameras=dict(cameras or {}),
    )


def _agents(seen: Sequence[Sightings | None], origin: Array) -> tuple[Array, NDArray[np.bool_], Sightings]:
    """States ``[A, 4, 5]`` and presence ``[A, 4]`` of those within 80 m now, and how they are now."""
    latest = seen[-1]
    if latest is None:
        latest = Sightings.of([])
    distance = np.hypot(latest.pose[:, 0] - origin[0], latest.pose[:, 1] - origin[1])
    now = latest.chosen(distance <= SIGHT_M)
    agents = np.zeros((len(now.tokens), len(seen), 5))
    valid = np.zeros(agents.shape[:2], dtype=np.bool_)
    number = {token: n for n, token in enumerate(now.tokens)}
    for k, frame in enumerate(seen):
        if frame is None:
            continue
        here = np.array([token in number for token in frame.tokens], dtype=np.bool_)
        rows = np.array([number[token] for token in frame.tokens if token in number], dtype=np.int64)
        agents[rows, k] = _in_frame(frame.pose[here], frame.velocity[here], origin)
        valid[rows, k] = True
    return agents, valid, now


def _in_frame(pose: Array, velocity: Array, origin: Array) -> Array:
    """``[n, 5]`` x, y, heading, vx, vy in the frame of `origin`."""
    cos, sin = np.cos(origin[2]), np.sin(origin[2])
    turned = np.stack(
        [cos * velocity[:, 0] + sin * velocity[:, 1], cos * velocity[:, 1] - sin * velocity[:, 0]], axis=1
    )
    return np.concatenate([to_ego_frame(pose, origin), turned], axis=1)
