"""Sampling groups of trajectories from a policy: carriers, seeding and the rollout service."""

from rollout.carriers import Rollout
from rollout.follower import Follower
from rollout.ray_service import RayRolloutService
from rollout.seeding import row_uniforms
from rollout.service import LocalRolloutService, RolloutService, RolloutStats

__all__ = [
    "Follower",
    "LocalRolloutService",
    "RayRolloutService",
    "Rollout",
    "RolloutService",
    "RolloutStats",
    "row_uniforms",
]
