"""Reward scoring in NumPy and Numba: NAVSIM kernels, PDMS, composition and the reward service."""

import rewards.navsim_backend
import rewards.remote
import rewards.trl_functions
import rewards.vlm_judge  # noqa: F401  (the four register a scorer and rewards)
from rewards.carriers import EPDMS_COMPONENTS, PDMS_COMPONENTS, Failure, RewardInputs, ScorerInfo, Scores
from rewards.compose import Reward, RewardConfig, RewardSpec, RewardTerm, build_reward
from rewards.opened import opened_reward
from rewards.partly_scored import PartlyScoredError
from rewards.ray_service import RayRewardService
from rewards.registry import REWARDS, resolve_reward, reward
from rewards.service import LocalRewardService, RewardService, RewardStats, check_invalid

__all__ = [
    "EPDMS_COMPONENTS",
    "PDMS_COMPONENTS",
    "REWARDS",
    "Failure",
    "LocalRewardService",
    "PartlyScoredError",
    "RayRewardService",
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
    "opened_reward",
    "resolve_reward",
    "reward",
]
