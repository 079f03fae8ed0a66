"""The policy update of one RL step: old and reference log-probabilities, then micro-batched optimisation."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from rewards.carriers import Scores
from rlhf_drive.errors import TrainingError
from rlhf_drive.likelihood import flatten_steps, trace_logp
from rlhf_drive.objectives import (
    Advantages,
    Denominators,
    LossInputs,
    Objective,
    count_denominators,
    group_advantages,
    merge_metrics,
)
from rlhf_drive.objectives.advantages import ScaleRewards
from rlhf_drive.policies import Policy
from rlhf_drive.policies.feature_cache import FeatureCache
from rlhf_drive.policies.moe import RouterRecord
from rlhf_drive.scenes import Scene
from rlhf_drive.training.schedule import learning_rate_scale
from rollout import Rollout

__all__ = ["RlTrainer", "TrainerSettings", "freeze_router"]


@dataclass(frozen=True)
class TrainerSettings:
    """Plain arguments of the update; a recipe's `rl` section gives them."""

    max_steps: int
    """Length of the learning-rate schedule."""
    learning_rate: float
    """Peak learning rate."""
    weight_decay: float
    """AdamW's decoupled decay."""
    warmup_ratio: float
    """Share of steps spent warming up."""
    max_grad_norm: float
    """Gradients are scaled down to this norm."""
    num_iterations: int
    """Optimizer steps per batch of rollouts (TRL's mu)."""
    micro_batch_scenes: int
    """Scenes per forward and backward pass; memory only, the update does not depend on it."""
    beta: float
    """Weight of the KL to the reference; 0 spares the reference's forward pass."""
    scale_rewards: ScaleRewards
    """How advantages are scaled."""
    spread_tolerance: float
    """Groups whose rewards differ by no more teach nothing and are left out."""
    train_router: bool
    """Whether router weights move; frozen by default, since a flipped expert moves the ratio more than the update."""


def freeze_router(policy: Policy) -> None:
    """Stop gradients of all router weights."""
    for name, parameter in policy.named_parameters():
        if name.endswith("router.weight"):
            parameter.requires_grad_(False)


