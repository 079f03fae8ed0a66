"""The trainer with every likelihood, process, routing and option: what must hold whatever is combined."""

from __future__ import annotations

import itertools
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
    move_after_updates,
    sample,
    scores_of,
    start_policy,
    watch_gradients,
    watch_objective,
)

from rlhf_drive.config import Recipe
from rlhf_drive.likelihood import make_likelihood
from rlhf_drive.likelihood_fits import OWN_STATES, likelihoods_of
from rlhf_drive.objectives import AdvantageInputs
from rlhf_drive.scenes import Scene
from rlhf_drive.scenes.store import SceneStore
from rlhf_drive.training import logp_source

MakeRecipe = Callable[..., Recipe]
FITTING = [(process, name) for process in PROCESS_OVERRIDES for name in likelihoods_of(process)]


@pytest.fixture
def scenes(tiny_store: SceneStore) -> list[Scene]:
    return tiny_store.split("train")[:4]


@pytest.fixture
def recipe(tiny_recipe: MakeRecipe) -> Recipe:
    return tiny_recipe("quickstart", *PROCESS_OVERRIDES["masked"])


@pytest.mark.parametrize(("process", "likelihood"), FITTING)
def test_old_log_probabilities_are_those_of_the_policy_that_sampled(
    tiny_recipe: MakeRecipe, scenes: list[Scene], process: str, likelihood: str
) -> None:
    """Whatever the router does: the ratio starts at 1, and the second iteration still measures from the start."""
    recipe = tiny_recipe("quickstart", *PROCESS_OVERRIDES[process])
    start = start_policy(recipe)
    estimator = make_likelihood(likelihood, draws=2)
    modes = ["free", "frozen", "record", *(["replay"] if likelihood in OWN_STATES else [])]
    rollout = sample(recipe, start, scenes, keep_experts=True)
    for router in modes:
        mine = rollout if router == "replay" else sample(recipe, start, scenes)
        count = 1 if likelihood == "sandwich" else 2
        changes = PLAIN | {"likelihood": likelihood, "router": router, "num_iterations": count, "micro_batch_scenes": 3}
        trainer = make_trainer(recipe, start, **changes)
        move_after_updates(trainer, 0.02)
        watched = watch_objective(trainer)
        metrics = trainer.step(1, scenes, mine, scores_of(leftness(mine)))
        for name in ("mean", "min", "max"):
            assert metrics[f"ratio/first_{name}"] == pytest.approx(1.0, abs=1e-5), router
        assert metrics["logprob_mismatch/max"] < 1e-4
        first = watched.seen[: len(watched.seen) // count]
        old = torch.cat([inputs.old_logp for inputs in first])
        # One pass over all rows with the weights that sampled and no routing from elsewhere, to compare with.
        batch = trainer.source.batch(
            scenes, mine, scores_of(leftness(mine)), seed=0, step=1, micro_batch_scenes=4, wanted_steps=0,
            sampler_logp=False,
        )  # fmt: skip
        rewards = torch.from_numpy(leftness(mine)).float()
        batch.learn_from(
            trainer.advantages(AdvantageInputs(rewards, torch.ones(len(rewards), dtype=torch.bool), GROUP))
        )
        with torch.no_grad():
            context = start.encode(FEATURES.batch(start, scenes))
            expected = estimator(start, context, mine.trace, batch.probes)
        assert torch.equal(torch.cat([inputs.mask for inputs in first]), expected.mask)
        torch.testing.assert_close(old * expected.mask, expected.logp * expected.mask, atol=2e-5, rtol=1e-5)
        for inputs, later in itertools.pairwise([first, watched.seen[len(first) :]] if count == 2 else []):
            for a, b in zip(inputs, later, strict=True):
                assert torch.equal(a.old_logp, b.old_logp)
                assert (a.logp - b.logp).abs().max() > 1e-3


REPLAYABLE = [("masked", "trace"), ("masked", "mean_field"), ("masked", "coupled"), ("flow", "marginal"),
              ("autoregressive", "trace")]  # fmt: skip


@pytest.mark.parametrize(("process", "likelihood"), REPLAYABLE)
def test_the_ratio_does_not_jump_where_experts_flip(
    tiny_recipe: MakeRecipe, scenes: list[Scene], process: str, likelihood: str
) -> None:
    """All experts are about equally likely, and the first update changes routers by next to nothing: most experts
    flip, gates stay. Replayed, the second iteration's ratios stay at 1; free, they do not."""
    recipe = tiny_recipe("quickstart", *PROCESS_OVERRIDES[process])
    start = start_policy(recipe, close_routing=True)
    rollout = sample(recipe, start, scenes, keep_experts=True)
    plain = sample(recipe, start, scenes)
    jumps = {}
    for router in ("free", "record", *(["replay"] if likelihood in OWN_STATES else [])):
        mine = rollout if router == "replay" else plain
        changes = PLAIN | {"likelihood": likelihood, "router": router, "num_iterations": 2, "micro_batch_scenes": 3}
        trainer = make_trainer(recipe, start, **changes)
        move_after_updates(trainer, 1e-3, only_routers=True)
        watched = watch_objective(trainer)
        metrics = trainer.step(1, scenes, mine, scores_of(leftness(mine)))
        assert metrics["ratio/first_max"] == pytest.approx(1.0, abs=1e-5)
        assert metrics["moe/routing_flip_frac"] > 0.1, router
        second = watched.seen[len(watched.seen) // 2 :]
        jumps[router] = max(float((i.logp - i.old_logp)[i.mask].detach().abs().max()) for i in second)
    assert jumps["record"] < 0.01
    assert jumps.get("replay", 0.0) < 0.01
    assert jumps["free"] > 10 * jumps["record"]


OBJECTIVES = (
    ("grpo", "token"), ("dr_grpo", "token"), ("dapo", "step"), ("luspo", "sequence"), ("grpo", "sequence_token"),
    ("cispo", "token"), ("sapo", "token"), ("gmpo", "sequence"), ("wll", "token"),
)  # fmt: skip
COMBINED = [
    *(("masked", "trace", loss_type, level) for loss_type, level in OBJECTIVES),
    *(
        (process, likelihood, "grpo", "token")
        for process, likelihood in FITTING
        if (process, likelihood) != ("masked", "trace")
    ),
]


def update_of(recipe: Recipe, scenes: list[Scene], **changes: object) -> tuple[list[torch.Tensor], dict[str, float]]:
    """Gradients of two iterations, the second away from the policy that sampled, and the metrics of the second; one
    group has no spread and some rows could not be scored."""
    start = start_policy(recipe)
    rollout = sample(recipe, start, scenes)
    total = leftness(rollout)
    total[GROUP : 2 * GROUP] = 0.5
    valid = np.arange(len(total)) % 5 != 3
    trainer = make_trainer(recipe, start, **changes)
    gradients = watch_gradients(trainer)
    move_after_updates(trainer, 0.02)
    metrics = trainer.step(1, scenes, rollout, scores_of(total, valid))
    assert metrics["groups/degenerate_frac"] == pytest.approx(0.25)
    return gradients, metrics


@pytest.mark.parametrize(("process", "likelihood", "loss_type", "level"), COMBINED)
def test_the_update_does_not_depend_on_how_memory_is_saved(
    tiny_recipe: MakeRecipe, scenes: list[Scene], process: str, likelihood: str, loss_type: str, level: str
) -> None:
    recipe = tiny_recipe("quickstart", *PROCESS_OVERRIDES[process])
    changes = PLAIN | {
        "likelihood": likelihood, "loss_type": loss_type, "importance_sampling_level": level, "beta": 0.1,
        "entropy_coef": 0.01, "bc_coef": 0.3, "num_iterations": 1 if likelihood == "sandwich" else 2,
        "epsilon_high": 5.0 if loss_type == "cispo" else 0.2,
    }  # fmt: skip
    whole, expected = update_of(recipe, scenes, **changes)
    assert float(whole[-1].norm()) > 1e-3
    saved = {"micro_batch_scenes": 2, "max_tokens_per_forward": 100, "gradient_checkpointing": True}
    parts, found = update_of(recipe, scenes, **(changes | saved))
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(b, a, atol=2e-6 + 1e-5 * float(a.abs().max()), rtol=1e-3)
    names = [n for n in expected if n.startswith(("loss/", "ratio/", "kl/", "entropy/", "groups/", "optim/"))]
    assert {"loss/total", "loss/kl", "loss/cloning", "entropy/mean", "optim/grad_norm"} <= set(names)
    for name in names:
        assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=2e-6), name


def test_bnpo_alone_depends_on_the_split(recipe: Recipe, scenes: list[Scene]) -> None:
    """Its definition: a mean over micro-batches of means over their tokens. Rows that could not be scored make these
    means differ in weight: the first micro-batch lacks one row, the second three."""
    start = start_policy(recipe)
    rollout = sample(recipe, start, scenes)
    valid = ~np.isin(np.arange(16), [3, 9, 10, 14])
    gradients = {}
    for micro in (1, 2, 4):
        trainer = make_trainer(recipe, start, **(PLAIN | {"loss_type": "bnpo", "micro_batch_scenes": micro}))
        found = watch_gradients(trainer)
        trainer.step(1, scenes, rollout, scores_of(leftness(rollout), valid))
        gradients[micro] = found[0]
    assert (gradients[4] - gradients[2]).norm() > 0.01 * gradients[4].norm()
    parts = []
    for half in (slice(0, 2), slice(2, 4)):  # each micro-batch as a batch of its own, by the token mean
        rows = np.arange(16)[half.start * GROUP : half.stop * GROUP]
        trainer = make_trainer(recipe, start, **(PLAIN | {"loss_type": "dapo"}))
        found = watch_gradients(trainer)
        mine = rollout.scenes(np.arange(4)[half])
        trainer.step(1, scenes[half], mine, scores_of(leftness(rollout)[rows], valid[rows]))
        parts.append(found[0])
    torch.testing.assert_close(gradients[2], (parts[0] + parts[1]) / 2, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("likelihood", ["trace", "marginal"])
def test_the_mean_over_all_choices_of_decode_steps_is_the_whole_gradient(
    tiny_recipe: MakeRecipe, scenes: list[Scene], monkeypatch: pytest.MonkeyPatch, likelihood: str
) -> None:
    """Away from the policy that sampled, with clipping, a KL and an entropy bonus: all are sums of token terms."""
    process = "flow" if likelihood == "marginal" else "masked"
    recipe = tiny_recipe("quickstart", *PROCESS_OVERRIDES[process])
    start = start_policy(recipe)
    rollout = sample(recipe, start, scenes)
    changes = PLAIN | {
        "likelihood": likelihood, "num_iterations": 2, "likelihood_steps": 2, "beta": 0.1, "entropy_coef": 0.01,
    }  # fmt: skip
    found: dict[tuple[int, ...] | None, tuple[list[torch.Tensor], float]] = {}
    for chosen in (None, (0, 1), (0, 2), (1, 2)):
        steps = None if chosen is None else torch.tensor(chosen)
        monkeypatch.setattr(logp_source, "drawn_steps", lambda *_, steps=steps, **__: steps)
        trainer = make_trainer(recipe, start, **changes)
        gradients = watch_gradients(trainer)
        move_after_updates(trainer, 0.02)
        metrics = trainer.step(1, scenes, rollout, scores_of(leftness(rollout)))
        assert metrics["ratio/first_max"] == pytest.approx(1.0, abs=1e-5)
        found[chosen] = (gradients, metrics["loss/total"])
    subsets = [value for chosen, value in found.items() if chosen is not None]
    for i in range(2):
        whole = found[None][0][i]
        mean = torch.stack([gradients[i] for gradients, _ in subsets]).mean(dim=0)
        torch.testing.assert_close(mean, whole, atol=1e-6 + 1e-5 * float(whole.abs().max()), rtol=1e-3)
        assert (subsets[0][0][i] - whole).norm() > 0.05 * whole.norm()  # one choice alone is not the whole
    assert np.mean([loss for _, loss in subsets]) == pytest.approx(found[None][1], abs=1e-6)
