"""Which scenes have a previous frame, and how plans are scored where some have none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rewards.carriers import Scores
from rlhf_drive.scenes import Scene, Trajectories

__all__ = ["FrameScorer", "has_previous_frame", "score_frames"]

_GAP_US = (50_000, 550_000)
"""The previous frame lies less than 0.55 s back, as NAVSIM has it, and, rounded, at least one step of 0.1 s."""


class FrameScorer(Protocol):
    """The part of the reward service that scoring two frames needs."""

    def score(
        self, scenes: Sequence[Scene], trajectories: Trajectories, previous: Trajectories | None = None
    ) -> Scores:
        """Scores of all rows; `previous` holds the plans of the previous frame."""


def has_previous_frame(scene: Scene) -> bool:
    """Whether the ego's state in the previous frame is known and near enough in time for EC."""
    reference = scene.reference
    return len(reference.prev_ego_init) > 0 and _GAP_US[0] < reference.t0_us - reference.prev_t0_us < _GAP_US[1]


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
    return _reordered(Scores.concatenate(parts), np.concatenate([with_it, without]))


def _rows(plans: Trajectories, rows: NDArray[np.int64]) -> Trajectories:
    return Trajectories(plans.poses[rows], plans.scene_index[rows], plans.dt_s)


def _reordered(scores: Scores, order: NDArray[np.int64]) -> Scores:
    """Row i of `scores` becomes row ``order[i]``."""
    back = np.argsort(order)
    return Scores(
        scores.names,
        scores.components[back],
        scores.total[back],
        scores.valid[back],
        scores.scorer,
        {int(order[row]): failure for row, failure in scores.failures.items()},
    )
