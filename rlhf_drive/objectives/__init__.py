"""Advantages and policy objectives: pure functions on tensors that know no policy and no process."""

from rlhf_drive.objectives.advantages import SCALE_REWARDS, Advantages, ScaleRewards, group_advantages
from rlhf_drive.objectives.aggregate import LOSS_TYPES, Denominators, LossType, count_denominators
from rlhf_drive.objectives.base import LossInputs, LossOutputs, Objective, merge_metrics
from rlhf_drive.objectives.clipped import IMPORTANCE_SAMPLING_LEVELS, ClippedObjective, make_objective

__all__ = [
    "IMPORTANCE_SAMPLING_LEVELS",
    "LOSS_TYPES",
    "SCALE_REWARDS",
    "Advantages",
    "ClippedObjective",
    "Denominators",
    "LossInputs",
    "LossOutputs",
    "LossType",
    "Objective",
    "ScaleRewards",
    "count_denominators",
    "group_advantages",
    "make_objective",
    "merge_metrics",
]
