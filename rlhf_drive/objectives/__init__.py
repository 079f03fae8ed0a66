"""Advantages and policy objectives: pure functions on tensors that know no policy and no process."""

from rlhf_drive.objective_rules import ADVANTAGES, LOSS_TYPES
from rlhf_drive.objectives.advantages import (
    SCALE_REWARDS,
    AdvantageEstimator,
    ScaleRewards,
    advantage_problems,
    group_advantages,
    make_advantages,
)
from rlhf_drive.objectives.aggregate import Denominators, count_denominators
from rlhf_drive.objectives.base import LossInputs, LossOutputs, Objective, merge_metrics
from rlhf_drive.objectives.correction import importance_correction
from rlhf_drive.objectives.groups import AdvantageInputs, Advantages
from rlhf_drive.objectives.importance import IMPORTANCE_SAMPLING_LEVELS
from rlhf_drive.objectives.kl import KL_ESTIMATORS, reward_penalty
from rlhf_drive.objectives.make import make_objective, objective_problems
from rlhf_drive.objectives.objective import PolicyObjective
from rlhf_drive.objectives.settings import AdvantageSettings, ObjectiveSettings

__all__ = [
    "ADVANTAGES",
    "IMPORTANCE_SAMPLING_LEVELS",
    "KL_ESTIMATORS",
    "LOSS_TYPES",
    "SCALE_REWARDS",
    "AdvantageEstimator",
    "AdvantageInputs",
    "AdvantageSettings",
    "Advantages",
    "Denominators",
    "LossInputs",
    "LossOutputs",
    "Objective",
    "ObjectiveSettings",
    "PolicyObjective",
    "ScaleRewards",
    "advantage_problems",
    "count_denominators",
    "group_advantages",
    "importance_correction",
    "make_advantages",
    "make_objective",
    "merge_metrics",
    "objective_problems",
    "reward_penalty",
]
