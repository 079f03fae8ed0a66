"""The policy update of one RL step: references, advantages, then micro-batched optimisation within limits."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rewards.carriers import Scores
from rlhf_drive.errors import ConfigError, TrainingError
from rlhf_drive.likelihood import LikelihoodEstimator
from rlhf_drive.objectives import (
    AdvantageEstimator,
    AdvantageInputs,
    Objective,
    ObjectiveSettings,
    merge_metrics,
    reward_penalty,
)
from rlhf_drive.policies import Policy
from rlhf_drive.policies.feature_cache import FeatureCache
from rlhf_drive.policies.moe import RouterRecord
from rlhf_drive.scenes import Scene
from rlhf_drive.training.ema import EmaWeights
from rlhf_drive.training.engine import TrainingEngine
from rlhf_drive.training.guards import LimitGuard
from rlhf_drive.training.logp_source import LogpSource
from rlhf_drive.training.micro_loss import MicroLoss
from rlhf_drive.training.not_finite import Evidence, check_finite, check_gradients
from rlhf_drive.training.reference import ReferencePolicy, sync_due
from rlhf_drive.training.routing import routing_metrics
from rlhf_drive.training.schedule import learning_rate_scale
from rlhf_drive.training.trainer_settings import TrainerSettings
from rlhf_drive.training.update_batch import UpdateBatch
from rollout import Rollout

__all__ = ["RlTrainer"]

FIRST_RATIOS = {
    "ratio/mean": "ratio/first_mean",
    "ratio/min": "ratio/first_min",
    "ratio/max": "ratio/first_max",
}
"""What the ratio is called before the first update, where it is 1."""


class RlTrainer:
    """Owns optimizer, reference policy, schedule and averages. No dropout: ratios measure updates alone."""

    def __init__(
        self,
        engine: TrainingEngine,
        likelihood: LikelihoodEstimator,
        advantages: AdvantageEstimator,
        objective: Objective,
        objective_settings: ObjectiveSettings,
        settings: TrainerSettings,
        *,
        features: FeatureCache,
        reference: ReferencePolicy | None = None,
        folder: Path | None = None,
        reward_weights: Mapping[str, float] | None = None,
    ) -> None:
        """Take charge of a policy; with a frozen router, its weights must be so already.

        Args:
            engine: Policy, which is trained in place, and optimizer.
            likelihood: Gives live, old and reference log-probabilities.
            advantages: From rewards to advantages.
            objective: From log-probabilities and advantages to a loss.
            objective_settings: What the objective was made with: KL and entropy decide what must be computed.
            settings: Plain arguments.
            features: Cache of network inputs.
            reference: Policy that the KL divergence is measured to; needed where `objective_settings.beta` > 0.
            folder: Where tensors go when something is not finite; None keeps nothing.
            reward_weights: Weight of each reward term by its column in the scores, for advantages that look at terms.

        Raises:
            ConfigError: Several updates on one batch are asked for with a likelihood that has no ratio.
        """
        if settings.num_iterations > 1 and not likelihood.has_ratio:
            raise ConfigError(
                f"Likelihood {likelihood.name!r} has no ratio and is on-policy only, but rl.num_iterations is "
                f"{settings.num_iterations}. Set it to 1, or use another likelihood."
            )
        self.engine, self.policy, self.optimizer = engine, engine.policy.eval(), engine.optimizer
        self.likelihood, self.advantages, self.objective = likelihood, advantages, objective
        self.objective_settings, self.settings = objective_settings, settings
        self.reference, self.folder = reference, folder
        self.reward_weights = dict(reward_weights or {})
        self.source = LogpSource(likelihood, features, settings.max_tokens_per_forward, even=engine.divided)
        self.parameters = engine.parameters
        self.ema = EmaWeights(self.policy, settings.ema_decay) if settings.ema_decay > 0 else None
        self.guard = LimitGuard(settings.limits, self.policy, self.optimizer)
        self.first_routing: RouterRecord | None = None
        self.likelihood_s = 0.0
        self.seen: list[Evidence] = []

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
            TrainingError: Loss or gradients are not finite, or a limit was passed and the recipe says to stop.
        """
        settings = self.settings
        scale = learning_rate_scale(step, settings.max_steps, settings.warmup_ratio)
        self.engine.set_learning_rate(settings.learning_rate * scale)
        batch, metrics = self._prepare(step, scenes, rollout, scores)
        metrics["optim/learning_rate"] = self.optimizer.param_groups[0]["lr"]
        metrics["policy/sampled_nll"] = float(-rollout.trace.logp.sum() / rollout.trace.scored.sum())
        if not len(batch.kept):
            self._move_reference(step)
            return metrics
        started, self.likelihood_s, self.first_routing = time.perf_counter(), 0.0, None
        self.guard.begin()
        for iteration in range(settings.num_iterations):
            merged = self._iteration(batch, metrics, first=iteration == 0)
            if iteration == 0:
                metrics |= {first: merged[now] for now, first in FIRST_RATIOS.items() if now in merged}
                metrics["logprob_mismatch/max"] = merged["logprob_mismatch/max"]
            metrics |= {name: value for name, value in merged.items() if name != "logprob_mismatch/max"}
            if iteration > 0 and self.guard.check(merged, step):
                break
            metrics["optim/grad_norm"] = self._update()
        else:
            if settings.limits.active and settings.limits.on_limit != "next_batch":
                self.guard.check(self._look_back(batch), step)
        self._follow(step)
        if settings.limits.active:
            metrics |= self.guard.metrics()
        metrics["time/likelihood_s"] = self.likelihood_s
        metrics["time/update_s"] = time.perf_counter() - started - self.likelihood_s
        return metrics

    def _prepare(
        self, step: int, scenes: Sequence[Scene], rollout: Rollout, scores: Scores
    ) -> tuple[UpdateBatch, dict[str, float]]:
        """All that is fixed before the first update: probes, references, advantages."""
        settings, kl = self.settings, self.objective_settings
        batch = self.source.batch(
            scenes,
            rollout,
            scores,
            seed=settings.seed,
            step=step,
            micro_batch_scenes=settings.micro_batch_scenes,
            wanted_steps=settings.likelihood_steps,
            sampler_logp=settings.router != "record" and not settings.recompute_old,
            tell_behaviour=settings.recompute_old,
        )
        rewards, started = torch.from_numpy(scores.total).float(), time.perf_counter()
        if kl.beta > 0 and kl.kl_in == "reward":
            batch.ref_logp = self._reference_logp(batch, everywhere=True)
            # Not kept in the batch: the first pass, which may also note the routing, gives the ratios' denominators.
            old = self._all_logp(self.policy, batch, everywhere=True) if batch.old_logp is None else batch.old_logp
            rewards = rewards - reward_penalty(old, batch.ref_logp, batch.mask, kl, batch.step_weight()).cpu()
        inputs = AdvantageInputs(rewards, batch.valid, rollout.num_generations, *self._reward_terms(scores))
        found = self.advantages(inputs)
        batch.learn_from(found)
        if kl.beta > 0 and batch.ref_logp is None and len(batch.kept):
            batch.ref_logp = self._reference_logp(batch)
        return batch, {**found.metrics(), "time/reference_s": time.perf_counter() - started}

    def informative(self, scores: Scores, num_generations: int) -> NDArray[np.bool_]:
        """``[S]`` whether a group's rewards, before any KL is taken off, leave something to learn."""
        rewards, valid = torch.from_numpy(scores.total).float(), torch.from_numpy(scores.valid.copy())
        inputs = AdvantageInputs(rewards, valid, num_generations, *self._reward_terms(scores))
        return np.asarray((~self.advantages(inputs).degenerate).numpy())

    def _reward_terms(self, scores: Scores) -> tuple[Tensor | None, Tensor | None]:
        """Reward terms ``[N, C]`` and their weights ``[C]``; None where nobody said which they are."""
        if not self.reward_weights:
            return None, None
        columns = [torch.from_numpy(scores.component(name)).float() for name in self.reward_weights]
        return torch.stack(columns, dim=1), torch.tensor(list(self.reward_weights.values()))

    def _reference_logp(self, batch: UpdateBatch, *, everywhere: bool = False) -> Tensor:
        if self.reference is None:
            raise TrainingError(
                f"rl.beta = {self.objective_settings.beta} measures the distance to a reference policy, and the "
                "trainer was given none."
            )
        with self.reference.using() as reference:
            # With its own routing: led through the policy's experts it would be another reference at every step.
            return self._all_logp(reference, batch, replay=False, everywhere=everywhere)

    @torch.no_grad()
    def _all_logp(self, policy: Policy, batch: UpdateBatch, *, replay: bool = True, everywhere: bool = False) -> Tensor:
        """``[N, T]`` log-probabilities of the kept groups; 0 for the others.

        Of several processes each finds those of its own micro-batches; with `everywhere` all get all.
        """
        result, mine = torch.zeros(batch.mask.shape, device=batch.mask.device), []
        for turn in self.engine.turns(batch.micro_batches(replay=replay)):
            part, ask = turn.part, functools.partial(self.source.logp, batch=batch, part=turn.part)
            found, _ = self.engine.forward(ask) if policy is self.policy else ask(policy)
            result[part.rows] = found.logp.float()
            if turn.counts:
                mine.append((part.rows, result[part.rows].cpu()))
        if everywhere and self.engine.ranks.count > 1:
            for rows, logp in self.engine.collect(mine):
                result[rows] = logp.to(result)
        return result

    def _iteration(self, batch: UpdateBatch, so_far: Mapping[str, float], *, first: bool) -> dict[str, float]:
        """Accumulate the gradient of the whole batch, micro-batch by micro-batch; the batch's metrics."""
        settings, mine, self.seen = self.settings, [], []
        loss_of = MicroLoss(
            self.source, self.objective, settings, self.objective_settings.entropy_coef, batch, so_far, first
        )
        routing: RouterRecord | None = None
        problem: TrainingError | None = None
        for turn in self.engine.turns(batch.micro_batches()):
            record = RouterRecord() if routing is None or settings.has_router_loss else None
            loss, seen = self.engine.forward(functools.partial(loss_of, part=turn.part, record=record))
            self.likelihood_s += seen.likelihood_s
            problem = problem or self._problem(seen.evidence)
            self.engine.backward(loss)
            if turn.counts:
                mine.append(seen.metrics)
            routing = routing or record
            self.seen.append(seen.evidence)
        metrics = {}
        if routing and self.engine.ranks.main:
            self.first_routing = self.first_routing or routing
            metrics = routing_metrics(routing, self.first_routing)
        return self._merged(mine, problem) | self.engine.ranks.first(metrics)

    def _problem(self, evidence: Evidence) -> TrainingError | None:
        """What is not finite. One process stops there; one of several first sees its backward passes through, so that
        the others do not wait for it."""
        try:
            check_finite(evidence, self.policy, self.folder, self.engine.ranks)
        except TrainingError as error:
            if self.engine.ranks.count == 1:
                raise
            return error
        return None

    def _merged(self, mine: Sequence[Mapping[str, Tensor]], problem: TrainingError | None = None) -> dict[str, float]:
        """The batch's metrics from this process's micro-batches, and those of the others.

        Raises:
            TrainingError: A process has a problem; on all of them.
        """
        if self.engine.ranks.count == 1:
            return merge_metrics(mine)
        problems = [found for found in self.engine.ranks.gather(problem) if found is not None]
        if problems:
            raise problem or problems[0]
        return merge_metrics(self.engine.collect([{n: value.cpu() for n, value in part.items()} for part in mine]))

    def _update(self) -> float:
        """One optimizer step on the accumulated gradient; its norm."""
        evidence = Evidence.concatenate(self.seen)
        check = functools.partial(
            check_gradients, evidence=evidence, policy=self.policy, folder=self.folder, ranks=self.engine.ranks
        )
        return float(self.engine.step(self.settings.max_grad_norm, check))

    @torch.no_grad()
    def _look_back(self, batch: UpdateBatch) -> dict[str, float]:
        """Ratio and divergence after the last update: one more forward pass over the batch."""
        entropy, mine = self.objective_settings.entropy_coef > 0, []
        for turn in self.engine.turns(batch.micro_batches()):
            ask = functools.partial(self.source.logp, batch=batch, part=turn.part, entropy=entropy)
            inputs = batch.loss_inputs(turn.part, self.engine.forward(ask)[0])
            if turn.counts:
                mine.append(self.objective(inputs, batch.denominators).metrics)
        return self._merged(mine)

    def _follow(self, step: int) -> None:
        """Averages and reference after a step's updates."""
        if self.ema and not self.guard.undone:
            self.ema.update(self.policy)
        self._move_reference(step)

    def _move_reference(self, step: int) -> None:
        """The reference follows the policy every so many steps, also after one that taught nothing."""
        settings = self.settings
        if self.reference and settings.sync_ref_model and sync_due(step + 1, settings.ref_model_sync_steps):
            self.reference.sync(self.policy, settings.ref_model_mixup_alpha)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps besides weights and optimizer: tensors by name, and plain data under `guard`. All
        processes must call it, and get the same."""
        tensors = {f"ema.{name}": value for name, value in (self.ema.state_dict() if self.ema else {}).items()}
        if self.reference:
            tensors |= {f"reference.{name}": value for name, value in self.reference.state_dict().items()}
        return {"tensors": tensors, "guard": self.guard.state()}

    def restore(self, tensors: Mapping[str, Tensor], guard: Mapping[str, Any]) -> None:
        """Go on from :meth:`state`."""
        if self.ema:
            self.ema.load_state_dict(_below(tensors, "ema."))
        if self.reference:
            self.reference.load_state_dict(_below(tensors, "reference."))
        self.guard.restore(guard)


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
