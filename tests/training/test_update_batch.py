"""What a step learns from: which groups, which rows, which slots, and what each counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from oracles.tiny_trainer import FEATURES, GROUP, PROCESS_OVERRIDES, leftness, sample, scores_of, start_policy

from rlhf_drive.config import Recipe
from rlhf_drive.likelihood import TokenLogp, make_likelihood
from rlhf_drive.objectives import AdvantageInputs, Advantages, AdvantageSettings, make_advantages
from rlhf_drive.policies import Policy
from rlhf_drive.scenes import Scene
from rlhf_drive.scenes.store import SceneStore
from rlhf_drive.training.logp_source import LogpSource
from rlhf_drive.training.update_batch import UpdateBatch, drawn_steps

VALID = np.arange(20) % 7 != 2  # rows 2, 9 and 16 could not be scored


@pytest.fixture
def scenes(tiny_store: SceneStore) -> list[Scene]:
    return tiny_store.split("train")[:5]


@pytest.fixture
def recipe(tiny_recipe: Callable[..., Recipe]) -> Recipe:
    return tiny_recipe("quickstart", *PROCESS_OVERRIDES["masked"])


@pytest.fixture
def policy(recipe: Recipe) -> Policy:
    return start_policy(recipe)


@pytest.fixture
def batch_of(recipe: Recipe, policy: Policy, scenes: list[Scene]) -> Callable[..., UpdateBatch]:
    """``batch_of(likelihood, steps=0, sampler_logp=True)``: five scenes, two a micro-batch."""
    rollout = sample(recipe, policy, scenes)

    def make(likelihood: str = "trace", *, steps: int = 0, sampler_logp: bool = True) -> UpdateBatch:
        source = LogpSource(make_likelihood(likelihood, draws=2), FEATURES, 0)
        return source.batch(
            scenes, rollout, scores_of(leftness(rollout), VALID), seed=0, step=3, micro_batch_scenes=2,
            wanted_steps=steps, sampler_logp=sampler_logp,
        )  # fmt: skip

    return make


def advantages(rewards: torch.Tensor) -> Advantages:
    """Of groups 1 and 4 without spread."""
    rewards = rewards.clone()
    rewards[GROUP : 2 * GROUP] = 0.25
    rewards[4 * GROUP :] = 0.5
    return make_advantages(AdvantageSettings())(AdvantageInputs(rewards, torch.from_numpy(VALID), GROUP))


def test_groups_with_spread_are_learned_from_and_counted(batch_of: Callable[..., UpdateBatch]) -> None:
    batch = batch_of()
    found = advantages(torch.arange(20.0))
    batch.learn_from(found)
    assert batch.kept.tolist() == [0, 2, 3]
    parts = batch.micro_batches()
    assert [[scene.token for scene in part.scenes] for part in parts] == [
        [batch.scenes[0].token, batch.scenes[2].token], [batch.scenes[3].token]
    ]  # fmt: skip
    assert torch.cat([part.rows for part in parts]).tolist() == [*range(4), *range(8, 16)]
    # Rows 2 and 9 of the twelve could not be scored; each of the others has 16 tokens, each scored once.
    assert (batch.denominators.sequences, batch.denominators.tokens) == (10.0, 160.0)
    assert (batch.denominators.max_length, batch.denominators.micro_batches) == (16, 2)
    assert torch.equal(batch.advantages, found.values)
    for part in parts:
        assert torch.equal(part.trace.tokens, batch.rollout.tokens[part.rows])
        assert torch.equal(part.trace.state, batch.rollout.trace.state[:, part.rows])


def test_a_batch_without_spread_has_no_micro_batches(batch_of: Callable[..., UpdateBatch]) -> None:
    batch = batch_of()
    batch.learn_from(make_advantages(AdvantageSettings())(AdvantageInputs(torch.ones(20), batch.valid, GROUP)))
    assert batch.micro_batches() == []
    assert batch.denominators.tokens == 0.0


def test_probes_learn_the_sign_of_the_advantage(batch_of: Callable[..., UpdateBatch]) -> None:
    batch = batch_of("sandwich")
    found = advantages(torch.arange(20.0))
    batch.learn_from(found)
    part = batch.micro_batches()[1]
    assert part.probes is not None
    assert part.probes.negative is not None
    assert part.probes.negative.tolist() == (found.values[12:16] < 0).tolist() == [True, True, False, False]


def test_the_first_pass_gives_old_values_only_where_the_samplers_do_not_serve(
    batch_of: Callable[..., UpdateBatch],
) -> None:
    for likelihood, sampler_logp in (("trace", True), ("trace", False), ("coupled", True)):
        batch = batch_of(likelihood, sampler_logp=sampler_logp)
        theirs = None if batch.old_logp is None else batch.old_logp.clone()
        assert (theirs is None) == ((likelihood, sampler_logp) != ("trace", True))
        for number, part in enumerate(batch.micro_batches()):
            fresh = torch.full((len(part.rows), batch.mask.shape[1]), float(-number), requires_grad=True)
            batch.keep(part.rows, TokenLogp(fresh, batch.mask[part.rows]))
        assert batch.old_logp is not None
        assert not batch.old_logp.requires_grad
        ours = torch.repeat_interleave(-torch.tensor([0.0, 0, 1, 1, 2]), GROUP)[:, None].expand_as(batch.mask)
        assert torch.equal(batch.old_logp, ours if theirs is None else theirs)


@pytest.mark.parametrize("likelihood", ["trace", "coupled"])
def test_routing_of_the_first_pass_comes_back_row_by_row(batch_of: Callable[..., UpdateBatch], likelihood: str) -> None:
    batch = batch_of(likelihood)
    batch.learn_from(advantages(torch.arange(20.0)))
    for part in batch.micro_batches():
        logp = torch.zeros(len(part.rows), batch.mask.shape[1])
        experts = part.rows[None, :, None, None].expand(3, -1, 1, 2).to(torch.int16)
        batch.keep(part.rows, TokenLogp(logp, batch.mask[part.rows], experts=experts))
    for part in batch.micro_batches():
        carrier = part.trace if likelihood == "trace" else part.probes
        assert carrier is not None
        assert carrier.experts is not None
        assert (carrier.experts == part.rows[None, :, None, None]).all()
        assert carrier.experts.shape == (3, len(part.rows), 1, 2)


def test_steps_that_are_looked_at_count_for_the_others(batch_of: Callable[..., UpdateBatch]) -> None:
    batch = batch_of(steps=2)
    assert batch.steps is not None
    assert batch.old_logp is not None
    weight = batch.step_weight()
    assert weight is not None
    by_step = weight.view(20, 3, 16)
    looked_at = torch.isin(torch.arange(3), batch.steps)
    assert torch.equal(by_step, torch.where(looked_at, 1.5, 0.0)[None, :, None].expand(20, 3, 16))
    part = batch.micro_batches()[1]
    live = torch.full_like(batch.old_logp[part.rows], -9.0)
    inputs = batch.loss_inputs(part, TokenLogp(live, batch.mask[part.rows]))
    unseen = inputs.weight == 0
    assert torch.equal(inputs.logp[unseen], inputs.old_logp[unseen])
    assert (inputs.logp[~unseen] == -9.0).all()
    assert torch.equal(inputs.mask, batch.mask[part.rows])  # counts are those of all steps
    assert inputs.rows is not None
    assert inputs.rows.tolist() == VALID[8:16].tolist()
    assert inputs.step_of is not None
    assert inputs.step_of.tolist() == [0] * 16 + [1] * 16 + [2] * 16
    assert batch_of("coupled").step_weight() is None
    plain = batch_of("coupled")
    plain.keep(torch.arange(20), TokenLogp(torch.zeros(20, 16), plain.mask))
    assert plain.loss_inputs(part, TokenLogp(torch.zeros(8, 16), plain.mask[part.rows])).step_of is None


def test_every_choice_of_steps_is_as_likely_and_keyed_by_seed_and_step() -> None:
    def draw(step: int, seed: int = 0) -> tuple[int, ...]:
        steps = drawn_steps(4, 2, seed=seed, step=step, device=torch.device("cpu"))
        assert steps is not None
        return tuple(steps.tolist())

    counts = Counter(draw(step) for step in range(1200))
    assert set(counts) == {(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)}
    # 200 expected of each, with a standard deviation of 12.9.
    assert all(abs(count - 200) < 4 * 12.9 for count in counts.values())
    assert [draw(step) for step in range(50)] == [draw(step) for step in range(50)]
    assert [draw(step) for step in range(50)] != [draw(step, seed=1) for step in range(50)]
    for wanted in (0, 4, 5):
        assert drawn_steps(4, wanted, seed=0, step=0, device=torch.device("cpu")) is None
