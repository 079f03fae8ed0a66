"""The rollout service: groups of plans for scenes. This engine samples in the trainer's own process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from rlhf_drive.errors import ConfigError
from rlhf_drive.policies import DecodeTrace, Decoding, Policy
from rlhf_drive.policies.feature_cache import FeatureCache
from rlhf_drive.scenes import Scene, Trajectories
from rollout.carriers import Rollout
from rollout.seeding import row_uniforms

__all__ = ["LocalRolloutService", "RolloutService"]


class RolloutService(Protocol):
    """Samples groups of plans with the weights last pushed."""

    def push_weights(self, policy: Policy, version: int) -> None:
        """Use these weights from now on."""

    def sample(
        self,
        scenes: Sequence[Scene],
        num_generations: int,
        decoding: Decoding,
        *,
        step: int,
        keep_experts: bool = False,
    ) -> Rollout:
        """G plans for each scene. The same (seed, step, scene, sample) gives the same plan on any engine."""


class LocalRolloutService:
    """Samples in this process with the caller's own policy object, so pushing weights copies nothing.

    Args:
        policy: The policy to sample from.
        seed: Keys all random numbers together with step, scene token and sample.
        features: Cache of network inputs, shared with the trainer.
        max_rows: Rows decoded at once; bounds memory, does not change a sample's random numbers.
    """

    def __init__(
        self, policy: Policy, *, seed: int, features: FeatureCache | None = None, max_rows: int = 2048
    ) -> None:
        if max_rows < 1:
            raise ConfigError(f"max_rows must be at least 1; got {max_rows}.")
        self.policy, self.seed, self.max_rows = policy, seed, max_rows
        self.features = features or FeatureCache()
        self.version = 0

    def push_weights(self, policy: Policy, version: int) -> None:
        """Use these weights from now on."""
        self.policy, self.version = policy, version

    @torch.no_grad()
    def sample(
        self,
        scenes: Sequence[Scene],
        num_generations: int,
        decoding: Decoding,
        *,
        step: int,
        keep_experts: bool = False,
    ) -> Rollout:
        """G plans for each scene, decoded with one encoded context per scene.

        Args:
            scenes: S scenes; only their observations are read.
            num_generations: G.
            decoding: Steps, order, temperature, top-k.
            step: Keys the random numbers.
            keep_experts: Whether the trace takes the routing of each forward pass.

        Raises:
            ConfigError: The policy's process cannot decode so.
        """
        policy = self.policy
        policy.process.check(policy.tokenizer.length, decoding)
        training = policy.training
        policy.eval()
        per_chunk = max(1, self.max_rows // num_generations)
        traces = []
        for start in range(0, len(scenes), per_chunk):
            chunk = scenes[start : start + per_chunk]
            context = policy.encode(self.features.batch(policy, chunk))
            names = [scene.token for scene in chunk]
            shape = policy.process.uniforms_shape(policy.tokenizer.length, decoding)
            uniforms = torch.from_numpy(row_uniforms(self.seed, step, names, num_generations, shape)).to(policy.device)
            traces.append(
                policy.process.sample(
                    policy,
                    context,
                    uniforms,
                    decoding,
                    seed=self.seed,
                    weight_version=self.version,
                    keep_experts=keep_experts,
                )
            )
        policy.train(training)
        trace = DecodeTrace.concatenate(traces)
        tokens = trace.tokens
        poses = policy.tokenizer.decode(tokens.cpu().numpy())
        index = torch.arange(len(scenes)).repeat_interleave(num_generations).numpy()
        names = [scene.token for scene in scenes]
        return Rollout(tuple(names), num_generations, tokens, trace, Trajectories(poses, index))
