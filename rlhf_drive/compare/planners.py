"""A policy with its decoding settings as a planner that can be compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_drive.policies import Decoding, Policy
from rlhf_drive.policies.feature_cache import FeatureCache
from rlhf_drive.scenes import Scene, Trajectories
from rlhf_drive.scenes.previous import previous_scene
from rollout import LocalRolloutService

__all__ = ["PolicyPlanner"]


@dataclass(frozen=True)
class PolicyPlanner:
    """Plans by sampling; the random numbers of a plan depend on (seed, scene, sample) alone."""

    name: str
    """Name in the report."""
    policy: Policy
    """The policy."""
    decoding: Decoding
    """How to sample; temperature 0 is greedy."""
    samples: int
    """Plans per scene."""
    seed: int
    """Keys the random numbers."""
    features: FeatureCache
    """Cache of network inputs, shared between planners of one architecture."""

    def plan(self, scenes: Sequence[Scene]) -> Trajectories:
        """``S * samples`` plans, scene-major."""
        service = LocalRolloutService(self.policy, seed=self.seed, features=self.features)
        return service.sample(scenes, self.samples, self.decoding, step=0).trajectories

    def plan_previous(self, scenes: Sequence[Scene]) -> Trajectories:
        """The same for the frame 0.5 s earlier, in the ego frame of that time, with random numbers of its own."""
        return self.plan([previous_scene(scene) for scene in scenes])
