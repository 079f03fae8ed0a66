"""Two-stage pseudo-closed-loop score of NAVSIM v2: how well a planner does where its own plan would have taken it.

A first stage scores a recorded frame. A second stage scores synthetic frames about 4 s later that start at different
places; those close to where the first plan ends count most. Each is done for a frame (`now`) and the one 0.5 s before
it (`previous`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlhf_drive.errors import DataError

__all__ = ["StageGroup", "TwoStageScores", "aggregate_two_stage", "second_stage_weights"]

_VARIANCE_M2 = 0.1
_NOTHING = 1e-8


@dataclass(frozen=True)
class StageGroup:
    """A first-stage frame and the second-stage frames that may follow it. C columns, J second-stage frames."""

    first: NDArray[np.float64]
    """``[C]`` scores of the first-stage frame, such as `EPDMS_COMPONENTS`."""
    endpoint: NDArray[np.float64]
    """``[2]`` where its plan (not its simulation) ends, metres."""
    second: NDArray[np.float64]
    """``[J, C]`` scores of the second-stage frames, J > 0, made without the human penalty filter."""
    starts: NDArray[np.float64]
    """``[J, 2]`` where they start, in the frame of `endpoint`."""

    def __post_init__(self) -> None:
        j, c = np.shape(self.second) if np.ndim(self.second) == 2 else (0, 0)
        shapes = (("first", (c,)), ("endpoint", (2,)), ("second", (j, c)), ("starts", (j, 2)))
        for name, shape in shapes:
            array = np.asarray(getattr(self, name), dtype=np.float64)
            if array.shape != shape or not array.size or not np.isfinite(array).all():
                raise DataError(
                    f"StageGroup needs first [C], endpoint [2], second [J, C] and starts [J, 2], finite, with J and C "
                    f"above 0; got {name} of shape {list(array.shape)}: {array.ravel()[:4].tolist()}."
                )
            object.__setattr__(self, name, array)


@dataclass(frozen=True)
class TwoStageScores:
    """Means over all frames, column by column."""

    combined: NDArray[np.float64]
    """``[C]`` first stage times weighted second stage: the official result."""
    first: NDArray[np.float64]
    """``[C]`` the first stage alone."""
    second: NDArray[np.float64]
    """``[C]`` the weighted second stage alone."""


def second_stage_weights(endpoint: NDArray[np.float64], starts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weights ``[J]`` that add up to 1: ``exp(-d^2 / (2 * 0.1))`` with d metres from `endpoint` to each start.

    All are equal where every start is so far away that the sum is within 1e-8 of zero.
    """
    weights = np.exp(-((starts - endpoint) ** 2).sum(axis=1) / (2.0 * _VARIANCE_M2))
    total = weights.sum()
    return np.full(len(starts), 1.0 / len(starts)) if total <= _NOTHING else np.asarray(weights / total)


def aggregate_two_stage(pairs: Sequence[tuple[StageGroup, StageGroup]]) -> TwoStageScores:
    """The benchmark's result from the scores of its frames.

    ``combined = mean over pairs of the mean over now and previous of first * sum_j w_j second_j``, column by column:
    the aggregate column is combined like any other, not recomputed from the combined sub-scores.

    Args:
        pairs: For each mapping the group of the frame and the group of the frame 0.5 s before it. EC of a frame and
            the one before it is one number that both carry.

    Raises:
        DataError: There are no pairs, or their columns differ in number.

    Example:
        >>> group = StageGroup([0.5], [0.0, 0.0], [[1.0], [0.0]], [[0.0, 0.0], [0.0, 0.0]])
        >>> aggregate_two_stage([(group, group)]).combined.tolist()
        [0.25]
    """
    groups = [group for pair in pairs for group in pair]
    if len({len(group.first) for group in groups}) != 1:
        counts = sorted({len(group.first) for group in groups})
        raise DataError(f"A two-stage score needs pairs of groups with the same columns; got column counts {counts}.")
    first = np.stack([group.first for group in groups])
    second = np.stack([second_stage_weights(group.endpoint, group.starts) @ group.second for group in groups])
    return TwoStageScores((first * second).mean(axis=0), first.mean(axis=0), second.mean(axis=0))
