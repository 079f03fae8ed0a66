"""Behaviour cloning and the routers' losses: what they are, and how they add up over micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from oracles.tiny_trainer import (
    FEATURES,
    PROCESS_OVERRIDES,
    leftness,
    make_trainer,
    sample,
    scores_of,
    start_policy,
    watch_gradients,
)

from rlhf_drive.config import Recipe
from rlhf_drive.policies.moe import RouterRecord
from rlhf_drive.scenes import Scene
from rlhf_drive.scenes.store import SceneStore
from rlhf_drive.training.extra_losses import MASKS_PER_SCENE, cloning_loss, has_human, router_loss

MakeRecipe = Callable[..., Recipe]
PLAIN = {
    "max_grad_norm": 1e9, "beta": 0.0, "importance_sampling_level": "token", "router": "free", "num_iterations": 1,
}  # fmt: skip


@pytest.fixture
def scenes(tiny_store: SceneStore) -> list[Scene]:
    return tiny_store.split("train")[:4]


@pytest.fixture
def recipe(tiny_recipe: MakeRecipe) -> Recipe:
    return tiny_recipe("quickstart", *PROCESS_OVERRIDES["masked"])


def without_human(scene: Scene) -> Scene:
    return replace(scene, reference=replace(scene.reference, human_poses=np.zeros((0, 3))))


@pytest.mark.parametrize(("process", "order"), [("masked", "random"), ("masked", "causal"), ("masked", "confidence"),
                                                ("flow", "all"), ("autoregressive", "causal")])  # fmt: skip
def test_cloning_is_a_sum_over_scenes_whose_masks_are_their_own(
    tiny_recipe: MakeRecipe, scenes: list[Scene], process: str, order: str
) -> None:
    policy = start_policy(tiny_recipe("quickstart", *PROCESS_OVERRIDES[process]))

    def loss(chosen: list[Scene], step: int = 3, seed: int = 0) -> float:
        with torch.no_grad():
            context = policy.encode(FEATURES.batch(policy, chosen))
            return float(cloning_loss(policy, context, chosen, order, seed=seed, step=step))

    alone = [loss([scene]) for scene in scenes]
    assert len({round(value, 4) for value in alone}) == 4
    assert loss(scenes) == pytest.approx(sum(alone), rel=1e-5)
    assert loss([scenes[2], scenes[0]]) == pytest.approx(alone[2] + alone[0], rel=1e-5)
    assert (loss(scenes[:1], step=4) != alone[0]) == (process != "autoregressive")  # nothing is hidden at random there
    assert (loss(scenes[:1], seed=1) != alone[0]) == (process != "autoregressive")
    other = loss([replace(scenes[0], token="another name")])
    assert (other != alone[0]) == (process != "autoregressive")
    blank = without_human(scenes[1])
    assert has_human(scenes[1])
    assert not has_human(blank)
    assert loss([scenes[0], blank, scenes[2]]) == pytest.approx(alone[0] + alone[2], rel=1e-5)
    assert loss([blank]) == 0.0


def test_cloning_is_the_sft_loss_of_the_humans_plan(recipe: Recipe, scenes: list[Scene]) -> None:
    """The mean over many steps is that of SFT with the same hidden positions."""
    policy = start_policy(recipe)
    scene = scenes[0]
    tokens = torch.from_numpy(policy.tokenizer.encode(scene.reference.human_poses[None]))
    with torch.no_grad():
        context = policy.encode(FEATURES.batch(policy, [scene]))
        found = [float(cloning_loss(policy, context, [scene], "reverse_causal", seed=0, step=s)) for s in range(60)]
        generator = torch.Generator().manual_seed(0)
        rows = tokens.expand(60 * MASKS_PER_SCENE, -1)
        expected = policy.process.sft_loss(policy, rows, context.scene(0), "reverse_causal", generator)
        other = policy.process.sft_loss(policy, rows, context.scene(0), "causal", generator)
    error = float(expected.std()) * (2 / len(expected)) ** 0.5
    assert abs(np.mean(found) - float(expected.mean())) < 4 * error
    assert abs(float(other.mean()) - float(expected.mean())) > 8 * error


def test_the_trainer_adds_the_mean_over_the_scenes_it_learns_from(recipe: Recipe, scenes: list[Scene]) -> None:
    start = start_policy(recipe)
    rollout = sample(recipe, start, scenes)
    total = leftness(rollout)
    total[:4] = 0.5  # a group without spread: its scene is not cloned either
    gradients = {}
    for coef, micro in ((0.7, 1), (0.7, 4), (0.0, 4)):
        trainer = make_trainer(recipe, start, **(PLAIN | {"bc_coef": coef, "micro_batch_scenes": micro}))
        found = watch_gradients(trainer)
        metrics = trainer.step(3, scenes, rollout, scores_of(total))
        gradients[coef, micro] = found[0]
        context = start.encode(FEATURES.batch(start, scenes[1:]))
        mean = cloning_loss(start, context, scenes[1:], rollout.trace.order, seed=0, step=3) / 3
        if coef:
            assert metrics["loss/cloning"] == pytest.approx(float(mean.detach()), rel=1e-5)
            assert metrics["loss/total"] == pytest.approx(metrics["loss/policy"] + 0.7 * metrics["loss/cloning"])
        else:
            assert "loss/cloning" not in metrics
    mean.backward()
    flat = torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in start.parameters()])
    for micro in (1, 4):
        torch.testing.assert_close(gradients[0.7, micro] - gradients[0.0, 4], 0.7 * flat, atol=2e-6, rtol=1e-3)


def test_router_losses_by_hand() -> None:
    """Four tokens, two experts, one chosen: loads 3/4 and 1/4."""
    logits = torch.tensor([[2.0, 0.0], [1.0, 0.0], [3.0, 0.0], [0.0, 1.0]])
    record = RouterRecord(logits=[logits], chosen=[logits.argmax(dim=1, keepdim=True)], rows=1)
    share = (1 / (1 + np.exp(-np.array([2.0, 1.0, 3.0, -1.0])))).mean()
    balance = 2 * (0.75 * share + 0.25 * (1 - share))
    z = float(np.mean(np.log(np.exp(logits.double().numpy()).sum(axis=1)) ** 2))
    assert float(router_loss(record, 0.1, 0.0)) == pytest.approx(0.1 * balance, rel=1e-6)
    assert float(router_loss(record, 0.0, 0.01)) == pytest.approx(0.01 * z, rel=1e-6)
    assert float(router_loss(record, 0.1, 0.01)) == pytest.approx(0.1 * balance + 0.01 * z, rel=1e-6)


@pytest.mark.parametrize("key", ["load_balance_coef", "router_z_coef"])
def test_router_losses_are_means_over_micro_batches(recipe: Recipe, scenes: list[Scene], key: str) -> None:
    """Each micro-batch counts by its scenes. The z-loss is itself a mean over tokens, and so the same for any split;
    the balance of a smaller batch is another quantity."""
    start = start_policy(recipe)
    rollout = sample(recipe, start, scenes)
    losses, gradients = {}, {}
    for coef, micro in ((0.0, 4), (0.5, 4), (0.5, 3), (0.5, 1)):
        trainer = make_trainer(recipe, start, **(PLAIN | {key: coef, "micro_batch_scenes": micro}))
        found = watch_gradients(trainer)
        metrics = trainer.step(1, scenes, rollout, scores_of(leftness(rollout)))
        losses[coef, micro] = metrics["loss/total"] - metrics["loss/policy"]
        gradients[coef, micro] = found[0]
        if not coef:
            continue
        expected = 0.0
        for part in torch.arange(4).split(micro):
            chosen, record = [scenes[i] for i in part.tolist()], RouterRecord()
            with torch.no_grad():
                rows = rollout.scenes(part.numpy()).trace
                trainer.likelihood(start, start.encode(FEATURES.batch(start, chosen)), rows, record=record)
            loss = record.balance_loss() if key == "load_balance_coef" else record.z_loss()
            expected += 0.5 * float(loss) * len(part) / 4
        assert losses[coef, micro] == pytest.approx(expected, abs=1e-5)
    assert losses[0.0, 4] == 0.0
    assert (gradients[0.5, 4] - gradients[0.0, 4]).norm() > 1e-4
    difference = float((gradients[0.5, 4] - gradients[0.5, 1]).norm())
    size = float((gradients[0.5, 4] - gradients[0.0, 4]).norm())
    if key == "router_z_coef":
        assert difference < 1e-4 * size + 1e-6
        assert losses[0.5, 1] == pytest.approx(losses[0.5, 4], abs=1e-5)
    else:
        assert difference > 1e-3 * size