class RlTrainer:
    """Owns optimizer, reference policy and schedule. No dropout: ratios measure updates alone."""

    def __init__(
        self,
        policy: Policy,
        objective: Objective,
        settings: TrainerSettings,
        accelerator: Accelerator,
        features: FeatureCache,
    ) -> None:
        self.policy, self.objective, self.settings = policy.eval(), objective, settings
        self.accelerator, self.features = accelerator, features
        self.reference = copy.deepcopy(policy).requires_grad_(False) if settings.beta > 0 else None
        if not settings.train_router:
            freeze_router(policy)
        self.routing: RouterRecord | None = None
        self.first_routing: RouterRecord | None = None
        self.likelihood_s = 0.0
        self.parameters = [p for p in policy.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay
        )

    def step(self, step: int, scenes: Sequence[Scene], rollout: Rollout, scores: Scores) -> dict[str, float]:
        """Learn from one batch of scored rollouts.

        Args:
            step: 0-based; sets the learning rate.
            scenes: S scenes.
            rollout: N = S * G rows sampled with the present weights.
            scores: N scored rows.

        Returns:
            Metrics by ``area/name``; ``ratio/first_*`` are those before the first update, where the ratio is 1. Seconds
            of the reference's likelihood, of the live one, and of loss, gradients and optimizer (``time/update_s``).

        Raises:
            TrainingError: Loss or gradient norm is not finite.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * learning_rate_scale(
                step, self.settings.max_steps, self.settings.warmup_ratio
            )
        valid = torch.from_numpy(scores.valid.copy())
        advantages = group_advantages(
            torch.from_numpy(scores.total).float(), valid, rollout.num_generations,
            scale_rewards=self.settings.scale_rewards, tolerance=self.settings.spread_tolerance,
        )  # fmt: skip
        kept = (~advantages.degenerate).nonzero().flatten()
        metrics = {**_group_metrics(advantages), "optim/learning_rate": self.optimizer.param_groups[0]["lr"]}
        metrics["policy/sampled_nll"] = float(-rollout.trace.logp.sum() / rollout.trace.scored.sum())
        if not len(kept):
            return metrics
        rows = _rows_of(kept, rollout.num_generations)
        mask = flatten_steps(rollout.trace.scored)[rows]
        length = rollout.tokens.shape[1]
        denominators = count_denominators(mask, valid[rows].to(mask.device), max_length=length)
        started = time.perf_counter()
        references = self._reference_logp(kept, scenes, rollout)
        metrics["time/reference_s"] = time.perf_counter() - started
        started, self.likelihood_s = time.perf_counter(), 0.0
        self.first_routing = None
        for iteration in range(self.settings.num_iterations):
            parts = self._iteration(kept, scenes, rollout, advantages.values, valid, references, denominators)
            merged = self._update(parts)
            if iteration == 0:
                metrics["ratio/first_mean"] = merged["ratio/mean"]
                metrics["ratio/first_min"] = merged["ratio/min"]
                metrics["ratio/first_max"] = merged["ratio/max"]
                metrics["logprob_mismatch/max"] = merged["logprob_mismatch/max"]
            metrics.update({k: v for k, v in merged.items() if k != "logprob_mismatch/max"})
        metrics["time/likelihood_s"] = self.likelihood_s
        metrics["time/update_s"] = time.perf_counter() - started - self.likelihood_s
        return metrics

    def _micro_batches(self, kept: Tensor) -> tuple[Tensor, ...]:
        return kept.split(self.settings.micro_batch_scenes)

    @torch.no_grad()
    def _reference_logp(self, kept: Tensor, scenes: Sequence[Scene], rollout: Rollout) -> list[Tensor] | None:
        """Per micro-batch ``[n, K*L]`` log-probabilities of the frozen reference."""
        if self.reference is None:
            return None
        result = []
        for part in self._micro_batches(kept):
            batch = self.features.batch(self.reference, [scenes[s] for s in part.tolist()])
            trace = rollout.trace.rows(_rows_of(part, rollout.num_generations))
            result.append(trace_logp(self.reference, self.reference.encode(batch), trace)[0])
        return result

    def _iteration(
        self,
        kept: Tensor,
        scenes: Sequence[Scene],
        rollout: Rollout,
        advantages: Tensor,
        valid: Tensor,
        references: list[Tensor] | None,
        denominators: Denominators,
    ) -> list[Mapping[str, Tensor]]:
        """Accumulate the gradient of the whole batch, micro-batch by micro-batch; their metrics."""
        parts: list[Mapping[str, Tensor]] = []
        device = self.policy.device
        for i, part in enumerate(self._micro_batches(kept)):
            rows = _rows_of(part, rollout.num_generations)
            trace = rollout.trace.rows(rows)
            started = time.perf_counter()
            context = self.policy.encode(self.features.batch(self.policy, [scenes[s] for s in part.tolist()]))
            logp, mask = trace_logp(self.policy, context, trace)
            self.likelihood_s += time.perf_counter() - started
            old_logp = flatten_steps(trace.logp)
            learned = valid[rows].to(device)
            inputs = LossInputs(
                logp,
                old_logp,
                None if references is None else references[i],
                advantages[rows].to(device),
                mask,
                learned,
            )
            outputs = self.objective(inputs, denominators)
            if not torch.isfinite(outputs.loss):
                names = ", ".join(scenes[s].token for s in part.tolist()[:5])
                raise TrainingError(f"The loss is {outputs.loss.item()} on scenes {names}; lower rl.learning_rate.")
            self.accelerator.backward(outputs.loss)
            difference = torch.where(mask, logp.detach() - old_logp, 0.0).abs().max()
            part_metrics = {**outputs.metrics, "loss/total": outputs.loss.detach(), "logprob_mismatch/max": difference}
            parts.append(part_metrics)
        return parts

    def _update(self, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
        """One optimizer step on the accumulated gradient."""
        merged = merge_metrics(parts)
        if self.routing is not None:
            # Of the first micro-batch: how even the load is, and how far routing has moved since the first pass.
            self.first_routing = self.first_routing or self.routing
            merged["moe/load_cv"] = self.routing.load_cv()
            merged["moe/routing_flip_frac"] = self.routing.flips(self.first_routing)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.max_grad_norm)
        if not torch.isfinite(norm):
            raise TrainingError(f"The gradient norm is {norm.item()}; lower rl.learning_rate or check the reward.")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        merged["optim/grad_norm"] = float(norm)
        return merged


def _rows_of(scenes: Tensor, num_generations: int) -> Tensor:
    """Row indices of the given scenes' groups, scene-major."""
    return (scenes[:, None] * num_generations + torch.arange(num_generations)).flatten()


def _group_metrics(advantages: Advantages) -> dict[str, float]:
    return {
        "groups/degenerate_frac": float(advantages.degenerate.float().mean()),
        "groups/spread": float(advantages.spread.mean()),
    }
