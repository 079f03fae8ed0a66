"""What scoring refuses: plans that cannot be meant, and scores of which too many rows are invalid."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rewards.carriers import Scores
from rlhf_drive.errors import DataError, RewardError
from rlhf_drive.scenes import NUM_POSES, POSE_DT_S, Trajectories

__all__ = ["check_invalid", "check_trajectories"]


def check_invalid(scores: Scores, max_fraction: float) -> None:
    """Stop when too many rows are invalid.

    Args:
        scores: N scored rows.
        max_fraction: Largest share of invalid rows that is tolerated, 0..1.

    Raises:
        RewardError: The share is larger; the message has the count, the share and the first reasons.
    """
    invalid = len(scores.failures)
    if invalid == 0 or invalid / len(scores) <= max_fraction:
        return
    first = "\n".join(f"  row {row}: {reason}" for row, reason in list(scores.failures.items())[:3])
    raise RewardError(
        f"{invalid} of {len(scores)} rollouts ({invalid / len(scores):.1%}) could not be scored; "
        f"{max_fraction:.1%} are tolerated (reward.max_invalid_fraction). The first ones:\n{first}"
    )


def check_trajectories(
    trajectories: Trajectories, scenes: int, previous: Trajectories | None = None, *, two_frame: Sequence[str] = ()
) -> None:
    """Refuse plans that could not be scored as they are meant.

    Args:
        trajectories: N plans.
        scenes: Number of scenes they may point at.
        previous: Plans of the previous frame, row by row.
        two_frame: Gates and terms that need those.

    Raises:
        DataError: They have another length or spacing, point at a scene that is not there, or `previous` is missing or
            does not match.
    """
    for name, plans in (("Plans", trajectories), ("Plans of the previous frame", previous)):
        if plans is not None and (plans.poses.shape[1] != NUM_POSES or plans.dt_s != POSE_DT_S):
            raise DataError(
                f"{name} must have {NUM_POSES} poses {POSE_DT_S} s apart to be scored; got "
                f"{plans.poses.shape[1]} poses {plans.dt_s} s apart. Resample them."
            )
    index = trajectories.scene_index
    if len(index) and not 0 <= index.min() <= index.max() < scenes:
        raise DataError(f"scene_index must lie in 0 … {scenes - 1}; got {index.min()} … {index.max()}.")
    if previous is None and two_frame:
        raise DataError(
            f"The reward needs the plans of the previous frame (for {', '.join(two_frame)}); got None. "
            "Pass them as `previous`, or leave those gates and terms out."
        )
    if previous is not None and not np.array_equal(previous.scene_index, index):
        raise DataError(
            f"Plans of the previous frame must belong to the same scenes row by row; got {len(previous)} of them for "
            f"{len(trajectories)} plans, or another scene_index."
        )
