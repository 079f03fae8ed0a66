"""The policy update: ratios, filtering, denominators, and what must not move."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rewards.carriers import Failure, ScorerInfo, Scores
from rlhf_drive.config import Recipe
from rlhf_drive.errors import ConfigError, TrainingError
from rlhf_drive.policies import Policy
from rlhf_drive.policies.feature_cache import FeatureCache
from rlhf_drive.scenes import Scene
from rlhf_drive.scenes.store import SceneStore
from rlhf_drive.training.build import build_accelerator, build_policy, build_trainer, decoding_of
from rlhf_drive.training.trainer import RlTrainer
from rollout import LocalRolloutService, Rollout

FEATURES = FeatureCache()


@pytest.fixture
def recipe(tiny_recipe: Callable[..., Recipe]) -> Recipe:
    return tiny_recipe("quickstart", "rl.beta=0.02", "rl.learning_rate=1e-3")


@pytest.fixture
def scenes(tiny_store: SceneStore) -> list[Scene]:
    return tiny_store.split("train")[:6]


def make_trainer(recipe: Recipe, **changes: object) -> RlTrainer:
    section = replace(recipe.rl, **{"epsilon": 0.02, "epsilon_high": 0.03, **changes})
    policy = build_policy(recipe, torch.device("cpu"))
    return build_trainer(
        section, policy, seed=0, accelerator=build_accelerator("cpu"), features=FEATURES, folder=Path(recipe.output_dir)
    )


def sample(recipe: Recipe, policy: Policy, scenes: list[Scene]) -> Rollout:
    service = LocalRolloutService(policy, seed=0, features=FEATURES)
    return service.sample(scenes, 4, decoding_of(recipe.rollout), step=0)


def scores_of(total: np.ndarray, valid: np.ndarray | None = None) -> Scores:
    valid = np.ones(len(total), dtype=bool) if valid is None else valid
    total = np.where(valid, total, np.nan)
    failures = {int(i): Failure("r", "raised", "test") for i in np.flatnonzero(~valid)}
    return Scores(("r",), total[:, None], total, valid, ScorerInfo("r", "test"), failures)


def leftness(rollout: Rollout) -> np.ndarray:
    """A reward with spread: how far left the plan ends."""
    return np.tanh(rollout.trajectories.poses[:, -1, 1])


def test_ratio_is_one_and_kl_zero_before_the_first_update(recipe: Recipe, scenes: list[Scene]) -> None:
    trainer = make_trainer(recipe, num_iterations=1)
    rollout = sample(recipe, trainer.policy, scenes)
    metrics = trainer.step(1, scenes, rollout, scores_of(leftness(rollout)))
    for name in ("mean", "min", "max"):
        assert metrics[f"ratio/first_{name}"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["logprob_mismatch/max"] < 1e-4
    assert metrics["kl/ref_k3"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["moe/routing_flip_frac"] == 0.0


def test_second_iteration_sees_a_moved_ratio(recipe: Recipe, scenes: list[Scene]) -> None:
    trainer = make_trainer(recipe, num_iterations=2)
    rollout = sample(recipe, trainer.policy, scenes)
    metrics = trainer.step(2, scenes, rollout, scores_of(leftness(rollout)))
    assert metrics["ratio/first_max"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["ratio/max"] > 1.0005
    assert 0.0 <= metrics["moe/routing_flip_frac"] < 0.5


def test_limits_are_measured_after_the_last_update_with_an_entropy_bonus_too(
    recipe: Recipe, scenes: list[Scene]
) -> None:
    changes = {"kl_limit": 1e9, "on_limit": "rollback"}
    with_bonus = make_trainer(recipe, num_iterations=1, entropy_coef=1e-9, **changes)
    without = make_trainer(recipe, num_iterations=1, **changes)
    rollout = sample(recipe, without.policy, scenes)
    scores = scores_of(leftness(rollout))
    a, b = (trainer.step(2, scenes, rollout, scores) for trainer in (with_bonus, without))
    assert a["guard/rollbacks"] == b["guard/rollbacks"] == 0.0
    assert a["entropy/mean"] == pytest.approx(b["entropy/mean"], abs=1e-6)


@pytest.mark.parametrize("micro", [1, 2, 6])
def test_update_does_not_depend_on_the_micro_batch_split(recipe: Recipe, scenes: list[Scene], micro: int) -> None:
    reference, other = make_trainer(recipe, micro_batch_scenes=4), make_trainer(recipe, micro_batch_scenes=micro)
    rollout = sample(recipe, reference.policy, scenes)
    scores = scores_of(leftness(rollout), np.arange(24) % 7 != 3)
    a, b = reference.step(2, scenes, rollout, scores), other.step(2, scenes, rollout, scores)
    assert a["loss/total"] == pytest.approx(b["loss/total"], abs=1e-6)
    assert a["optim/grad_norm"] == pytest.approx(b["optim/grad_norm"], rel=1e-4)


def test_groups_without_spread_are_counted_and_teach_nothing(recipe: Recipe, scenes: list[Scene]) -> None:
    trainer = make_trainer(recipe)
    before = copy.deepcopy(trainer.policy.state_dict())
    rollout = sample(recipe, trainer.policy, scenes)
    metrics = trainer.step(2, scenes, rollout, scores_of(np.full(24, 0.7)))
    assert metrics["groups/degenerate_frac"] == 1.0
    assert all(torch.equal(before[k], v) for k, v in trainer.policy.state_dict().items())


def test_a_flat_group_leaves_the_update_as_if_it_had_not_been_sampled(recipe: Recipe, scenes: list[Scene]) -> None:
    with_flat, without = make_trainer(recipe), make_trainer(recipe)
    rollout = sample(recipe, with_flat.policy, scenes)
    total = leftness(rollout)
    total[:4] = 0.5
    a = with_flat.step(2, scenes, rollout, scores_of(total))
    rest = sample(recipe, without.policy, scenes[1:])
    b = without.step(2, scenes[1:], rest, scores_of(total[4:]))
    assert a["groups/degenerate_frac"] == pytest.approx(1 / 6)
    assert a["optim/grad_norm"] == pytest.approx(b["optim/grad_norm"], rel=1e-4)


def test_invalid_rows_do_not_matter_whatever_their_reward(recipe: Recipe, scenes: list[Scene]) -> None:
    trainers = [make_trainer(recipe) for _ in range(2)]
    rollout = sample(recipe, trainers[0].policy, scenes)
    valid = np.arange(24) % 5 != 2
    norms = []
    for trainer, filler in zip(trainers, (0.0, 1e6), strict=True):
        scores = scores_of(leftness(rollout), valid)
        object.__setattr__(scores, "total", np.where(valid, scores.total, filler))
        norms.append(trainer.step(2, scenes, rollout, scores)["optim/grad_norm"])
    assert norms[0] == norms[1]


def test_frozen_router_does_not_move_and_the_reference_stays(recipe: Recipe, scenes: list[Scene]) -> None:
    trainer = make_trainer(recipe, router="frozen")
    assert trainer.reference is not None
    before = copy.deepcopy(trainer.policy.state_dict())
    rollout = sample(recipe, trainer.policy, scenes)
    trainer.step(2, scenes, rollout, scores_of(leftness(rollout)))
    after = trainer.policy.state_dict()
    routers = [name for name in after if "router" in name]
    assert routers
    assert all(torch.equal(before[name], after[name]) for name in routers)
    assert any(not torch.equal(before[name], after[name]) for name in after)
    with trainer.reference.using() as reference:
        assert all(torch.equal(before[name], value) for name, value in reference.state_dict().items())


def test_updates_raise_the_reward_they_are_given(recipe: Recipe, scenes: list[Scene]) -> None:
    trainer = make_trainer(recipe, beta=0.0, warmup_ratio=0.0, max_steps=100, learning_rate=3e-3)
    service = LocalRolloutService(trainer.policy, seed=0, features=FEATURES)
    means = []
    for step in range(12):
        rollout = service.sample(scenes, 8, decoding_of(recipe.rollout), step=step)
        total = leftness(rollout)
        means.append(float(total.mean()))
        trainer.step(step, scenes, rollout, scores_of(total))
    assert np.mean(means[-3:]) > np.mean(means[:3]) + 0.3


def test_weights_that_broke_stop_the_run_and_name_scenes(recipe: Recipe, scenes: list[Scene]) -> None:
    trainer = make_trainer(recipe)
    rollout = sample(recipe, trainer.policy, scenes)
    with torch.no_grad():
        trainer.policy.head.mixture.bias.fill_(torch.nan)
    with pytest.raises(TrainingError, match=scenes[0].token):
        trainer.step(2, scenes, rollout, scores_of(leftness(rollout)))


def test_seconds_by_part_add_up_to_the_step(recipe: Recipe, scenes: list[Scene]) -> None:
    trainer = make_trainer(recipe, num_iterations=2)
    rollout = sample(recipe, trainer.policy, scenes)
    started = time.perf_counter()
    metrics = trainer.step(2, scenes, rollout, scores_of(leftness(rollout)))
    whole = time.perf_counter() - started
    parts = [metrics[f"time/{name}_s"] for name in ("reference", "likelihood", "update")]
    assert min(parts) > 0
    assert 0.5 * whole < sum(parts) <= whole


def test_a_replayed_run_measures_to_the_reference_with_its_own_routing(recipe: Recipe, scenes: list[Scene]) -> None:
    """The reference is one fixed policy: whichever experts the policy's samples went through, its own routers count."""
    trainer = make_trainer(recipe, router="replay", num_iterations=1, importance_sampling_level="token")
    reference, seen = trainer.reference._policy, []  # type: ignore[union-attr]
    objective = trainer.objective
    trainer.objective = lambda inputs, counts: seen.append(inputs) or objective(inputs, counts)  # type: ignore[func-returns-value]
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if name.endswith("router.weight"):
                parameter.neg_()  # other experts than the policy's at nearly every token
        for parameter in (*trainer.policy.head.parameters(),):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
        reference.head.load_state_dict(trainer.policy.head.state_dict())
    service = LocalRolloutService(trainer.policy, seed=0, features=FEATURES)
    rollout = service.sample(scenes, 4, decoding_of(recipe.rollout), step=0, keep_experts=True)
    trainer.step(1, scenes, rollout, scores_of(leftness(rollout)))
    found = torch.cat([inputs.ref_logp for inputs in seen])
    with torch.no_grad():
        context = reference.encode(FEATURES.batch(reference, scenes))
        own = trainer.likelihood(reference, context, replace(rollout.trace, experts=None)).logp
        led = trainer.likelihood(reference, context, rollout.trace).logp
    torch.testing.assert_close(found, own, atol=1e-5, rtol=1e-5)
    assert (own - led).abs().max() > 1e-3


def test_the_reference_moves_on_time_after_a_step_that_taught_nothing(recipe: Recipe, scenes: list[Scene]) -> None:
    trainer = make_trainer(recipe, sync_ref_model=True, ref_model_sync_steps=2, ref_model_mixup_alpha=1.0)
    name, weight = next(iter(trainer.policy.named_parameters()))
    reference = dict(trainer.reference._policy.named_parameters())[name]  # type: ignore[union-attr]
    with torch.no_grad():
        weight.add_(1.0)
    rollout = sample(recipe, trainer.policy, scenes)
    trainer.step(0, scenes, rollout, scores_of(np.ones(len(rollout))))
    assert not torch.equal(reference, weight)
    trainer.step(1, scenes, rollout, scores_of(np.ones(len(rollout))))
    assert torch.equal(reference, weight)


def test_a_likelihood_without_a_ratio_makes_one_update_a_batch(recipe: Recipe) -> None:
    with pytest.raises(ConfigError, match="'sandwich' has no ratio"):
        make_trainer(recipe, likelihood="sandwich", num_iterations=2)
