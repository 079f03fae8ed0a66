"""Advantages: how much better a rollout did than the others planned for the same scene.

``group_mean`` subtracts the mean of the group, ``rloo`` that of the others in it (2402.14740), which is the same times
``n / (n - 1)``. Both may then be scaled: ``none`` leaves them (Dr.GRPO, 2503.20783); ``group`` divides by the group's
standard deviation (GRPO, 2402.03300); ``batch`` by that of all rewards (2508.08221). Driving rewards are bimodal within
a group, so dividing by the group's own deviation down-weights just the scenes in which some rollouts crash; hence
``none`` in the recipes. ``gdpo`` scales each reward term on its own (see `decoupled_advantages`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, Protocol, cast, get_args

import torch
from torch import Tensor

from rlhf_drive.errors import ConfigError, PluginError, did_you_mean
from rlhf_drive.objective_rules import ADVANTAGES, name_problem
from rlhf_drive.objectives.groups import STD_EPS, AdvantageInputs, Advantages, Groups
from rlhf_drive.objectives.make import load_part
from rlhf_drive.objectives.settings import AdvantageSettings
from rlhf_drive.registry import is_plugin

__all__ = [
    "ADVANTAGES",
    "SCALE_REWARDS",
    "AdvantageEstimator",
    "ScaleRewards",
    "advantage_problems",
    "decoupled_advantages",
    "group_advantages",
    "make_advantages",
]

ScaleRewards = Literal["none", "group", "batch"]
SCALE_REWARDS: tuple[str, ...] = get_args(ScaleRewards)


class AdvantageEstimator(Protocol):
    """From rewards to advantages."""

    def __call__(self, inputs: AdvantageInputs) -> Advantages:
        """Advantages of all rows of an RL step; rows that are not valid have advantage 0 and enter no mean."""
        ...


def group_advantages(
    rewards: Tensor,
    valid: Tensor,
    num_generations: int,
    *,
    scale_rewards: ScaleRewards,
    tolerance: float,
    leave_one_out: bool = False,
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
        leave_one_out: Whether the mean is that of the group's other valid rows (RLOO).

    Raises:
        ConfigError: If `scale_rewards`, `num_generations` or `tolerance` is wrong.
        DataError: If the shapes disagree or a valid reward is not finite.

    Example:
        >>> rewards, valid = torch.tensor([1.0, 0.0, 0.5, 0.5]), torch.ones(4, dtype=torch.bool)
        >>> group_advantages(rewards, valid, 2, scale_rewards="none", tolerance=0.0).values
        tensor([ 0.5000, -0.5000,  0.0000,  0.0000])
    """
    problems = list(_scaling_problems(scale_rewards, tolerance))
    if problems:
        raise ConfigError("\n".join(problems))
    inputs = AdvantageInputs(rewards, valid, num_generations)
    groups = Groups.of(rewards, valid, num_generations)
    values = groups.centred
    if leave_one_out:
        values = values * groups.counts / (groups.counts - 1).clamp(min=1)
    if scale_rewards == "group":
        values = values / (groups.std + STD_EPS)
    elif scale_rewards == "batch" and int(groups.counts.sum()) > 1:
        values = values / (groups.values[groups.kept].std() + STD_EPS)
    return _finish(inputs, values, groups.spread <= tolerance)  # fewer than two valid rows have spread 0


def decoupled_advantages(inputs: AdvantageInputs, tolerance: float) -> Advantages:
    """GDPO (2601.05242): each reward term normalised within its group, weighted, summed, and normalised over the batch.

    ``A = (z - mean(z)) / (std(z) + 1e-4)`` over all valid rows, with ``z = sum_c w_c (R_c - mean_group(R_c)) /
    (std_group(R_c) + 1e-4)``: TRL's ``multi_objective_aggregation="normalize_then_sum"``. A term that varies little
    weighs as much as one that varies a lot, so that none drowns in the sum. Gates, which multiply the reward, are no
    terms and have no part.

    Args:
        inputs: With `terms`; a term that is NaN in a valid row does not apply to it.
        tolerance: Terms whose spread in a group is at most this count as equal there; a group whose terms are all equal
            is degenerate.

    Raises:
        ConfigError: If there are no terms.
    """
    if inputs.terms is None:
        raise ConfigError("rl.advantages = 'gdpo' normalises each term of the reward, but no terms were given.")
    terms, group = inputs.terms.to(inputs.rewards.dtype), inputs.num_generations
    weights = torch.ones_like(terms[0]) if inputs.term_weights is None else inputs.term_weights.to(terms)
    total = torch.zeros_like(inputs.rewards).view(-1, group)
    degenerate = torch.ones(len(total), dtype=torch.bool, device=total.device)
    for term, weight in zip(terms.unbind(1), weights, strict=True):
        groups = Groups.of(term, inputs.valid & ~term.isnan(), group)
        flat = (groups.spread <= tolerance) | (weight == 0)
        total = total + torch.where(flat[:, None], 0.0, weight * groups.centred / (groups.std + STD_EPS))
        degenerate = degenerate & flat
    kept = inputs.valid.view(-1, group)
    if int(kept.sum()) > 1:
        total = (total - total[kept].mean()) / (total[kept].std() + STD_EPS)
    return _finish(inputs, total, degenerate)


