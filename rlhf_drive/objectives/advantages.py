"""Advantages: how much better a rollout did than the others planned for the same scene.

``none`` subtracts the group's mean only (Dr.GRPO, 2503.20783); ``group`` also divides by the group's standard deviation
(GRPO, 2402.03300); ``batch`` divides by that of all rewards. Driving rewards are bimodal within a group, so dividing by
the group's own deviation down-weights just the scenes in which some rollouts crash; hence ``none`` in the recipes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from rlhf_drive.errors import ConfigError, DataError, did_you_mean

__all__ = ["SCALE_REWARDS", "STD_EPS", "Advantages", "ScaleRewards", "group_advantages"]

ScaleRewards = Literal["none", "group", "batch"]
SCALE_REWARDS: tuple[str, ...] = get_args(ScaleRewards)

STD_EPS = 1e-4
"""Added to a standard deviation before dividing, as in TRL."""


@dataclass(frozen=True)
class Advantages:
    """Advantages of N rollouts in S groups."""

    values: Tensor
    """``[N]``; 0 for invalid rows and for all rows of a degenerate group."""
    degenerate: Tensor
    """``[S]`` bool, groups that teach nothing: fewer than two valid rows, or no spread."""
    spread: Tensor
    """``[S]`` largest minus smallest valid reward; 0 where no row is valid."""


def group_advantages(
    rewards: Tensor, valid: Tensor, num_generations: int, *, scale_rewards: ScaleRewards, tolerance: float
) -> Advantages:
    """Reward minus its group's mean over valid rows, scaled as `scale_rewards` says.

    ``(R - mean_group(R)) / (std(R) + 1e-4)`` with the unbiased standard deviation over the group's (``group``) or all
    (``batch``) valid rewards, or without the division (``none``). Where every row is valid and `tolerance` is 0 this is
    TRL's formula.

    Args:
        rewards: ``[N]``, N = S * num_generations, scene-major; anything, NaN included, where not valid.
        valid: ``[N]`` bool.
        num_generations: G, rollouts per scene.
        scale_rewards: One of `SCALE_REWARDS`.
        tolerance: Groups whose spread is at most this are degenerate.

    Raises:
        ConfigError: If `scale_rewards`, `num_generations` or `tolerance` is wrong.
        DataError: If the shapes disagree or a valid reward is not finite.

    Example:
        >>> rewards, valid = torch.tensor([1.0, 0.0, 0.5, 0.5]), torch.ones(4, dtype=torch.bool)
        >>> group_advantages(rewards, valid, 2, scale_rewards="none", tolerance=0.0).values
        tensor([ 0.5000, -0.5000,  0.0000,  0.0000])
    """
    _check(rewards, valid, num_generations, scale_rewards, tolerance)
    groups = torch.where(valid, rewards, 0.0).view(-1, num_generations)
    kept = valid.view(-1, num_generations)
    counts = kept.sum(1, keepdim=True)
    centred = torch.where(kept, groups - groups.sum(1, keepdim=True) / counts.clamp(min=1), 0.0)
    highest = torch.where(kept, groups, -torch.inf).amax(1)
    lowest = torch.where(kept, groups, torch.inf).amin(1)
    spread = torch.where(counts.squeeze(1) > 0, highest - lowest, 0.0)
    degenerate = spread <= tolerance  # fewer than two valid rows have spread 0
    if scale_rewards == "group":
        variance = centred.square().sum(1, keepdim=True) / (counts - 1).clamp(min=1)
        centred = centred / (variance.sqrt() + STD_EPS)
    elif scale_rewards == "batch" and int(counts.sum()) > 1:
        centred = centred / (groups[kept].std() + STD_EPS)
    values = torch.where(degenerate[:, None], 0.0, centred).reshape(-1)
    return Advantages(values=values, degenerate=degenerate, spread=spread)


def _check(rewards: Tensor, valid: Tensor, num_generations: int, scale_rewards: str, tolerance: float) -> None:
    if scale_rewards not in SCALE_REWARDS:
        raise ConfigError(
            f"rl.scale_rewards = {scale_rewards!r} does not exist. {did_you_mean(scale_rewards, SCALE_REWARDS)}"
        )
    if num_generations < 2:
        raise ConfigError(
            f"rollout.num_generations = {num_generations}: a group needs at least 2 rollouts to compare them."
        )
    if not tolerance >= 0:
        raise ConfigError(f"rl.spread_tolerance = {tolerance} must be 0 or positive.")
    if rewards.ndim != 1 or rewards.shape != valid.shape or len(rewards) % num_generations:
        raise DataError(
            f"Advantages need rewards and valid of shape [S * {num_generations}]; got {list(rewards.shape)} and "
            f"{list(valid.shape)}."
        )
    bad = torch.nonzero(valid & ~rewards.isfinite()).flatten().tolist()
    if bad:
        raise DataError(
            f"Rows {bad[:5]} are marked valid but their reward is not finite ({rewards[bad[0]].item()}); a rollout "
            "that could not be scored must be marked invalid."
        )
