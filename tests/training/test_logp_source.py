"""Where the trainer's log-probabilities come from: the same for a row whoever its batch mates are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from oracles.tiny_trainer import FEATURES, GROUP, PROCESS_OVERRIDES, leftness, sample, scores_of, start_policy

from rlhf_drive.config import Recipe
from rlhf_drive.likelihood import flatten_steps, make_likelihood
from rlhf_drive.policies.moe import RouterRecord
from rlhf_drive.scenes import Scene
from rlhf_drive.scenes.store import SceneStore
from rlhf_drive.training.logp_source import LogpSource
from rlhf_drive.training.update_batch import UpdateBatch
from rollout import Rollout

PROBED = ("coupled", "elbo", "random_mask", "sandwich")


@pytest.fixture
def scenes(tiny_store: SceneStore) -> list[Scene]:
    return tiny_store.split("train")[:4]


@pytest.fixture
def recipe(tiny_recipe: Callable[..., Recipe]) -> Recipe:
    return tiny_recipe("quickstart", *PROCESS_OVERRIDES["masked"])


def batch_of(
    source: LogpSource, scenes: list[Scene], rollout: Rollout, *, seed: int = 0, step: int = 3, size: int = 4
) -> UpdateBatch:
    return source.batch(
        scenes, rollout, scores_of(leftness(rollout)), seed=seed, step=step, micro_batch_scenes=size, wanted_steps=0,
        sampler_logp=True,
    )  # fmt: skip


@pytest.mark.parametrize("likelihood", PROBED)
def test_probes_belong_to_the_sample_and_not_to_its_place(recipe: Recipe, scenes: list[Scene], likelihood: str) -> None:
    rollout = sample(recipe, start_policy(recipe), scenes)
    source = LogpSource(make_likelihood(likelihood, draws=2), FEATURES, 0)
    whole = batch_of(source, scenes, rollout).probes
    order = [2, 0]
    some = batch_of(source, [scenes[i] for i in order], rollout.scenes(np.array(order))).probes
    assert whole is not None
    assert some is not None
    rows = torch.tensor([i * GROUP + g for i in order for g in range(GROUP)])
    assert torch.equal(some.hidden, whole.hidden[:, rows])
    assert torch.equal(some.weight, whole.weight[:, rows])
    assert some.weight.dtype == torch.float32
    for changes in ({"seed": 1}, {"step": 4}):
        other = batch_of(source, scenes, rollout, **changes).probes
        assert other is not None
        assert not torch.equal(other.hidden, whole.hidden)
    assert not torch.equal(whole.hidden[:, 0], whole.hidden[:, 1])  # rows of one group differ


@pytest.mark.parametrize(
    ("likelihood", "served", "slots"),
    [("trace", True, 48), ("mean_field", False, 16), ("coupled", False, 16), ("elbo", False, 16)],
)
def test_the_samplers_values_serve_the_likelihood_that_they_belong_to(
    recipe: Recipe, scenes: list[Scene], likelihood: str, served: bool, slots: int
) -> None:
    rollout = sample(recipe, start_policy(recipe), scenes)
    batch = batch_of(LogpSource(make_likelihood(likelihood, draws=2), FEATURES, 0), scenes, rollout)
    assert batch.mask.shape == (16, slots)
    assert batch.mask.sum(dim=1).tolist() == [16] * 16
    assert (batch.old_logp is not None) == served
    if batch.old_logp is not None:
        assert torch.equal(batch.old_logp, flatten_steps(rollout.trace.logp))


@pytest.mark.parametrize("likelihood", ["trace", *PROBED])
def test_a_row_has_one_value_in_any_micro_batch_and_any_pass(
    recipe: Recipe, scenes: list[Scene], likelihood: str
) -> None:
    policy = start_policy(recipe)
    rollout = sample(recipe, policy, scenes)
    estimator = make_likelihood(likelihood, draws=2)
    signs = torch.arange(16) % 3 == 0
    found = {}
    for size, max_tokens in ((4, 0), (3, 0), (1, 70)):
        source = LogpSource(estimator, FEATURES, max_tokens)
        batch = batch_of(source, scenes, rollout, size=size)
        if batch.probes is not None:
            batch.probes = replace(batch.probes, negative=signs)
        parts = [source.logp(policy, batch, part, entropy=True)[0] for part in batch.micro_batches()]
        found[size] = [torch.cat([getattr(part, name) for part in parts]) for name in ("logp", "entropy", "mask")]
    for size in (3, 1):
        for value, other in zip(found[4], found[size], strict=True):
            torch.testing.assert_close(value, other, atol=2e-5, rtol=1e-5)
    assert found[4][0].dtype == torch.float32
    assert float(found[4][0].detach().std()) > 0.05


def test_the_context_and_the_routing_are_those_of_the_micro_batch(recipe: Recipe, scenes: list[Scene]) -> None:
    policy = start_policy(recipe)
    rollout = sample(recipe, policy, scenes)
    source = LogpSource(make_likelihood("trace"), FEATURES, 0)
    batch = batch_of(source, scenes, rollout, size=3)
    part = batch.micro_batches()[1]
    record = RouterRecord()
    found, context = source.logp(policy, batch, part, record=record, keep_experts=True)
    alone = policy.encode(FEATURES.batch(policy, scenes[3:]))
    assert torch.equal(context.summary, alone.summary)
    assert found.experts is not None
    assert found.experts.shape[:2] == (3, GROUP)
    assert record.rows == 3 * GROUP
    assert torch.equal(record.choices(), found.experts.transpose(0, 1).flatten(0, 1))
    assert source.logp(policy, batch, part)[0].experts is None
