"""The one way the trainer asks for log-probabilities: of micro-batches, by the recipe's likelihood."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from rewards.carriers import Scores
from rlhf_drive.likelihood import LikelihoodEstimator, TokenLogp, flatten_steps
from rlhf_drive.objectives import Denominators
from rlhf_drive.policies import Policy, SceneContext
from rlhf_drive.policies.feature_cache import FeatureCache
from rlhf_drive.policies.moe import RouterRecord
from rlhf_drive.scenes import Scene
from rlhf_drive.training import profile
from rlhf_drive.training.update_batch import MicroBatch, UpdateBatch, drawn_steps
from rollout import Rollout, row_uniforms

__all__ = ["LogpSource"]


@dataclass(frozen=True)
class LogpSource:
    """A likelihood with what it is evaluated on."""

    likelihood: LikelihoodEstimator
    """Gives live, old and reference log-probabilities."""
    features: FeatureCache
    """Network inputs of scenes."""
    max_tokens: int
    """Plan tokens per forward pass; 0 takes a micro-batch at once."""
    even: bool = False
    """Whether a smaller micro-batch is cut into as many passes as a whole one: processes that divide the weights among
    them must run each layer equally often. Routing is noted of the first pass, so a smaller one's is of fewer rows."""

    def batch(
        self,
        scenes: Sequence[Scene],
        rollout: Rollout,
        scores: Scores,
        *,
        seed: int,
        step: int,
        micro_batch_scenes: int,
        wanted_steps: int,
        sampler_logp: bool,
        tell_behaviour: bool = False,
    ) -> UpdateBatch:
        """A batch with its probes drawn, before advantages are known: all groups are kept, advantages are 0.

        Args:
            scenes: S scenes.
            rollout: N = S * G rows.
            scores: N scored rows.
            seed: Keys probes and steps, with `step`.
            step: RL step.
            micro_batch_scenes: Scenes of a micro-batch.
            wanted_steps: Decode steps to look at; 0 means all.
            sampler_logp: Whether the sampler's log-probabilities serve as old ones where they are this likelihood's.
            tell_behaviour: Whether the objective is told them beside the old ones.
        """
        trace, likelihood = rollout.trace, self.likelihood
        device, count = trace.state.device, len(trace.state)
        probes = None
        if shape := likelihood.probe_shape(rollout.tokens.shape[1]):
            names = [scene.token for scene in scenes]
            numbers = row_uniforms(seed, step, names, rollout.num_generations, shape, purpose="probes/")
            drawn = likelihood.draw(trace, torch.from_numpy(numbers).to(device))
            probes = replace(drawn, weight=drawn.weight.float())  # the numbers' float64 would carry on to the loss
        return UpdateBatch(
            step=step,
            scenes=scenes,
            rollout=rollout,
            scores=scores,
            mask=flatten_steps(trace.scored) if likelihood.visits_steps else trace.scored.any(dim=0),
            probes=probes,
            steps=drawn_steps(count, wanted_steps, seed=seed, step=step, device=device),
            old_logp=flatten_steps(trace.logp) if likelihood.behaviour and sampler_logp else None,
            behaviour_logp=flatten_steps(trace.logp) if likelihood.behaviour and tell_behaviour else None,
            kept=torch.arange(len(scenes)),
            size=micro_batch_scenes,
            advantages=torch.zeros(len(rollout), device=device),
            denominators=Denominators(0.0, 0.0, 1),
        )

    def logp(
        self,
        policy: Policy,
        batch: UpdateBatch,
        part: MicroBatch,
        *,
        record: RouterRecord | None = None,
        keep_experts: bool = False,
        entropy: bool = False,
    ) -> tuple[TokenLogp, SceneContext]:
        """Log-probabilities of a micro-batch's rollouts, and the context its scenes were encoded to."""
        with profile.part("likelihood"):
            context = policy.encode(self.features.batch(policy, part.scenes))
            found = self.likelihood(
                policy,
                context,
                part.trace,
                part.probes,
                max_tokens=self._tokens(batch, part),
                entropy=entropy,
                keep_experts=keep_experts,
                steps=batch.steps,
                record=record,
            )
        return found, context

    def _tokens(self, batch: UpdateBatch, part: MicroBatch) -> int:
        """Plan tokens per forward pass over a micro-batch."""
        if not (self.even and self.max_tokens):
            return self.max_tokens
        length = part.trace.state.shape[-1]
        rows_per_scene = max(1, self.max_tokens // length // batch.size)
        return rows_per_scene * len(part.scenes) * length
