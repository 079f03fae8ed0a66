"""Other road users of a recording: gaps filled, parked cars held still, near ones kept (rule 5)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from rlhf_drive.scenes.importers.recorded_reading import Array, Recording
from rlhf_drive.scenes.model import HISTORY_TIMES_S, REFERENCE_STEPS, AgentType
from rlhf_drive.scenes.trajectories import wrap_angle

__all__ = ["Tracks", "fill_tracks", "future_agents", "seen_agents"]

MAX_GAP_STEPS = 10
"""Up to 1 s between two sightings is interpolated."""
PARKED_RADIUS_M = 0.5
PARKED_SPEED_MPS = 0.3
REACH_M = 100.0
"""Agents that stay farther from the ego's place at t=0 are left out of the reference."""
SIGHT_M = 80.0
"""Agents farther than this now are not seen."""
_HISTORY_STEPS = np.round(np.array(HISTORY_TIMES_S) * 10).astype(np.int64)


@dataclass(frozen=True)
class Tracks:
    """All agents of a recording. Heading is unwrapped along each track."""

    state: Array
    """``[N, T, 5]`` x, y, heading, vx, vy; gaps interpolated."""
    valid: NDArray[np.bool_]
    """``[N, T]`` after filling gaps."""
    seen: NDArray[np.bool_]
    """``[N, T]`` as recorded."""
    held: Array
    """``[N, 5]`` resting state of parked vehicles, judged over the whole recording; NaN for all others."""
    vehicle: NDArray[np.bool_]
    """``[N]``."""


def fill_tracks(recording: Recording) -> Tracks:
    """Interpolate gaps of up to 1 s, and find out who is parked."""
    raw = np.concatenate([recording.agent_pose, recording.agent_velocity], axis=-1)
    seen = recording.agent_valid
    state, valid = raw.copy(), seen.copy()
    for n in range(len(raw)):
        index = np.flatnonzero(seen[n])
        if not len(index):
            continue
        state[n, index, 2] = np.unwrap(raw[n, index, 2])
        for a, b in pairwise(index):
            valid[n, a:b] |= b - a <= MAX_GAP_STEPS
        filled = np.flatnonzero(valid[n] & ~seen[n])
        for column in range(5):
            state[n, filled, column] = np.interp(filled, index, state[n, index, column])
    vehicle = recording.agent_type == AgentType.VEHICLE
    return Tracks(state, valid, seen, _resting_states(state, seen, vehicle), vehicle)


def _resting_states(state: Array, seen: NDArray[np.bool_], vehicle: NDArray[np.bool_]) -> Array:
    """``[N, 5]`` median pose and no velocity of vehicles that never left 0.5 m around it; NaN for all others."""
    held = np.full((len(state), 5), np.nan)
    candidate = np.flatnonzero(vehicle & seen.any(axis=1))
    if not len(candidate):
        return held
    known = np.where(seen[candidate, :, None], state[candidate], np.nan)
    middle = np.nanmedian(known[..., :3], axis=1)
    away = np.hypot(known[..., 0] - middle[:, None, 0], known[..., 1] - middle[:, None, 1])
    speed = np.nanmedian(np.hypot(known[..., 3], known[..., 4]), axis=1)
    parked = (np.nanmax(away, axis=1) < PARKED_RADIUS_M) & (speed < PARKED_SPEED_MPS)
    held[candidate[parked], :3] = middle[parked]
    held[candidate[parked], 3:] = 0.0
    return held


def future_agents(
    tracks: Tracks, start: int, centre: Array
) -> tuple[NDArray[np.int64], Array, Array, NDArray[np.bool_]]:
    """Agents that come within 100 m of `centre` during the 5 s from `start`.

    Returns:
        Their numbers ``[A]``, poses ``[A, 51, 3]``, velocities ``[A, 51, 2]``, presence ``[A, 51]``; parked vehicles
        do not move.
    """
    window = slice(start, start + REFERENCE_STEPS)
    parked = np.isfinite(tracks.held[:, 0])
    state = np.where(parked[:, None, None], tracks.held[:, None], tracks.state[:, window])
    valid = tracks.valid[:, window]
    distance = np.hypot(state[..., 0] - centre[0], state[..., 1] - centre[1])
    kept = np.flatnonzero((valid & (distance <= REACH_M)).any(axis=1))
    pose, velocity = state[kept, :, :3].copy(), state[kept, :, 3:]
    pose[..., 2] = wrap_angle(pose[..., 2])
    return kept, pose, velocity, valid[kept]


def seen_agents(tracks: Tracks, start: int, ego: Array) -> tuple[NDArray[np.int64], Array, NDArray[np.bool_]]:
    """Agents in sight at `start`, with their states at the four past times in the frame of `ego` ``[3]``.

    Who counts was recorded at `start` itself, so gaps before it are filled from samples up to `start` alone; so is
    judged whether a vehicle is parked.

    Returns:
        Their numbers ``[A]``, states ``[A, 4, 5]`` (zero where not valid), validity ``[A, 4]``.
    """
    now = tracks.state[:, start, :2]
    near = tracks.seen[:, start] & (np.hypot(now[:, 0] - ego[0], now[:, 1] - ego[1]) <= SIGHT_M)
    who = np.flatnonzero(near)
    past = slice(0, start + 1)
    held = _resting_states(tracks.state[who, past], tracks.seen[who, past], tracks.vehicle[who])
    times = start + _HISTORY_STEPS
    valid = tracks.valid[who][:, times]
    state = np.where(np.isfinite(held[:, :1])[:, None], held[:, None], tracks.state[who][:, times])
    cos, sin = np.cos(ego[2]), np.sin(ego[2])
    dx, dy, vx, vy = state[..., 0] - ego[0], state[..., 1] - ego[1], state[..., 3], state[..., 4]
    heading = wrap_angle(state[..., 2] - ego[2])
    columns = [cos * dx + sin * dy, cos * dy - sin * dx, heading, cos * vx + sin * vy, cos * vy - sin * vx]
    return who, np.where(valid[..., None], np.stack(columns, axis=-1), 0.0), valid
