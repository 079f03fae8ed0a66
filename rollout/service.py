"""The rollout service: groups of plans for scenes. This engine samples in the trainer's own process."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from rlhf_drive.errors import ConfigError
from rlhf_drive.policies import DecodeTrace, Decoding, Policy
from rlhf_drive.policies.feature_cache import FeatureCache
from rlhf_drive.policies.inputs import ObservationBatch
from rlhf_drive.scenes import Scene, Trajectories
from rollout.carriers import Rollout
from rollout.seeding import row_uniforms

__all__ = ["LocalRolloutService", "RolloutService", "RolloutStats", "SceneInputs"]


@dataclass(frozen=True)
class RolloutStats:
    """What a service has done so far."""

    rollouts: int = 0
    """Plans sampled."""
    busy_s: float = 0.0
    """Seconds that workers spent sampling, added up over workers."""
    workers: int = 1
    """Workers there are."""
    queued: int = 0
    """Calls that wait for a worker just now."""
    restarts: int = 0
    """Workers replaced because they died or took too long."""
    retries: int = 0
    """Calls that another worker had to do again."""
    push_s: float = 0.0
    """Seconds that :meth:`RolloutService.push_weights` kept its caller."""


class SceneInputs(Protocol):
    """Where the in-process engine has network inputs from, such as a :class:`FeatureCache`."""

    def batch(self, policy: Policy, scenes: Sequence[Any]) -> ObservationBatch:
        """S scenes as tensors on the policy's device."""
        ...


class RolloutService(Protocol):
    """Samples groups of plans with the weights last pushed."""

    @property
    def stats(self) -> RolloutStats:
        """What has been done so far."""
        ...

    def push_weights(self, policy: Policy, version: int) -> None:
        """Use these weights for all that is begun from now on."""

    def submit(
        self,
        scenes: Sequence[Scene],
        num_generations: int,
        decoding: Decoding,
        *,
        step: int,
        keep_experts: bool = False,
    ) -> Future[Rollout]:
        """:meth:`sample` of one chunk, while the caller goes on where the engine can. The chunk is decoded as one
        batch, so that its samples are the same to the bit on any engine and any number of workers."""
        ...

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
        ...

    def close(self) -> None:
        """End what the service has started; calls that are under way are given up."""


class LocalRolloutService:
    """Samples in this process with the caller's own policy object, so pushing weights copies nothing.

    Args:
        policy: The policy to sample from.
        seed: Keys all random numbers together with step, scene token and sample.
        features: Cache of network inputs, shared with the trainer.
        max_rows: Rows decoded at once; bounds memory, does not change a sample's random numbers.
    """

    def __init__(self, policy: Policy, *, seed: int, features: SceneInputs | None = None, max_rows: int = 2048) -> None:
        if max_rows < 1:
            raise ConfigError(f"max_rows must be at least 1; got {max_rows}.")
        self.policy, self.seed, self.max_rows = policy, seed, max_rows
        self.features: SceneInputs = features or FeatureCache()
        self.version = 0
        self._stats = RolloutStats()

    @property
    def stats(self) -> RolloutStats:
        """What has been done so far."""
        return self._stats

    def close(self) -> None:
        """Nothing was started."""

    def submit(
        self,
        scenes: Sequence[Scene],
        num_generations: int,
        decoding: Decoding,
        *,
        step: int,
        keep_experts: bool = False,
    ) -> Future[Rollout]:
        """:meth:`sample`, done when this returns: the policy samples in this process."""
        future: Future[Rollout] = Future()
        future.set_result(self.sample(scenes, num_generations, decoding, step=step, keep_experts=keep_experts))
        return future

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
        policy, started = self.policy, time.perf_counter()
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
        busy = self._stats.busy_s + time.perf_counter() - started
        self._stats = replace(self._stats, rollouts=self._stats.rollouts + len(tokens), busy_s=busy)
        return Rollout(tuple(names), num_generations, tokens, trace, Trajectories(poses, index))
