"""Experience of a step: chunks change nothing, scoring overlaps with sampling, the frame before is the group's."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import pytest
import torch

from rewards import LocalRewardService, RewardConfig, RewardSpec, Scores
from rlhf_drive.config import Recipe
from rlhf_drive.errors import DataError
from rlhf_drive.policies import Policy
from rlhf_drive.policies.feature_cache import FeatureCache
from rlhf_drive.scenes import Scene, Trajectories
from rlhf_drive.scenes.previous import human_previous, previous_scene
from rlhf_drive.scenes.store import SceneStore
from rlhf_drive.training.build import build_policy, sampling_of
from rlhf_drive.training.collect import Sampling, check_previous_frames, collect, previous_plans
from rollout import LocalRolloutService

EPDMS = RewardConfig((RewardSpec("epdms"),), scorer="epdms", scorer_options={"human_filter": "on"})


@pytest.fixture
def recipe(tiny_recipe: Callable[..., Recipe]) -> Recipe:
    return tiny_recipe("quickstart", "rollout.num_generations=3")


@pytest.fixture
def sampling(recipe: Recipe) -> Sampling:
    return replace(sampling_of(recipe.rollout), scenes_per_step=6, scenes_per_chunk=6, previous_plan="sampled")


@pytest.fixture
def rollouts(recipe: Recipe) -> LocalRolloutService:
    policy: Policy = build_policy(recipe, torch.device("cpu")).eval()
    return LocalRolloutService(policy, seed=0, features=FeatureCache())


@pytest.fixture
def scenes(tiny_store: SceneStore) -> list[Scene]:
    return tiny_store.split("train")[:6]


def test_chunks_give_the_rows_of_the_whole(
    rollouts: LocalRolloutService, scenes: list[Scene], sampling: Sampling
) -> None:
    with LocalRewardService(EPDMS.build(), workers=2) as rewards:
        whole = collect(rollouts, rewards, scenes, sampling, step=3)
        parts = collect(rollouts, rewards, scenes, replace(sampling, scenes_per_chunk=4), step=3)
    assert torch.equal(whole.rollout.tokens, parts.rollout.tokens)
    assert parts.rollout.scene_tokens == whole.rollout.scene_tokens == tuple(scene.token for scene in scenes)
    np.testing.assert_array_equal(parts.rollout.trajectories.scene_index, np.repeat(np.arange(6), 3))
    np.testing.assert_array_equal(whole.scores.total, parts.scores.total)
    torch.testing.assert_close(whole.rollout.trace.logp, parts.rollout.trace.logp, atol=1e-4, rtol=0)
    assert np.isfinite(whole.scores.component("ec")).all()


class Late:
    """A reward service that answers the first batch only after the second was handed in."""

    def __init__(self, inner: LocalRewardService) -> None:
        self.inner, self.second, self.calls = inner, threading.Event(), 0

    def submit(
        self, scenes: list[Scene], trajectories: Trajectories, previous: Trajectories | None = None
    ) -> Future[Scores]:
        """As the protocol says."""
        self.calls += 1
        first, future = self.calls == 1, Future[Scores]()

        def answer() -> None:
            if first:
                assert self.second.wait(60)
            future.set_result(self.inner.score(scenes, trajectories, previous))

        if not first:
            self.second.set()
        threading.Thread(target=answer).start()
        return future


def test_scoring_does_not_hold_up_sampling(
    rollouts: LocalRolloutService, scenes: list[Scene], sampling: Sampling
) -> None:
    with LocalRewardService(EPDMS.build(), workers=1) as rewards:
        late = Late(rewards)
        found = collect(rollouts, late, scenes, replace(sampling, scenes_per_chunk=3), step=0)  # type: ignore[arg-type]
        expected = collect(rollouts, rewards, scenes, sampling, step=0)
    assert late.calls == 2
    np.testing.assert_array_equal(found.scores.total, expected.scores.total)


def test_plan_of_the_frame_before_is_shared_by_the_group(
    rollouts: LocalRolloutService, scenes: list[Scene], sampling: Sampling
) -> None:
    assert previous_plans(rollouts, scenes, replace(sampling, previous_plan="none"), step=1) is None
    human = previous_plans(rollouts, scenes, replace(sampling, previous_plan="human"), step=1)
    assert human is not None
    for s, scene in enumerate(scenes):
        np.testing.assert_array_equal(human.poses[3 * s : 3 * s + 3], np.stack([human_previous(scene)] * 3))
    sampled = previous_plans(rollouts, scenes, sampling, step=1)
    assert sampled is not None
    groups = sampled.poses.reshape(6, 3, 8, 3)
    assert (groups == groups[:, :1]).all()
    alone = rollouts.sample([previous_scene(scenes[2])], 1, sampling.decoding, step=1).trajectories.poses
    np.testing.assert_array_equal(groups[2, 0], alone[0])
    later = previous_plans(rollouts, scenes, sampling, step=2)
    assert later is not None
    assert (later.poses != sampled.poses).any()


def test_a_reward_that_sees_two_frames_gets_them(
    rollouts: LocalRolloutService, scenes: list[Scene], sampling: Sampling
) -> None:
    """Only EC hears of the frame before: with another one it changes, everything else stays."""
    with LocalRewardService(EPDMS.build(), workers=1) as rewards:
        sampled = collect(rollouts, rewards, scenes, sampling, step=0).scores
        none = collect(rollouts, rewards, scenes, replace(sampling, previous_plan="none"), step=0).scores
    assert np.isnan(none.component("ec")).all()
    for name in ("nc", "dac", "ddc", "tlc", "ep", "ttc", "lk", "hc"):
        np.testing.assert_array_equal(sampled.component(name), none.component(name))
    gate = np.prod([none.component(name) for name in ("nc", "dac", "ddc", "tlc")], axis=0)
    np.testing.assert_allclose(16 * sampled.total - 14 * none.total, 2 * gate * sampled.component("ec"), atol=1e-9)


def test_scenes_that_do_not_know_the_frame_before_are_refused(scenes: list[Scene], sampling: Sampling) -> None:
    bare = scenes[1].with_reference(prev_ego_init=np.zeros(0))
    check_previous_frames(scenes, sampling)
    check_previous_frames([scenes[0], bare], replace(sampling, previous_plan="none"))
    with pytest.raises(DataError, match=rf"1 of 2 scenes .* the first is '{bare.token}'"):
        check_previous_frames([scenes[0], bare], sampling)