@dataclass(frozen=True)
class _Estimator:
    """What a recipe's settings describe; `make_advantages` builds and checks it."""

    settings: AdvantageSettings
    own: Callable[[AdvantageInputs], Tensor] | None = None

    def __call__(self, inputs: AdvantageInputs) -> Advantages:
        settings = self.settings
        if self.own is not None:
            result = self._of_own(inputs, self.own)
        elif settings.advantages == "gdpo":
            result = decoupled_advantages(inputs, settings.spread_tolerance)
        else:
            result = group_advantages(
                inputs.rewards,
                inputs.valid,
                inputs.num_generations,
                scale_rewards=cast(ScaleRewards, settings.scale_rewards),
                tolerance=settings.spread_tolerance,
                leave_one_out=settings.advantages == "rloo",
            )
        return replace(result, values=result.values * settings.reward_scale)

    def _of_own(self, inputs: AdvantageInputs, own: Callable[[AdvantageInputs], Tensor]) -> Advantages:
        try:
            values = own(inputs)
        except Exception as error:
            name = self.settings.advantages
            raise PluginError(f"{name} raised {type(error).__name__}: {error}. Correct the function.") from error
        if not isinstance(values, Tensor) or values.shape != inputs.rewards.shape:
            found = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise PluginError(f"{self.settings.advantages} must return a tensor of shape [N]; got {found}.")
        bad = torch.nonzero(inputs.valid & ~values.isfinite()).flatten().tolist()
        if bad:
            raise PluginError(f"{self.settings.advantages} gave valid rows {bad[:5]} advantages that are not finite.")
        grouped = torch.where(inputs.valid, values, 0.0).view(-1, inputs.num_generations)
        return _finish(inputs, grouped, (grouped == 0).all(1))


def make_advantages(settings: AdvantageSettings) -> AdvantageEstimator:
    """The advantage estimator that `settings` describe.

    An `advantages` such as ``my_advantages.py:above_human`` is a function of one's own,
    ``above_human(inputs: AdvantageInputs) -> Tensor`` of shape ``[N]``. What it gives invalid rows is not looked at; a
    group teaches nothing if all its advantages are 0. `reward_scale` is applied to it, the other settings are not.

    Raises:
        ConfigError: If any value is wrong; the message lists all that are.
        PluginError: If the named function cannot be loaded.

    Example:
        >>> estimator = make_advantages(AdvantageSettings(advantages="rloo"))
        >>> estimator(AdvantageInputs(torch.tensor([1.0, 0.0]), torch.tensor([True, True]), 2)).values
        tensor([ 1., -1.])
    """
    problems = list(advantage_problems(settings))
    if problems:
        raise ConfigError("\n".join(problems))
    if not is_plugin(settings.advantages):
        return _Estimator(settings)
    return _Estimator(settings, load_part(settings.advantages, "rl.advantages", "inputs"))


def advantage_problems(settings: AdvantageSettings) -> Iterator[str]:
    """What is wrong with `settings`, a sentence each; nothing is loaded."""
    yield from name_problem("advantages", settings.advantages, ADVANTAGES)
    yield from _scaling_problems(settings.scale_rewards, settings.spread_tolerance)
    if not (settings.reward_scale > 0 and math.isfinite(settings.reward_scale)):
        yield f"rl.reward_scale = {settings.reward_scale} must be positive; it multiplies the advantages."


def _scaling_problems(scale_rewards: str, tolerance: float) -> Iterator[str]:
    if scale_rewards not in SCALE_REWARDS:
        yield f"rl.scale_rewards = {scale_rewards!r} does not exist. {did_you_mean(scale_rewards, SCALE_REWARDS)}"
    if not tolerance >= 0:
        yield f"rl.spread_tolerance = {tolerance} must be 0 or positive."


def _finish(inputs: AdvantageInputs, values: Tensor, degenerate: Tensor) -> Advantages:
    """Advantages ``[S, G]`` with zeros where nothing is to be learned, beside statistics of the rewards."""
    rewards = Groups.of(inputs.rewards, inputs.valid, inputs.num_generations)
    values = torch.where(degenerate[:, None] | ~rewards.kept, 0.0, values)
    return Advantages(values.reshape(-1), degenerate, rewards.spread, rewards.best, rewards.worst)
