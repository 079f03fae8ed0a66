"""The objective a recipe names: importance level x policy term x aggregation x KL x entropy, each on its own.

Loss to minimise: ``-aggregate(policy term) + beta aggregate(KL) - entropy_coef mean(entropy)``; the policy term is
weighed where other weights have sampled (`correction`). Names and semantics are those of TRL's `GRPOTrainer` wherever
TRL has them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from rlhf_drive.errors import ConfigError, PluginError
from rlhf_drive.objective_rules import CLIPPED, correction_refusal
from rlhf_drive.objectives.aggregate import Aggregation, Denominators, aggregate
from rlhf_drive.objectives.base import LossInputs, LossOutputs, Objective
from rlhf_drive.objectives.correction import importance_correction
from rlhf_drive.objectives.importance import WHOLE_SEQUENCE, ImportanceSamplingLevel, log_importance, step_share
from rlhf_drive.objectives.kl import KlEstimator, kl_k1, kl_k2, kl_k3, kl_loss
from rlhf_drive.objectives.settings import ObjectiveSettings
from rlhf_drive.objectives.surrogates import (
    cispo_surrogate,
    clipped_surrogate,
    geometric_mean_weight,
    sapo_surrogate,
    weighted_likelihood,
)

__all__ = ["AGGREGATION_OF", "PolicyObjective"]

AGGREGATION_OF: Mapping[str, Aggregation] = {
    "grpo": "grpo",
    "bnpo": "bnpo",
    "dr_grpo": "dr_grpo",
    "dapo": "dapo",
    "luspo": "luspo",
    "cispo": "dapo",
    "sapo": "grpo",
    "gmpo": "grpo",
    "wll": "grpo",
}
"""How each `loss_type` averages over tokens."""
OWN_METRICS = "own/"
"""What the metrics of a user's function begin with."""


@dataclass(frozen=True)
class _Tokens:
    """Inputs with everything silenced that is not looked at: garbage there would reach gradients as NaN."""

    inputs: LossInputs
    """As they came."""
    rows: Tensor
    """``[N]`` bool, learned rows."""
    mask: Tensor
    """``[N, T]`` bool, scored tokens of learned rows; what is counted."""
    seen: Tensor
    """``[N, T]`` bool, those of them that were looked at."""
    logp: Tensor
    """``[N, T]``, 0 where not seen."""
    old_logp: Tensor
    """``[N, T]``, 0 where not seen."""
    ref_logp: Tensor | None
    """``[N, T]``, 0 where not seen."""
    advantages: Tensor
    """``[N, 1]`` or ``[N, T]``; anything in rows that are not learned from."""

    @classmethod
    def of(cls, inputs: LossInputs) -> _Tokens:
        rows = inputs.learned_rows()
        mask = inputs.mask & rows[:, None]
        seen = mask if inputs.weight is None else mask & (inputs.weight > 0)
        advantages = inputs.advantages.to(inputs.logp.dtype)
        advantages = advantages[:, None] if advantages.ndim == 1 else advantages

        def silence(values: Tensor) -> Tensor:
            return torch.where(seen, values, 0.0)

        return cls(
            inputs,
            rows,
            mask,
            seen,
            silence(inputs.logp),
            silence(inputs.old_logp),
            None if inputs.ref_logp is None else silence(inputs.ref_logp),
            advantages,
        )

    def log_importance(self, level: ImportanceSamplingLevel) -> Tensor:
        return log_importance(self.logp, self.old_logp, self.seen, level, self.inputs.step_of)


