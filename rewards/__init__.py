"""Reward scoring in NumPy and Numba: NAVSIM kernels, PDMS, composition and the reward service."""

from rewards.carriers import EPDMS_COMPONENTS, PDMS_COMPONENTS, Failure, RewardInputs, ScorerInfo, Scores
from rewards.compose import Reward, RewardConfig, RewardSpec, RewardTerm, build_reward
from rewards.registry import REWARDS, resolve_reward, reward
from rewards.service import LocalRewardService, RewardService, RewardStats, check_invalid

__all__ = [
    "EPDMS_COMPONENTS",
    "PDMS_COMPONENTS",
    "REWARDS",
    "Failure",
    "LocalRewardService",
    "Reward",
    "RewardConfig",
    "RewardInputs",
    "RewardService",
    "RewardSpec",
    "RewardStats",
    "RewardTerm",
    "ScorerInfo",
    "Scores",
    "build_reward",
    "check_invalid",
    "resolve_reward",
    "reward",
]
