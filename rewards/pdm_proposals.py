"""The 15 proposals of PDM-Closed: the intelligent driver model along three paths at five target speeds.

Follows NAVSIM `pdm_planner/proposal/pdm_generator.py` and `batch_idm_policy.py`, with their habits: the leader is
looked up at every second step only, is (0, 0, 0) at the first, and what one proposal does not overwrite in the shared
leader vector is inherited by the next faster one. Proposal ``p = 5 * path + speed fraction``. Frame: ego rear axle at
t=0; metres, seconds, radians. N forecast shapes; 51 steps of 0.1 s.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from rewards.pdm_forecast import Shapes
from rewards.pdm_leaders import Surroundings, update_leader
from rewards.pdm_paths import Path, pose_at

__all__ = [
    "NUM_PROPOSALS",
    "PROPOSAL_STEPS",
    "SPEED_FRACTIONS",
    "Proposals",
    "continue_proposal",
    "drive",
    "unroll_proposals",
]

SPEED_FRACTIONS = (0.2, 0.4, 0.6, 0.8, 1.0)
"""Target speed of each proposal as a fraction of the speed limit."""
NUM_PROPOSALS = 15
"""Three paths by five speeds."""
PROPOSAL_STEPS = 40
"""Steps every proposal is unrolled; the winner alone is continued to 50."""
_TOTAL_STEPS = 50
_DT_S = 0.1
_MIN_GAP_M = 1.0
_HEADWAY_S = 1.5
_ACCELERATION = 1.5
_DECELERATION = 3.0
_EXPONENT = 10.0


@dataclass(frozen=True)
class Proposals:
    """Unrolled proposals; rows after the last unrolled step are 0."""

    poses: NDArray[np.float64]
    """``[15, 51, 3]`` rear-axle pose on the path."""
    idm: NDArray[np.float64]
    """``[15, 51, 2]`` arclength on the proposal's own path (m) and speed (m/s)."""
    lead: NDArray[np.float64]
    """``[15, 51, 3]`` leader used at each step: arclength (m), speed (m/s), rear length (m)."""


@njit(cache=True, nogil=True)
def drive(position: float, speed: float, target: float, leader: NDArray[np.float64]) -> tuple[float, float]:
    """One explicit Euler step of the intelligent driver model: arclength and speed 0.1 s later."""
    closing = speed * (speed - leader[1]) / (2.0 * np.sqrt(_ACCELERATION * _DECELERATION))
    wanted = _MIN_GAP_M + _HEADWAY_S * speed + closing
    gap = max(leader[0] - position - leader[2], _MIN_GAP_M)
    acceleration = _ACCELERATION * (1.0 - (speed / target) ** _EXPONENT - (wanted / gap) ** 2)
    acceleration = min(max(acceleration, -_DECELERATION), _ACCELERATION)
    return position + _DT_S * speed, speed + _DT_S * acceleration


@njit(cache=True, nogil=True)
def _unroll(
    poses: NDArray[np.float64],
    idm: NDArray[np.float64],
    lead: NDArray[np.float64],
    targets: NDArray[np.float64],
    steps: tuple[int, int],
    path: Path,
    shapes: Shapes,
    inside: NDArray[np.bool_],
    progress: NDArray[np.float64],
) -> None:
    """Advance B proposals of one path together over ``steps[0] … steps[1]``; the rows before are given.

    Args:
        poses: ``[B, 51, 3]`` written in place, as are idm and lead (see :class:`Proposals`).
        idm: ``[B, 51, 2]``.
        lead: ``[B, 51, 3]``.
        targets: ``[B]`` target speeds, rising (m/s).
        steps: First (>= 1) and last step to compute.
        path: Their path.
        shapes: The forecast.
        inside: ``[26, N]`` who is in the path's corridor.
        progress: ``[26, N]`` arclength of the centroids (m).
    """
    shared = np.zeros(3)
    for t in range(steps[0], steps[1] + 1):
        shared[:] = 0.0
        for b in range(len(poses)):
            position, speed = idm[b, t - 1]
            if t % 2 == 1:
                lead[b, t] = lead[b, t - 1]
            else:
                k = t // 2
                end = path.arclength[-1]
                update_leader(shared, poses[b, t - 1], position, end, shapes, k, inside[k], progress[k])
                lead[b, t] = shared
            idm[b, t] = drive(position, speed, targets[b], lead[b, t])
            poses[b, t] = pose_at(path, idm[b, t, 0])


def _advance(
    out: Proposals, around: Surroundings, path: int, rows: slice, targets: NDArray[np.float64], steps: tuple[int, int]
) -> None:
    """Unroll the proposals `rows`, all on the same path, in place."""
    inside, progress = around.in_corridor[path], around.progress[path]
    poses, idm, lead = out.poses[rows], out.idm[rows], out.lead[rows]
    _unroll(poses, idm, lead, targets, steps, around.paths[path], around.shapes, inside, progress)


def unroll_proposals(around: Surroundings, *, initial_speed: float, speed_limit: float) -> Proposals:
    """All 15 proposals from t=0 to 4.0 s. Row 0 is the ego projected onto the path, not the ego itself.

    Args:
        around: Paths and forecast.
        initial_speed: Longitudinal speed of the rear axle (m/s), signed.
        speed_limit: m/s.

    Returns:
        Rows 0..40 of every proposal.
    """
    out = Proposals(*(np.zeros((NUM_PROPOSALS, _TOTAL_STEPS + 1, width)) for width in (3, 2, 3)))
    targets = speed_limit * np.array(SPEED_FRACTIONS)
    for i, path in enumerate(around.paths):
        rows = slice(i * len(targets), (i + 1) * len(targets))
        out.idm[rows, 0] = around.start[i], initial_speed
        out.poses[rows, 0] = pose_at(path, around.start[i])
        _advance(out, around, i, rows, targets, (1, PROPOSAL_STEPS))
    return out


def continue_proposal(around: Surroundings, proposals: Proposals, best: int, *, speed_limit: float) -> Proposals:
    """The proposals with row `best` alone carried on to 5.0 s; its leader vector is no longer shared with others."""
    out = Proposals(proposals.poses.copy(), proposals.idm.copy(), proposals.lead.copy())
    path, fraction = divmod(best, len(SPEED_FRACTIONS))
    target = speed_limit * np.array(SPEED_FRACTIONS[fraction : fraction + 1])
    _advance(out, around, path, slice(best, best + 1), target, (PROPOSAL_STEPS + 1, _TOTAL_STEPS))
    return out
