"""Clipped policy-gradient objectives: GRPO, DAPO, Dr.GRPO (token level) and GSPO (sequence level).

Importance weight ``w``: per token ``r = exp(logp - old_logp)``, or per sequence ``s = exp(mean_t(logp - old_logp))``
(GSPO, 2507.18071). Term to maximise: ``min(w A, clip(w, 1 - epsilon, 1 + epsilon_high) A) - beta * k3``. Names and
semantics are those of TRL's `GRPOTrainer`; with ``importance_sampling_level="sequence"`` the sequence-mean aggregation
(``grpo``) is GSPO, while ``dapo`` weighs each sequence by its length.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from rlhf_drive.errors import ConfigError, did_you_mean
from rlhf_drive.objectives.aggregate import LOSS_TYPES, Denominators, LossType, aggregate
from rlhf_drive.objectives.base import LossInputs, LossOutputs, Objective
from rlhf_drive.objectives.kl import kl_k1, kl_k2, kl_k3

__all__ = ["IMPORTANCE_SAMPLING_LEVELS", "ClippedObjective", "clipped_surrogate", "log_importance", "make_objective"]

ImportanceSamplingLevel = Literal["token", "sequence"]
IMPORTANCE_SAMPLING_LEVELS: tuple[str, ...] = get_args(ImportanceSamplingLevel)


def log_importance(logp: Tensor, old_logp: Tensor, mask: Tensor, level: ImportanceSamplingLevel) -> Tensor:
    """Log importance weight ``logp - old_logp``, per token or averaged over a row's scored tokens.

    Args:
        logp: ``[N, T]`` live log-probabilities.
        old_logp: ``[N, T]`` log-probabilities of the policy that sampled.
        mask: ``[N, T]`` bool, scored tokens; values elsewhere may be anything, NaN included.
        level: ``token`` or ``sequence``.

    Returns:
        ``[N, T]`` (zero where unscored) for ``token``, ``[N, 1]`` for ``sequence``.
    """
    log_ratio = torch.where(mask, logp - old_logp, 0.0)
    if level == "token":
        return log_ratio
    return log_ratio.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)


def clipped_surrogate(weight: Tensor, advantages: Tensor, epsilon: float, epsilon_high: float) -> Tensor:
    """``min(w A, clip(w, 1 - epsilon, 1 + epsilon_high) A)``, to be maximised (2017, 1707.06347).

    The gradient vanishes only where moving on would leave the trust region further: ``w > 1 + epsilon_high`` with
    ``A > 0``, and ``w < 1 - epsilon`` with ``A < 0``.

    Args:
        weight: ``[N, T]`` or ``[N, 1]`` importance weights.
        advantages: ``[N, 1]``.
        epsilon: Lower half-width of the trust region.
        epsilon_high: Upper half-width.
    """
    clipped = weight.clamp(1 - epsilon, 1 + epsilon_high)
    return torch.minimum(weight * advantages, clipped * advantages)


@dataclass(frozen=True)
class ClippedObjective:
    """Clipped surrogate with a k3 penalty to the reference; build it with `make_objective`."""

    loss_type: LossType
    """Aggregation over tokens and sequences."""
    importance_sampling_level: ImportanceSamplingLevel
    """``token`` or ``sequence``."""
    epsilon: float
    """Lower half-width of the trust region."""
    epsilon_high: float
    """Upper half-width of the trust region."""
    beta: float
    """Weight of the KL penalty."""

    def __call__(self, inputs: LossInputs, denominators: Denominators) -> LossOutputs:
        """This micro-batch's share of the loss and of the metrics.

        Raises:
            ConfigError: If `beta` is positive and the inputs carry no reference log-probabilities.
        """
        rows = inputs.learned_rows()
        mask = inputs.mask & rows[:, None]
        advantages = inputs.advantages.to(inputs.logp.dtype)[:, None]
        weight = log_importance(inputs.logp, inputs.old_logp, mask, self.importance_sampling_level).exp()
        terms = -clipped_surrogate(weight, advantages, self.epsilon, self.epsilon_high)
        if self.beta > 0:
            terms = terms + self.beta * self._reference_kl(inputs, mask)
        loss = aggregate(terms, mask, self.loss_type, denominators)
        with torch.no_grad():
            counted, count = (
                (mask, denominators.tokens)
                if self.importance_sampling_level == "token"
                else (rows[:, None], denominators.sequences)
            )
            metrics = self._weight_metrics(weight, advantages, counted, count)
            metrics.update(_divergence_metrics(inputs, mask, denominators.tokens))
        return LossOutputs(loss=loss, metrics=metrics)

    def _reference_kl(self, inputs: LossInputs, mask: Tensor) -> Tensor:
        if inputs.ref_logp is None:
            raise ConfigError(
                f"rl.beta = {self.beta} penalises the distance to the reference policy, but no reference "
                "log-probabilities were given; compute them, or set rl.beta to 0."
            )
        # Unscored slots may hold anything: silence them before the exponential, not after.
        return kl_k3(torch.where(mask, inputs.logp, 0.0), torch.where(mask, inputs.ref_logp, 0.0))

    def _weight_metrics(self, weight: Tensor, advantages: Tensor, counted: Tensor, count: float) -> dict[str, Tensor]:
        # What is not counted has weight 1 and is never clipped.
        low = (weight < 1 - self.epsilon) & (advantages < 0)
        high = (weight > 1 + self.epsilon_high) & (advantages > 0)
        total = max(count, 1.0)
        return {
            "ratio/mean": torch.where(counted, weight, 0.0).sum() / total,
            "ratio/min": torch.where(counted, weight, torch.inf).amin(),
            "ratio/max": torch.where(counted, weight, -torch.inf).amax(),
            "ratio/clip_frac": (low | high).sum() / total,
            "ratio/clip_low_frac": low.sum() / total,
            "ratio/clip_high_frac": high.sum() / total,
        }


def _divergence_metrics(inputs: LossInputs, mask: Tensor, tokens: float) -> dict[str, Tensor]:
    """``kl/old_approx``: k3 of ``KL(old || live)``; ``kl/ref_k1..k3``: of ``KL(live || ref)``. Means over tokens."""

    def mean(values: Tensor) -> Tensor:
        return torch.where(mask, values, 0.0).sum() / max(tokens, 1.0)

    metrics = {"kl/old_approx": mean(kl_k3(inputs.old_logp, inputs.logp))}
    if inputs.ref_logp is not None:
        metrics["kl/ref_k1"] = mean(kl_k1(inputs.logp, inputs.ref_logp))
        metrics["kl/ref_k2"] = mean(kl_k2(inputs.logp, inputs.ref_logp))
        metrics["kl/ref_k3"] = mean(kl_k3(inputs.logp, inputs.ref_logp))
    return metrics


def make_objective(
    loss_type: str, importance_sampling_level: str, epsilon: float, epsilon_high: float, beta: float
) -> Objective:
    """The objective a recipe's `rl` section names.

    Args:
        loss_type: ``grpo``, ``dapo`` or ``dr_grpo``.
        importance_sampling_level: ``token``, or ``sequence`` (with ``grpo``: GSPO).
        epsilon: Lower half-width of the trust region, in (0, 1).
        epsilon_high: Upper half-width, positive.
        beta: Weight of the k3 penalty to the reference policy, not negative.

    Raises:
        ConfigError: If any value is wrong; the message lists all that are.

    Example:
        >>> gspo = make_objective("grpo", "sequence", epsilon=3e-3, epsilon_high=4e-3, beta=0.0)
    """
    problems = []
    names: Mapping[str, tuple[str, tuple[str, ...]]] = {
        "loss_type": (loss_type, LOSS_TYPES),
        "importance_sampling_level": (importance_sampling_level, IMPORTANCE_SAMPLING_LEVELS),
    }
    for key, (value, known) in names.items():
        if value not in known:
            problems.append(f"rl.{key} = {value!r} does not exist. {did_you_mean(value, known)}")
    if not 0 < epsilon < 1:
        problems.append(f"rl.epsilon = {epsilon} must lie between 0 and 1; the ratio is clipped at 1 - epsilon.")
    if not (epsilon_high > 0 and math.isfinite(epsilon_high)):
        problems.append(f"rl.epsilon_high = {epsilon_high} must be positive; the ratio is clipped at 1 + epsilon_high.")
    if not (beta >= 0 and math.isfinite(beta)):
        problems.append(f"rl.beta = {beta} must be 0 or positive; it weighs the KL penalty to the reference policy.")
    if problems:
        raise ConfigError("\n".join(problems))
    level = cast(ImportanceSamplingLevel, importance_sampling_level)
    return ClippedObjective(cast(LossType, loss_type), level, epsilon, epsilon_high, beta)
