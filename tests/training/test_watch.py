"""Watching RL: held-out scenes are driven in time, what is seen reaches metrics and warnings."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from rewards import LocalRewardService, RewardSpec, build_reward
from rewards.from_recipe import metric_config
from rlhf_drive.config import Recipe
from rlhf_drive.policies.feature_cache import FeatureCache
from rlhf_drive.scenes import Scene, Trajectories
from rlhf_drive.scenes.store import SceneStore
from rlhf_drive.training.build import build_policy, sampling_of
from rlhf_drive.training.collect import Experience, Sampling, collect
from rlhf_drive.training.watch import Watch, spread_out
from rollout import LocalRolloutService


@pytest.fixture
def recipe(tiny_recipe: Callable[..., Recipe]) -> Recipe:
    return tiny_recipe("quickstart", "rollout.num_generations=2")


@pytest.fixture
def sampling(recipe: Recipe) -> Sampling:
    return sampling_of(recipe.rollout)


@pytest.fixture
def rollouts(recipe: Recipe) -> LocalRolloutService:
    return LocalRolloutService(build_policy(recipe, torch.device("cpu")).eval(), seed=0, features=FeatureCache())


@pytest.fixture
def scenes(tiny_store: SceneStore) -> list[Scene]:
    return tiny_store.split("train")[:6]


@pytest.fixture
def experience(rollouts: LocalRolloutService, scenes: list[Scene], sampling: Sampling) -> Experience:
    with LocalRewardService(build_reward([RewardSpec("pdms")]), workers=1) as rewards:
        return collect(rollouts, rewards, scenes, sampling, step=0)


def test_heldout_scenes_are_driven_every_so_often(
    rollouts: LocalRolloutService, scenes: list[Scene], sampling: Sampling, experience: Experience
) -> None:
    with LocalRewardService(metric_config("epdms").build(), workers=1) as service:
        watch = Watch(scenes[:4], service, sampling, every=3)
        looks = [watch.look(step, scenes, experience, rollouts)[0] for step in range(1, 7)]
    assert ["heldout/epdms" in look for look in looks] == [False, False, True, False, False, True]
    assert all(0.0 <= looks[2][name] <= 1.0 for name in ("heldout/epdms", "heldout/ec"))
    assert looks[2]["heldout/epdms"] != looks[5]["heldout/epdms"]  # sampled afresh
    assert not any(name.startswith("heldout/") for name in Watch().look(3, scenes, experience, rollouts)[0])


def test_heldout_scenes_that_cannot_be_scored_show(
    rollouts: LocalRolloutService, scenes: list[Scene], sampling: Sampling, experience: Experience
) -> None:
    without = [scene.with_reference(pdm_reference_v2=np.zeros((0, 3))) for scene in scenes[:2]]
    with LocalRewardService(metric_config("epdms").build(), workers=1) as service:
        for heldout, share in ((scenes[:2], 0.0), ([scenes[0], without[1]], 0.5), (without, 1.0)):
            seen = Watch(heldout, service, sampling, every=1).look(1, scenes, experience, rollouts)[0]
            assert seen["heldout/invalid_frac"] == share
            assert ("heldout/epdms" in seen) == (share < 1.0)


def test_reversing_plans_raise_a_warning_once_the_start_is_known(
    rollouts: LocalRolloutService, scenes: list[Scene], experience: Experience
) -> None:
    def ends(backwards: float) -> Experience:
        """All plans drive 5 m/s straight on; the last step goes back by so many metres."""
        poses = np.zeros_like(experience.rollout.trajectories.poses)
        poses[:, :, 0] = 2.5 * np.arange(1, 9)
        poses[:, -1, 0] = poses[:, -2, 0] - backwards
        plans = Trajectories(poses, experience.rollout.trajectories.scene_index)
        return replace(experience, rollout=replace(experience.rollout, trajectories=plans))

    watch, calm = Watch(), []
    for step in range(1, 11):
        calm += watch.look(step, scenes, ends(-2.5), rollouts)[1]
    assert [alert.name for alert in calm if alert.name == "reversal"] == []
    before = json.loads(json.dumps(watch.state()))
    found = [alert for step in range(11, 21) for alert in watch.look(step, scenes, ends(0.5), rollouts)[1]]
    assert [alert.name for alert in found].count("reversal") == 1
    # A run that was killed at step 10 warns at the same step.
    again = Watch()
    again.restore(before)
    repeated = [alert for step in range(11, 21) for alert in again.look(step, scenes, ends(0.5), rollouts)[1]]
    assert repeated == found


def test_scenes_are_spread_over_the_list(scenes: list[Scene]) -> None:
    assert [scene.token for scene in spread_out(scenes, 3)] == [scenes[i].token for i in (0, 2, 5)]
    assert len(spread_out(scenes, 100)) == 6