@dataclass(frozen=True)
class PolicyObjective:
    """The objective of `settings`; build it with `make_objective`, which checks them."""

    settings: ObjectiveSettings
    """What a recipe says."""
    own: Objective | None = None
    """A user's policy term, in place of one of ours."""

    @property
    def level(self) -> ImportanceSamplingLevel:
        """Importance level; `wll` has no ratio, and is watched per token."""
        level = "token" if self.settings.loss_type == "wll" else self.settings.importance_sampling_level
        return cast(ImportanceSamplingLevel, level)

    def __call__(self, inputs: LossInputs, denominators: Denominators) -> LossOutputs:
        """This micro-batch's share of the loss and of the metrics.

        Raises:
            ConfigError: If reference log-probabilities or entropies are needed and missing, or some decode steps were
                left out of a ratio over whole sequences.
            PluginError: If a user's function raises, or returns something else than a loss with metrics.
        """
        self._check(inputs)
        tokens = _Tokens.of(inputs)
        metrics: dict[str, Tensor] = {}
        if self.own is None:
            loss = -self._policy(tokens, denominators)
        else:
            outputs = self._of_own(self.own, inputs, denominators)
            loss = outputs.loss
            metrics.update(outputs.metrics)
        metrics["loss/policy"] = loss.detach()
        if self._kl_in_loss:
            kl = self._kl(tokens, denominators)
            loss = loss + kl
            metrics["loss/kl"] = kl.detach()
        if inputs.entropy is not None:
            entropy = aggregate(inputs.entropy, tokens.seen, "dapo", denominators, inputs.weight)
            metrics["entropy/mean"] = entropy.detach()
            if self.settings.entropy_coef > 0:
                loss = loss - self.settings.entropy_coef * entropy
        with torch.no_grad():
            metrics.update(self._ratio_metrics(tokens, denominators))
            metrics.update(_divergence_metrics(tokens, denominators))
            if self._corrected(inputs):
                metrics.update(self._correction_metrics(tokens, denominators))
        return LossOutputs(loss=loss, metrics=metrics)

    def _of_own(self, own: Objective, inputs: LossInputs, denominators: Denominators) -> LossOutputs:
        """What a user's function returns, checked."""
        name = self.settings.loss_type
        try:
            outputs = own(inputs, denominators)
        except Exception as error:
            raise PluginError(f"{name} raised {type(error).__name__}: {error}. Correct the function.") from error
        if not isinstance(outputs, LossOutputs) or outputs.loss.ndim != 0:
            loss = outputs.loss if isinstance(outputs, LossOutputs) else outputs
            found = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise PluginError(
                f"{name} must return LossOutputs with a scalar loss, LossOutputs(loss, {{}}); got {found}."
            )
        if inputs.logp.requires_grad and not outputs.loss.requires_grad:
            raise PluginError(f"{name} returned a loss without gradient. Make it from inputs.logp, not detached.")
        bad = [key for key, value in outputs.metrics.items() if not isinstance(value, Tensor) or value.ndim != 0]
        if bad:
            raise PluginError(f"{name} returned metrics that are no scalar tensors: {', '.join(bad)}.")
        taken = [key for key in outputs.metrics if not key.startswith(OWN_METRICS)]
        if taken:
            raise PluginError(
                f"{name} returned the metrics {', '.join(taken)}; names of one's own begin with {OWN_METRICS!r}, so "
                "that they cannot take the place of others."
            )
        return LossOutputs(outputs.loss, {key: value.detach() for key, value in outputs.metrics.items()})

    @property
    def _kl_in_loss(self) -> bool:
        return self.settings.beta > 0 and self.settings.kl_in == "loss"

    def _corrected(self, inputs: LossInputs) -> bool:
        return inputs.behaviour_logp is not None and self.settings.importance_sampling_cap > 0

    def _check(self, inputs: LossInputs) -> None:
        if self._corrected(inputs) and (reason := correction_refusal(self.settings.loss_type)):
            raise ConfigError(f"rl.importance_sampling_cap = {self.settings.importance_sampling_cap}: {reason}")
        if self._kl_in_loss and inputs.ref_logp is None:
            raise ConfigError(
                f"rl.beta = {self.settings.beta} penalises the distance to the reference policy, but no reference "
                "log-probabilities were given; compute them, or set rl.beta to 0."
            )
        if self.settings.entropy_coef > 0 and inputs.entropy is None:
            raise ConfigError(
                f"rl.entropy_coef = {self.settings.entropy_coef} raises the entropy, but no entropies were given; "
                "compute them, or set rl.entropy_coef to 0."
            )
        if inputs.weight is not None and self.level in WHOLE_SEQUENCE:
            raise ConfigError(
                f"rl.likelihood_steps leaves decode steps out, but rl.importance_sampling_level = {self.level!r} (with "
                f"rl.loss_type = {self.settings.loss_type!r}) needs the ratio of the whole sequence, which no share of "
                "its steps estimates without bias. Set rl.likelihood_steps to 0, or the level to 'token' or 'step'."
            )

    def _policy(self, tokens: _Tokens, denominators: Denominators) -> Tensor:
        """What is maximised, aggregated."""
        settings, advantages = self.settings, tokens.advantages
        if settings.loss_type == "wll":
            terms = weighted_likelihood(advantages, tokens.rows, tokens.inputs.group_size) * tokens.logp
        elif settings.loss_type == "gmpo":
            log_ratio = tokens.log_importance("token")
            weight = geometric_mean_weight(log_ratio, advantages, tokens.mask, settings.epsilon, settings.epsilon_high)
            terms = weight * advantages
        else:
            weight = tokens.log_importance(self.level).exp()
            if settings.loss_type == "cispo":
                terms = cispo_surrogate(weight, advantages, tokens.logp, settings.epsilon_high)
            elif settings.loss_type == "sapo":
                positive, negative = settings.sapo_temperature_pos, settings.sapo_temperature_neg
                terms = sapo_surrogate(weight, advantages, positive, negative)
            else:
                low, high = settings.epsilon, settings.epsilon_high
                terms = clipped_surrogate(weight, advantages, low, high, settings.delta)
        if self.level == "step":
            terms = terms * step_share(tokens.mask, tokens.inputs.step_of, terms.dtype)
        if self._corrected(tokens.inputs):
            terms = terms * importance_correction(tokens.inputs, self.level, settings.importance_sampling_cap)
        return aggregate(terms, tokens.mask, AGGREGATION_OF[settings.loss_type], denominators, tokens.inputs.weight)

    def _kl(self, tokens: _Tokens, denominators: Denominators) -> Tensor:
        """``beta`` times the divergence from the reference, aggregated as the policy term is, over tokens."""
        assert tokens.ref_logp is not None
        weight = tokens.log_importance(self.level).exp() if self.settings.use_bias_correction_kl else None
        estimator = cast(KlEstimator, self.settings.kl_estimator)
        terms = kl_loss(tokens.logp, tokens.old_logp, tokens.ref_logp, estimator, weight)
        aggregation = AGGREGATION_OF.get(self.settings.loss_type, "grpo")
        return self.settings.beta * aggregate(terms, tokens.mask, aggregation, denominators, tokens.inputs.weight)

    def _ratio_metrics(self, tokens: _Tokens, denominators: Denominators) -> dict[str, Tensor]:
        """Mean, extremes and clipped shares of the ratios."""
        level: ImportanceSamplingLevel = "token" if self.settings.loss_type == "gmpo" else self.level
        weight = tokens.log_importance(level).exp()
        lowest, highest = self._bounds()
        low = (weight < lowest) & (tokens.advantages < 0)
        high = (weight > highest) & (tokens.advantages > 0)
        return {
            **_mean_and_extremes("ratio", weight, tokens, level, denominators),
            "ratio/clip_frac": _mean((low | high).to(weight.dtype), tokens, level, denominators),
            "ratio/clip_low_frac": _mean(low.to(weight.dtype), tokens, level, denominators),
            "ratio/clip_high_frac": _mean(high.to(weight.dtype), tokens, level, denominators),
        }

    def _correction_metrics(self, tokens: _Tokens, denominators: Denominators) -> dict[str, Tensor]:
        """Mean and extremes of the weights as they were used, and the share that the cap has lowered."""
        level, cap = self.level, self.settings.importance_sampling_cap
        whole = importance_correction(tokens.inputs, level, math.inf)
        return {
            **_mean_and_extremes("correction", whole.clamp(max=cap), tokens, level, denominators),
            "correction/capped_frac": _mean((whole > cap).to(whole.dtype), tokens, level, denominators),
        }

    def _bounds(self) -> tuple[float, float]:
        """Ratios beyond which the clip bites; none where nothing is clipped."""
        low, high = self.settings.epsilon, self.settings.epsilon_high
        if self.settings.loss_type == "cispo":
            return 0.0, high
        if self.settings.loss_type == "gmpo":
            return math.exp(-low), math.exp(high)
        return (1 - low, 1 + high) if self.settings.loss_type in CLIPPED else (0.0, math.inf)


