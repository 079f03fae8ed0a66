"""The pair of services that an RL run samples and scores with, opened by what its recipe says."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from rewards.compose import RewardConfig
from rewards.from_recipe import build_service
from rewards.service import RewardService
from rlhf_drive.config import Recipe
from rlhf_drive.errors import ConfigError
from rlhf_drive.policies import Policy
from rlhf_drive.policies.feature_cache import FeatureCache
from rlhf_drive.training.ranks import Ranks
from rlhf_drive.training.step_collector import Services
from rollout import LocalRolloutService, RolloutService
from rollout.follower import Follower

if TYPE_CHECKING:
    from rollout.ray_service import RayRolloutService

__all__ = ["check_engines", "open_services"]


def check_engines(recipe: Recipe, ranks: Ranks) -> None:
    """Refuse engines that several training processes cannot use together.

    Raises:
        ConfigError: Every process samples for itself, but each would start a Ray of its own to score with.
    """
    ray = sys.modules.get("ray")
    named = recipe.ray.address or os.environ.get("RAY_ADDRESS") or (ray is not None and ray.is_initialized())
    if ranks.count > 1 and recipe.reward.engine == "ray" and recipe.rollout.engine == "local" and not named:
        raise ConfigError(
            f"reward.engine is ray, rollout.engine local, and {ranks.count} processes train: each samples for itself "
            "and would start a Ray of its own. Set rollout.engine to ray too, then the main process asks one Ray for "
            "both; or give ray.address; or set reward.engine to local."
        )


@contextmanager
def open_services(
    recipe: Recipe, reward: RewardConfig, policy: Policy, *, seed: int, features: FeatureCache, ranks: Ranks
) -> Iterator[Services]:
    """Services for one RL run, closed at the end of the block.

    With rollouts on Ray the main process alone has services, and the others hear from it; else each process has its
    own pair.

    Args:
        recipe: Sections `rollout`, `reward` and `ray`.
        reward: What is scored.
        policy: The policy whose weights will be pushed.
        seed: Keys the samples.
        features: Cache of network inputs.
        ranks: The processes that train.

    Raises:
        ConfigError: An engine cannot be had.
    """
    check_engines(recipe, ranks)
    central = recipe.rollout.engine == "ray"
    with ExitStack() as stack:
        rollouts: RolloutService
        if not central:
            rollouts = LocalRolloutService(policy, seed=seed, features=features)
        elif ranks.main:
            rollouts = stack.enter_context(_ray_rollouts(recipe, policy, seed, features))
        else:
            rollouts = Follower()
        scores: RewardService | None = None
        if ranks.main or not central:
            scores = service = build_service(reward, recipe.reward, address=recipe.ray.address)
            stack.push(service)
        # Before the scores end: what is sampled after that would be submitted to them, and start them anew.
        stack.callback(rollouts.close)
        yield Services(rollouts, scores, ranks, central)


def _ray_rollouts(recipe: Recipe, policy: Policy, seed: int, features: FeatureCache) -> RayRolloutService:
    from rollout.ray_service import RayRolloutService

    section = recipe.rollout
    return RayRolloutService(
        policy, seed=seed, workers=section.workers, cpus_per_worker=section.cpus_per_worker,
        gpus_per_worker=section.gpus_per_worker, timeout_s=section.timeout_s, address=recipe.ray.address,
        placement=recipe.ray.placement, features=features,
    )  # fmt: skip
