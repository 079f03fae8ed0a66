"""Which scenes have a previous frame, and how plans are scored where some have none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rewards.carriers import Scores
from rlhf_drive.scenes import Scene, Trajectories

__all__ = ["GAP_LIMIT_US", "FrameScorer", "frame_offset", "has_previous_frame", "score_frames"]

_STEP_S = 0.1
"""As in the simulation, whose kernels are not loaded for this."""
GAP_LIMIT_US = 550_000
"""The previous frame lies less than this back, as NAVSIM has it."""


class FrameScorer(Protocol):
    """The part of the reward service that scoring two frames needs."""

    def score(
        self, scenes: Sequence[Scene], trajectories: Trajectories, previous: Trajectories | None = None
    ) -> Scores:
        """Scores of all rows; `previous` holds the plans of the previous frame."""


def frame_offset(gap_us: int) -> int:
    """Steps between two frames that lie `gap_us` apart; 0 where EC cannot compare them, too near or too far apart."""
    return max(round(gap_us * 1e-6 / _STEP_S), 0) if gap_us < GAP_LIMIT_US else 0


def has_previous_frame(scene: Scene) -> bool:
    """Whether the ego's state in the previous frame is known and near enough in time for EC."""
    reference = scene.reference
    return len(reference.prev_ego_init) > 0 and frame_offset(reference.t0_us - reference.prev_t0_us) > 0


def score_frames(
    scorer: FrameScorer, scenes: Sequence[Scene], plans: Trajectories, previous: Trajectories | None
) -> Scores:
    """Scores of N plans, with the previous frame's where a scene has such a frame, as NAVSIM does.

    Args:
        scorer: Scores plans.
        scenes: S scenes.
        plans: N plans.
        previous: Plans of the previous frame, row by row; a row that is NaN throughout has none. None scores without.
    """
    if previous is None:
        return scorer.score(scenes, plans, None)
    known = np.array([has_previous_frame(scene) for scene in scenes], dtype=np.bool_)[plans.scene_index]
    known &= ~np.isnan(previous.poses).all(axis=(1, 2))
    if known.all():
        return scorer.score(scenes, plans, previous)
    with_it, without = np.flatnonzero(known), np.flatnonzero(~known)
    parts = [scorer.score(scenes, _rows(plans, with_it), _rows(previous, with_it))] if len(with_it) else []
    parts.append(scorer.score(scenes, _rows(plans, without), None))
    order = np.concatenate([with_it, without])
    return Scores.concatenate(parts).rows(np.argsort(order))


def _rows(plans: Trajectories, rows: NDArray[np.int64]) -> Trajectories:
    return Trajectories(plans.poses[rows], plans.scene_index[rows], plans.dt_s)
