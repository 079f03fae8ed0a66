"""Sampling groups: what a sample depends on, and what it must not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_drive.compare.planners import PolicyPlanner
from rlhf_drive.config import Recipe
from rlhf_drive.policies import Decoding, Policy
from rlhf_drive.policies.feature_cache import FeatureCache
from rlhf_drive.scenes import Scene
from rlhf_drive.scenes.store import SceneStore
from rlhf_drive.training.build import build_policy
from rollout import LocalRolloutService

DECODING = Decoding(4, "causal", 1.0, 0)


@pytest.fixture
def policy(tiny_recipe: Callable[..., Recipe]) -> Policy:
    return build_policy(tiny_recipe(), torch.device("cpu"))


def test_the_policy_sees_nothing_of_the_reference(policy: Policy, tiny_store: SceneStore) -> None:
    scenes = tiny_store.split("heldout")[:4]

    def blinded(scene: Scene) -> Scene:
        r = scene.reference
        return scene.with_reference(
            agent_pose=r.agent_pose[:, ::-1] + 5.0,
            agent_velocity=-r.agent_velocity,
            human_poses=-r.human_poses,
            centerline=r.centerline + 3.0,
            map_xy=r.map_xy * 1.5,
            ego_init=r.ego_init + 1.0,
            past_states=r.past_states + 1.0,
            speed_limit=1.0,
            pdm_reference_v1=r.pdm_reference_v1 - 9.0,
        )

    samples = [
        LocalRolloutService(policy, seed=1, features=FeatureCache()).sample(some, 3, DECODING, step=0).tokens
        for some in (scenes, [blinded(scene) for scene in scenes])
    ]
    assert torch.equal(samples[0], samples[1])


def test_a_scene_without_any_reference_can_be_sampled(policy: Policy, tiny_store: SceneStore) -> None:
    scenes = tiny_store.split("heldout")[:4]
    bare: list[Any] = [replace(scene, reference=None) for scene in scenes]  # reading anything of it would raise
    samples = [PolicyPlanner("p", policy, DECODING, 2, 1, FeatureCache()).plan(some).poses for some in (scenes, bare)]
    assert np.array_equal(samples[0], samples[1])


@pytest.mark.parametrize("order", ["causal", "random", "confidence"])
def test_samples_do_not_depend_on_batch_or_chunk(policy: Policy, tiny_store: SceneStore, order: str) -> None:
    scenes = tiny_store.split("train")[:6]
    decoding = Decoding(4, order, 1.0, 0)
    whole = LocalRolloutService(policy, seed=1).sample(scenes, 4, decoding, step=7)
    chunked = LocalRolloutService(policy, seed=1, max_rows=8).sample(scenes, 4, decoding, step=7)
    alone = LocalRolloutService(policy, seed=1).sample(scenes[2:3], 2, decoding, step=7)
    assert torch.equal(whole.tokens, chunked.tokens)
    assert torch.equal(whole.tokens[8:10], alone.tokens)


def test_step_and_seed_change_samples_and_poses_are_decoded_tokens(policy: Policy, tiny_store: SceneStore) -> None:
    scenes = tiny_store.split("train")[:2]
    service = LocalRolloutService(policy, seed=1)
    first = service.sample(scenes, 4, DECODING, step=0)
    assert not torch.equal(first.tokens, service.sample(scenes, 4, DECODING, step=1).tokens)
    assert not torch.equal(first.tokens, LocalRolloutService(policy, seed=2).sample(scenes, 4, DECODING, step=0).tokens)
    assert np.array_equal(first.trajectories.poses, policy.tokenizer.decode(first.tokens.numpy()))
    assert first.trajectories.scene_index.tolist() == [0] * 4 + [1] * 4


def test_greedy_groups_have_no_spread(policy: Policy, tiny_store: SceneStore) -> None:
    rollout = LocalRolloutService(policy, seed=1).sample(
        tiny_store.split("train")[:2], 3, Decoding(4, "causal", 0.0, 0), step=0
    )
    assert (rollout.tokens.view(2, 3, -1).diff(dim=1) == 0).all()
