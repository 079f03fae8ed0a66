"""Policies as planners: the plan of the frame before."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from rlhf_drive.compare.planners import PolicyPlanner
from rlhf_drive.config import Recipe
from rlhf_drive.policies import Decoding
from rlhf_drive.policies.feature_cache import FeatureCache
from rlhf_drive.scenes.previous import previous_scene
from rlhf_drive.scenes.store import SceneStore
from rlhf_drive.training.build import build_policy


@pytest.fixture
def planner(tiny_recipe: Callable[..., Recipe]) -> PolicyPlanner:
    policy = build_policy(tiny_recipe(), torch.device("cpu"))
    return PolicyPlanner("p", policy, Decoding(4, "causal", 1.0, 0), 2, 1, FeatureCache())


def test_plans_of_the_previous_frame_come_from_what_was_seen_then(
    planner: PolicyPlanner, tiny_store: SceneStore
) -> None:
    scenes = tiny_store.split("heldout")[:3]
    previous = planner.plan_previous(scenes)
    np.testing.assert_array_equal(previous.poses, planner.plan([previous_scene(s) for s in scenes]).poses)
    np.testing.assert_array_equal(previous.scene_index, [0, 0, 1, 1, 2, 2])
    assert not np.array_equal(previous.poses, planner.plan(scenes).poses)


def test_plans_of_the_previous_frame_do_not_depend_on_the_batch(planner: PolicyPlanner, tiny_store: SceneStore) -> None:
    scenes = tiny_store.split("heldout")[:3]
    whole = planner.plan_previous(scenes).poses
    np.testing.assert_array_equal(whole[4:], planner.plan_previous(scenes[2:]).poses)
