"""Plans of two successive frames: who can make them, for which scenes, and how they are scored together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from rewards.carriers import Scores
from rlhf_drive.errors import DataError
from rlhf_drive.scenes import Scene, Trajectories

__all__ = ["Scorer", "TwoFramePlanner", "has_previous_frame", "plan_previous", "score_frames"]

_GAP_US = (50_000, 550_000)
"""NAVSIM compares with a frame that lies less than 0.55 s back, and at least one step of its simulation."""


@runtime_checkable
class TwoFramePlanner(Protocol):
    """A planner that can also say what it would have planned in the previous frame, 0.5 s earlier."""

    def plan_previous(self, scenes: Sequence[Scene]) -> Trajectories | None:
        """Plans in the ego frame of that time, row by row those of ``plan(scenes)``; None where it has none.

        What it returns for a scene whose previous frame is not known (:func:`has_previous_frame`) is not used.
        """


class Scorer(Protocol):
    """The part of the reward service that an evaluation needs."""

    def score(
        self, scenes: Sequence[Scene], trajectories: Trajectories, previous: Trajectories | None = None
    ) -> Scores:
        """Scores of all rows; `previous` holds the plans of the previous frame."""


def has_previous_frame(scene: Scene) -> bool:
    """Whether the ego's state in the previous frame is known and near enough in time for EC."""
    reference = scene.reference
    return len(reference.prev_ego_init) > 0 and _GAP_US[0] <= reference.t0_us - reference.prev_t0_us < _GAP_US[1]


def plan_previous(name: str, planner: object, scenes: Sequence[Scene], plans: Trajectories) -> Trajectories | None:
    """A planner's plans of the previous frame, row by row those of `plans`; None where it has none.

    Args:
        name: The planner's, for messages.
        planner: Has none if it is no :class:`TwoFramePlanner`.
        scenes: S scenes.
        plans: Its plans of now.

    Raises:
        DataError: It returned other rows.
    """
    previous = planner.plan_previous(scenes) if isinstance(planner, TwoFramePlanner) else None
    if previous is not None and not np.array_equal(previous.scene_index, plans.scene_index):
        raise DataError(
            f"Planner {name!r} returned {len(previous)} plans of the previous frame for {len(plans)} plans; they must "
            "be the same rows, scene-major."
        )
    return previous


def score_frames(scorer: Scorer, scenes: Sequence[Scene], plans: Trajectories, previous: Trajectories | None) -> Scores:
    """Scores of N plans, with the previous frame's where a scene has such a frame, as NAVSIM does.

    Args:
        scorer: Scores plans.
        scenes: S scenes.
        plans: N plans.
        previous: Plans of the previous frame, row by row; None scores without.
    """
    if previous is None:
        return scorer.score(scenes, plans, None)
    known = np.array([has_previous_frame(scene) for scene in scenes], dtype=np.bool_)[plans.scene_index]
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
