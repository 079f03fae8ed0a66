"""What follows the policy or holds it back: references, averages, adapters, limits and evidence."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
from oracles.tiny_trainer import (
    FEATURES,
    GROUP,
    PLAIN,
    PROCESS_OVERRIDES,
    leftness,
    make_trainer,
    same,
    sample,
    scores_of,
    spoil,
    start_policy,
    watch_advantages,
    watch_gradients,
    watch_objective,
    weights_of,
)

from rlhf_drive.config import Recipe
from rlhf_drive.errors import TrainingError
from rlhf_drive.likelihood import make_likelihood
from rlhf_drive.policies.lora import lora_settings
from rlhf_drive.scenes import Scene
from rlhf_drive.scenes.store import SceneStore

MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def scenes(tiny_store: SceneStore) -> list[Scene]:
    return tiny_store.split("train")[:4]


@pytest.fixture
def recipe(tiny_recipe: MakeRecipe) -> Recipe:
    return tiny_recipe("quickstart", *PROCESS_OVERRIDES["masked"])


@pytest.mark.parametrize(("likelihood", "router", "steps"), [("trace", "free", 0), ("trace", "record", 0),
                                                             ("elbo", "free", 0), ("trace", "free", 2)])  # fmt: skip
def test_a_divergence_in_the_reward_changes_rewards_and_nothing_else(
    recipe: Recipe, scenes: list[Scene], likelihood: str, router: str, steps: int
) -> None:
    start, beta = start_policy(recipe), 0.3
    changes = PLAIN | {
        "likelihood": likelihood, "router": router, "likelihood_steps": steps, "beta": beta, "kl_in": "reward",
        "kl_estimator": "k1",
    }  # fmt: skip
    trainer = make_trainer(recipe, start, **changes)
    assert trainer.reference is not None
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():  # the reference stays where it was
        for parameter in trainer.policy.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    rollout = sample(recipe, trainer.policy, scenes)
    valid = np.arange(16) != 6
    live = copy.deepcopy(trainer.policy)
    advantages, objective = watch_advantages(trainer), watch_objective(trainer)
    metrics = trainer.step(1, scenes, rollout, scores_of(leftness(rollout), valid))

    ((inputs, found),) = advantages
    seen = objective.seen[0]
    estimator = make_likelihood(likelihood, draws=2)
    batch = trainer.source.batch(
        scenes, rollout, scores_of(leftness(rollout)), seed=0, step=1, micro_batch_scenes=4, wanted_steps=steps,
        sampler_logp=False,
    )  # fmt: skip
    with torch.no_grad():
        old, ref = (
            estimator(
                policy, policy.encode(FEATURES.batch(policy, scenes)), rollout.trace, batch.probes, steps=batch.steps
            )
            for policy in (live, start)
        )
    # Steps that are not looked at are 0 in both; the others count for them too.
    penalty = beta * (old.logp - ref.logp).sum(dim=1) * (3 / steps if steps else 1)
    assert float(penalty[torch.from_numpy(valid)].std()) > 0.01
    expected = torch.from_numpy(leftness(rollout)).float() - penalty
    keep = torch.from_numpy(valid)
    torch.testing.assert_close(inputs.rewards[keep], expected.float()[keep], atol=1e-4, rtol=1e-4)
    centred = (
        expected.view(4, GROUP)
        - torch.tensor([float(g[k].mean()) for g, k in zip(expected.view(4, GROUP), keep.view(4, GROUP), strict=True)])[
            :, None
        ]
    )
    torch.testing.assert_close(found.values[keep], centred.flatten().float()[keep], atol=1e-4, rtol=1e-3)
    assert torch.equal(seen.advantages, found.values)
    assert "loss/kl" not in metrics
    assert metrics["loss/total"] == metrics["loss/policy"]
    tokens = seen.mask & keep[:, None]
    weight = (old.logp - ref.logp) * (3 / steps if steps else 1)
    assert metrics["kl/ref_k1"] == pytest.approx(float(weight[tokens].sum() / tokens.sum()), abs=1e-5)


def test_the_reference_follows_at_its_steps_and_by_its_share(recipe: Recipe, scenes: list[Scene]) -> None:
    start = start_policy(recipe)
    changes = PLAIN | {"beta": 0.1, "sync_ref_model": True, "ref_model_mixup_alpha": 0.25, "ref_model_sync_steps": 2}
    trainer = make_trainer(recipe, start, **changes)
    assert trainer.reference is not None
    expected = {name: value.detach().clone() for name, value in start.named_parameters()}
    for step in range(4):
        rollout = sample(recipe, trainer.policy, scenes, step=step)
        # Nothing is learned in the last step, and still it is one in which the reference follows.
        total = leftness(rollout) if step < 3 else np.zeros(16)
        metrics = trainer.step(step, scenes, rollout, scores_of(total))
        if step < 3:
            assert (metrics["kl/ref_k3"] < 1e-9) == (step == 0)
        if step in (1, 3):
            live = dict(trainer.policy.named_parameters())
            expected = {name: 0.25 * live[name].detach() + 0.75 * value for name, value in expected.items()}
        with trainer.reference.using() as reference:
            for name, value in reference.named_parameters():
                torch.testing.assert_close(value, expected[name], atol=1e-7, rtol=1e-6)
    assert not same(weights_of(start), {n: expected.get(n, v) for n, v in weights_of(start).items()})


def test_averages_take_each_step_that_kept_its_updates(recipe: Recipe, scenes: list[Scene]) -> None:
    changes = PLAIN | {
        "ema_decay": 0.5, "num_iterations": 2, "ratio_limit": 2.0, "on_limit": "rollback", "learning_rate": 1e-4,
    }  # fmt: skip
    trainer = make_trainer(recipe, **changes)
    assert trainer.ema is not None
    name = "head.mixture.bias"
    weight = trainer.policy.get_parameter(name)
    expected = weight.detach().clone()
    for step in range(4):
        rollout = sample(recipe, trainer.policy, scenes, step=step)
        wild = trainer.optimizer.register_step_post_hook(lambda *_: spoil(trainer)) if step == 1 else None
        metrics = trainer.step(step, scenes, rollout, scores_of(leftness(rollout) if step != 2 else np.zeros(16)))
        if wild:
            wild.remove()
            assert metrics["guard/rollbacks"] == 1.0
        if step in (0, 3):  # step 1 was undone, step 2 learned nothing
            expected = 0.5 * expected + 0.5 * weight.detach()
        torch.testing.assert_close(trainer.ema.state_dict()[name], expected, atol=1e-7, rtol=1e-6)
    assert trainer.ema.updates == 2
    assert not torch.equal(expected, weight)


@pytest.mark.parametrize(("limit", "iterations_"), [({"ratio_limit": 1.5}, 2), ({"kl_limit": 0.05}, 2),
                                                    ({"ratio_limit": 1.5}, 1)])  # fmt: skip
def test_an_undone_step_leaves_no_trace(
    recipe: Recipe, scenes: list[Scene], limit: dict[str, float], iterations_: int
) -> None:
    """Also where the only update is the one that goes too far: it is measured afterwards."""
    start = start_policy(recipe)
    changes = PLAIN | limit | {"on_limit": "rollback", "num_iterations": iterations_, "learning_rate": 1e-5}
    trainer, other = make_trainer(recipe, start, **changes), make_trainer(recipe, start, **changes)
    first, second = (sample(recipe, start, scenes, step=step) for step in (0, 1))
    wild = trainer.optimizer.register_step_post_hook(lambda *_: spoil(trainer))
    metrics = trainer.step(0, scenes, first, scores_of(leftness(first)))
    wild.remove()
    assert metrics["guard/rollbacks"] == 1.0
    assert same(weights_of(trainer.policy), weights_of(start))
    for one in (trainer, other):
        metrics = one.step(1, scenes, second, scores_of(leftness(second)))
    assert same(weights_of(trainer.policy), weights_of(other.policy))
    assert not same(weights_of(trainer.policy), weights_of(start))


def test_the_rest_of_a_batch_is_left_out_beyond_a_limit(recipe: Recipe, scenes: list[Scene]) -> None:
    start = start_policy(recipe)
    rollout = sample(recipe, start, scenes)
    ends = {}
    for count, limit in ((1, 0.0), (3, 1.5)):
        changes = {"num_iterations": count, "ratio_limit": limit, "on_limit": "next_batch", "learning_rate": 1e-4}
        trainer = make_trainer(recipe, start, **(PLAIN | changes))
        updates = watch_gradients(trainer)
        trainer.optimizer.register_step_post_hook(lambda *_, trainer=trainer: spoil(trainer))
        metrics = trainer.step(0, scenes, rollout, scores_of(leftness(rollout)))
        assert len(updates) == 1
        ends[count] = weights_of(trainer.policy)
    assert metrics["guard/early_stops"] == 1.0
    assert metrics["ratio/max"] > 1.5
    assert same(ends[1], ends[3])


def test_a_limit_can_stop_the_run(recipe: Recipe, scenes: list[Scene]) -> None:
    trainer = make_trainer(recipe, **(PLAIN | {"kl_limit": 0.05, "on_limit": "stop"}))
    rollout = sample(recipe, trainer.policy, scenes)
    trainer.optimizer.register_step_post_hook(lambda *_: spoil(trainer))
    with pytest.raises(TrainingError, match=r"^Step 1: kl/old_approx is .* above rl.kl_limit = 0.05"):
        trainer.step(0, scenes, rollout, scores_of(leftness(rollout)))


def test_evidence_names_the_micro_batch_that_broke(recipe: Recipe, scenes: list[Scene]) -> None:
    trainer = make_trainer(recipe, **(PLAIN | {"micro_batch_scenes": 1}))
    rollout = sample(recipe, trainer.policy, scenes)
    k, position = rollout.trace.scored[:, 9].nonzero()[0].tolist()
    rollout.trace.logp[k, 9, position] = torch.nan
    before = weights_of(trainer.policy)
    with pytest.raises(TrainingError, match=scenes[2].token) as raised:
        trainer.step(4, scenes, rollout, scores_of(leftness(rollout)))
    assert not any(scene.token in str(raised.value) for scene in (scenes[0], scenes[1], scenes[3]))
    assert trainer.folder is not None
    report = json.loads((trainer.folder / "offending" / "step-000005" / "scenes.json").read_text())
    assert report["rows"] == [8, 9, 10, 11]
    assert report["row_scenes"] == [scenes[2].token] * GROUP
    assert report["scenes"] == [{"scene": scenes[2].token, "rows": [9]}]
    assert same(weights_of(trainer.policy), before)


@pytest.mark.parametrize("process", list(PROCESS_OVERRIDES))
def test_adapters_alone_move_and_the_reference_is_the_base(
    tiny_recipe: MakeRecipe, scenes: list[Scene], process: str
) -> None:
    recipe = tiny_recipe("quickstart", *PROCESS_OVERRIDES[process])
    start = start_policy(recipe)
    changes = {"lora_rank": 4, "lora_alpha": 8.0, "beta": 0.2, "num_iterations": 2, "gradient_checkpointing": True}
    trainer = make_trainer(recipe, start, **(PLAIN | changes))
    assert lora_settings(trainer.policy) is not None
    before = weights_of(trainer.policy)
    watched = watch_objective(trainer)
    with torch.no_grad():
        context = start.encode(FEATURES.batch(start, scenes))
    for step in range(2):
        rollout = sample(recipe, trainer.policy, scenes, step=step)
        watched.seen.clear()
        metrics = trainer.step(step, scenes, rollout, scores_of(leftness(rollout)))
        with torch.no_grad():
            base = make_likelihood("trace")(start, context, rollout.trace)
        assert watched.seen[0].ref_logp is not None
        torch.testing.assert_close(watched.seen[0].ref_logp, base.logp, atol=2e-5, rtol=1e-5)
        difference = (watched.seen[0].logp - base.logp)[base.mask].detach().abs().max()
        assert float(difference) < 1e-4 if step == 0 else float(difference) > 1e-3
        assert metrics["ratio/first_max"] == pytest.approx(1.0, abs=1e-5)
        assert metrics["ratio/max"] > 1.0005
    moved = {name for name, value in weights_of(trainer.policy).items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if "lora_" in name}