def _mean(values: Tensor, tokens: _Tokens, level: ImportanceSamplingLevel, denominators: Denominators) -> Tensor:
    """Mean of values of `level`, each counted once: tokens, steps or sequences. ``[N, T]`` or ``[N, 1]``."""
    if level == "sequence" and values.shape[1] == 1:
        return torch.where(tokens.rows[:, None], values, 0.0).sum() / max(denominators.sequences, 1.0)
    if level == "step":
        values = values * step_share(tokens.mask, tokens.inputs.step_of, values.dtype)
    kind: Aggregation = "dapo" if level == "token" else "grpo"
    return aggregate(values, tokens.mask, kind, denominators, tokens.inputs.weight)


def _mean_and_extremes(
    area: str, weight: Tensor, tokens: _Tokens, level: ImportanceSamplingLevel, denominators: Denominators
) -> dict[str, Tensor]:
    counted = tokens.rows[:, None] if level == "sequence" else tokens.seen
    return {
        f"{area}/mean": _mean(weight, tokens, level, denominators),
        f"{area}/min": torch.where(counted, weight, torch.inf).amin(),
        f"{area}/max": torch.where(counted, weight, -torch.inf).amax(),
    }


def _divergence_metrics(tokens: _Tokens, denominators: Denominators) -> dict[str, Tensor]:
    """``kl/old_approx``: k3 of ``KL(old || live)``; ``kl/ref_k1..k3``: of ``KL(live || ref)``. Means over tokens."""

    def mean(values: Tensor) -> Tensor:
        return aggregate(values, tokens.mask, "dapo", denominators, tokens.inputs.weight)

    metrics = {"kl/old_approx": mean(kl_k3(tokens.old_logp, tokens.logp))}
    if tokens.ref_logp is not None:
        metrics["kl/ref_k1"] = mean(kl_k1(tokens.logp, tokens.ref_logp))
        metrics["kl/ref_k2"] = mean(kl_k2(tokens.logp, tokens.ref_logp))
        metrics["kl/ref_k3"] = mean(kl_k3(tokens.logp, tokens.ref_logp))
    return metrics
