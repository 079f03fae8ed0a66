"""The loss of one micro-batch of a policy update, from network inputs to what its backward pass starts from."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlhf_drive.objectives import LossOutputs, Objective
from rlhf_drive.policies import Policy, SceneContext
from rlhf_drive.policies.moe import RouterRecord
from rlhf_drive.training.evidence import evidence_of
from rlhf_drive.training.extra_losses import cloning_loss, router_loss
from rlhf_drive.training.logp_source import LogpSource
from rlhf_drive.training.not_finite import Evidence
from rlhf_drive.training.trainer_settings import TrainerSettings
from rlhf_drive.training.update_batch import MicroBatch, UpdateBatch

__all__ = ["MicroLoss", "Seen"]


@dataclass(frozen=True)
class Seen:
    """What a micro-batch showed besides its loss."""

    metrics: Mapping[str, Tensor]
    """Detached scalars, this micro-batch's share; for `merge_metrics`."""
    evidence: Evidence
    """For the case that something in it is not finite."""
    likelihood_s: float
    """Seconds of the forward pass."""


@dataclass(frozen=True)
class MicroLoss:
    """``loss(policy, part, record)``: this micro-batch's share of the batch's loss; no weight is changed."""

    source: LogpSource
    """Gives log-probabilities."""
    objective: Objective
    """From log-probabilities and advantages to a loss."""
    settings: TrainerSettings
    """Weights of the further losses."""
    entropy_coef: float
    """Weight of the entropy in the objective; 0 makes it a statistic."""
    batch: UpdateBatch
    """The batch; takes old log-probabilities and routing in the first iteration."""
    so_far: Mapping[str, float]
    """Metrics of the step so far, for the evidence."""
    first: bool
    """Whether the weights are still those that the batch's ratios are measured from."""

    def __call__(self, policy: Policy, part: MicroBatch, record: RouterRecord | None) -> tuple[Tensor, Seen]:
        """The loss and what was seen.

        Args:
            policy: The live policy.
            part: Some groups of the batch.
            record: Takes the routing of the pass, for statistics and the routers' losses.
        """
        batch, settings, started = self.batch, self.settings, time.perf_counter()
        found, context = self.source.logp(
            policy,
            batch,
            part,
            record=record,
            keep_experts=self.first and settings.router == "record",
            entropy=self.first or self.entropy_coef > 0,
        )
        likelihood_s = time.perf_counter() - started
        if found.entropy is not None and self.entropy_coef == 0:
            found = replace(found, entropy=found.entropy.detach())  # a statistic keeps nothing for the backward
        if self.first:
            batch.keep(part.rows, found)
        inputs = batch.loss_inputs(part, found)
        outputs = self.objective(inputs, batch.denominators)
        if settings.bc_coef > 0:
            outputs = self._with_cloning(outputs, policy, context, part)
        loss = outputs.loss
        if record and settings.has_router_loss:
            share = len(part.scenes) / len(batch.kept)
            loss = loss + share * router_loss(record, settings.load_balance_coef, settings.router_z_coef)
        difference = torch.where(inputs.mask, inputs.logp.detach() - inputs.old_logp, 0.0).abs().max()
        metrics = {**outputs.metrics, "loss/total": loss.detach(), "logprob_mismatch/max": difference}
        return loss, Seen(metrics, evidence_of(batch, part, inputs, loss, self.so_far), likelihood_s)

    def _with_cloning(
        self, outputs: LossOutputs, policy: Policy, context: SceneContext, part: MicroBatch
    ) -> LossOutputs:
        batch, settings = self.batch, self.settings
        cloning = cloning_loss(
            policy, context, part.scenes, batch.rollout.trace.order, seed=settings.seed, step=batch.step,
            calls=batch.size if self.source.even else 0,
        ) / len(batch.kept)  # fmt: skip
        metrics = {**outputs.metrics, "loss/cloning": cloning.detach()}
        return replace(outputs, loss=outputs.loss + settings.bc_coef * cloning, metrics=metrics)
