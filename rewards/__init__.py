"""Reward scoring in NumPy and Numba: NAVSIM kernels, PDMS, composition and the reward service."""

from rewards.carriers import PDMS_COMPONENTS, RewardInputs, Scores
from rewards.compose import Reward, RewardSpec, RewardTerm, build_reward
from rewards.registry import REWARDS, resolve_reward, reward
from rewards.service import LocalRewardService, RewardService, RewardStats, check_invalid

__all__ = [
    "PDMS_COMPONENTS",
    "REWARDS",
    "LocalRewardService",
    "Reward",
    "RewardInputs",
    "RewardService",
    "RewardSpec",
    "RewardStats",
    "RewardTerm",
    "Scores",
    "build_reward",
    "check_invalid",
    "resolve_reward",
    "reward",
]
