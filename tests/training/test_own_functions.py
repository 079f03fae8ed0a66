"""Objectives and advantages that come from a file of one's own, and advantages by reward term."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles.tiny_trainer import (
    GROUP,
    PLAIN,
    PROCESS_OVERRIDES,
    leftness,
    make_trainer,
    same,
    sample,
    scores_of,
    start_policy,
    watch_advantages,
    watch_gradients,
    weights_of,
)

from rlhf_drive.config import Recipe
from rlhf_drive.errors import ConfigError, PluginError, TrainingError
from rlhf_drive.scenes import Scene
from rlhf_drive.scenes.store import SceneStore

MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def scenes(tiny_store: SceneStore) -> list[Scene]:
    return tiny_store.split("train")[:4]


@pytest.fixture
def recipe(tiny_recipe: MakeRecipe) -> Recipe:
    return tiny_recipe("quickstart", *PROCESS_OVERRIDES["masked"])


def test_decoupled_advantages_get_the_rewards_terms_and_weights(recipe: Recipe, scenes: list[Scene]) -> None:
    weights = {"progress": 2.0, "left": 0.5}
    trainer = make_trainer(recipe, weights=weights, **(PLAIN | {"advantages": "gdpo"}))
    rollout = sample(recipe, trainer.policy, scenes)
    terms = {
        "left": leftness(rollout),
        "unused": np.arange(16.0),
        "progress": np.tanh(rollout.trajectories.poses[:, -1, 0] / 90.0),
    }
    terms["progress"][4:8] = 0.25  # flat in one group, so that only the other term counts there
    scores = scores_of(np.full(16, 0.5), **terms)
    seen = watch_advantages(trainer)
    metrics = trainer.step(1, scenes, rollout, scores)
    ((inputs, found),) = seen
    assert inputs.terms is not None
    np.testing.assert_allclose(inputs.terms.numpy(), np.stack([terms["progress"], terms["left"]], axis=1), atol=1e-6)
    total = np.zeros((4, GROUP))
    for name, weight in weights.items():
        values = terms[name].reshape(4, GROUP)
        total += weight * (values - values.mean(1, keepdims=True)) / (values.std(1, ddof=1, keepdims=True) + 1e-4)
    expected = (total - total.mean()) / (total.std(ddof=1) + 1e-4)
    np.testing.assert_allclose(found.values.numpy(), expected.ravel(), atol=1e-4)
    assert metrics["groups/degenerate_frac"] == 0.0  # the totals are all alike, the terms are not
    assert trainer.informative(scores, GROUP).tolist() == [True] * 4
    with pytest.raises(ConfigError, match="no terms were given"):
        make_trainer(recipe, **(PLAIN | {"advantages": "gdpo"})).step(1, scenes, rollout, scores)


OWN = """
import torch
from rlhf_drive.objectives import LossOutputs

def reinforce(inputs, denominators):
    rows = inputs.learned_rows()
    terms = torch.where(inputs.mask & rows[:, None], inputs.logp * inputs.advantages[:, None], 0.0)
    loss = -(terms.sum(-1) / inputs.mask.sum(-1)).sum() / denominators.sequences
    return LossOutputs(loss, {"own/rows": rows.sum() / denominators.sequences})

def twice(inputs):
    grouped = torch.where(inputs.valid, inputs.rewards, 0.0).view(-1, inputs.num_generations)
    return 2.0 * (grouped - grouped.mean(1, keepdim=True)).flatten()

def one_parameter(inputs):
    return reinforce(inputs, None)

def two_parameters(inputs, weights):
    return inputs.rewards

def raising(inputs, denominators=None):
    raise KeyError("speed")

def a_number(inputs, denominators=None):
    return 1.0

def per_row(inputs, denominators):
    return LossOutputs(inputs.logp.sum(-1), {})

def without_gradient(inputs, denominators):
    return LossOutputs(inputs.logp.detach().sum(), {})

def plain_metric(inputs, denominators):
    return LossOutputs(inputs.logp.sum(), {"own/number": 3.0})

def nan_loss(inputs, denominators):
    return LossOutputs(inputs.logp.sum() * float("nan"), {})

def nan_values(inputs):
    return inputs.rewards * float("nan")

def one_group(inputs):
    return inputs.rewards[: inputs.num_generations]

def nan_gradient(inputs, denominators):
    return LossOutputs((inputs.logp * 0.0).sqrt().sum(), {})
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(OWN)
    return path


def test_functions_of_ones_own_train_like_ours_that_say_the_same(
    recipe: Recipe, scenes: list[Scene], own: Path
) -> None:
    """On policy the gradient of GRPO per token is that of REINFORCE with the same aggregation."""
    start = start_policy(recipe)
    rollout = sample(recipe, start, scenes)
    found = []
    for names in ({"loss_type": f"{own}:reinforce", "advantages": f"{own}:twice"}, {"reward_scale": 2.0}):
        trainer = make_trainer(recipe, start, **(PLAIN | {"micro_batch_scenes": 3, "beta": 0.1} | names))
        gradients = watch_gradients(trainer)
        metrics = trainer.step(1, scenes, rollout, scores_of(leftness(rollout)))
        found.append((gradients[0], metrics))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-6, rtol=1e-3)
    assert found[0][1]["own/rows"] == pytest.approx(1.0)
    assert found[0][1]["ratio/first_max"] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    ("key", "function", "error", "message"),
    [
        ("loss_type", "one_parameter", ConfigError, r"rl.loss_type = '.*one_parameter' takes \(inputs\)"),
        ("loss_type", "nothing", PluginError, "has no function 'nothing'"),
        ("loss_type", "raising", PluginError, r"mine.py:raising .*KeyError.*speed"),
        ("loss_type", "a_number", PluginError, r"mine.py:a_number must return LossOutputs"),
        ("loss_type", "per_row", PluginError, r"mine.py:per_row must return LossOutputs with a scalar loss"),
        ("loss_type", "without_gradient", PluginError, r"mine.py:without_gradient .*gradient"),
        ("loss_type", "plain_metric", PluginError, r"mine.py:plain_metric .*own/number"),
        ("loss_type", "nan_loss", TrainingError, r"not finite: loss .*scenes "),
        ("loss_type", "nan_gradient", TrainingError, r"not finite: the gradient norm \(nan\); gradients|gradient norm"),
        ("advantages", "two_parameters", ConfigError, r"rl.advantages = '.*two_parameters' takes \(inputs, weights\)"),
        ("advantages", "raising", PluginError, r"mine.py:raising .*KeyError.*speed"),
        ("advantages", "a_number", PluginError, r"mine.py:a_number must return a tensor of shape \[N\]; got float"),
        ("advantages", "one_group", PluginError, r"mine.py:one_group must return a tensor of shape \[N\]; got \[4\]"),
        ("advantages", "nan_values", PluginError, r"mine.py:nan_values gave valid rows \[0, 1, 2, 3, 4\]"),
    ],
)  # fmt: skip
def test_a_broken_function_of_ones_own_is_named(
    recipe: Recipe, scenes: list[Scene], own: Path, key: str, function: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        broken_step(recipe, scenes, {key: f"{own}:{function}"})


def broken_step(recipe: Recipe, scenes: list[Scene], changes: dict[str, str]) -> None:
    trainer = make_trainer(recipe, **(PLAIN | changes))
    before = weights_of(trainer.policy)
    rollout = sample(recipe, trainer.policy, scenes)
    try:
        trainer.step(1, scenes, rollout, scores_of(leftness(rollout)))
    finally:
        assert same(weights_of(trainer.policy), before)
