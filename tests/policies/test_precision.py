"""bfloat16: the decoder's products are rounded, what depends on them agrees between all who ask, ratios are 1."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from oracles.tiny_trainer import FEATURES, PLAIN, PROCESS_OVERRIDES, leftness, make_trainer, sample, scores_of
from oracles.tiny_trainer import start_policy as start

from rlhf_drive.config import Recipe
from rlhf_drive.likelihood import flatten_steps, trace_logp
from rlhf_drive.policies import Policy
from rlhf_drive.scenes.store import SceneStore


def rounded(policy: Policy) -> Policy:
    found = copy.deepcopy(policy)
    found.precision = torch.bfloat16
    return found


@pytest.mark.parametrize("process", ["masked", "autoregressive"])
def test_sampler_and_trainer_agree_and_come_close_to_float32(
    tiny_recipe: Callable[..., Recipe], tiny_store: SceneStore, process: str
) -> None:
    recipe, scenes = tiny_recipe("quickstart", *PROCESS_OVERRIDES[process]), list(tiny_store.split("train"))[:3]
    exact = start(recipe)
    policy = rounded(exact)
    assert copy.deepcopy(policy).precision == torch.bfloat16
    assert "precision" not in policy.describe()
    rollout = sample(recipe, policy, scenes)
    with torch.no_grad():
        logp, mask = trace_logp(policy, policy.encode(FEATURES.batch(policy, scenes)), rollout.trace)
        full, _ = trace_logp(exact, exact.encode(FEATURES.batch(exact, scenes)), rollout.trace)
    assert logp.dtype == torch.float32
    own = (logp - flatten_steps(rollout.trace.logp))[mask].abs()
    rounding = (logp - full)[mask].abs()
    assert 1e-5 < float(rounding.mean()) < 0.05
    assert float(own.mean()) < 0.5 * float(rounding.mean())


def test_an_update_starts_at_ratio_one_and_comes_close_to_float32(
    tiny_recipe: Callable[..., Recipe], tiny_store: SceneStore
) -> None:
    recipe, scenes = tiny_recipe("quickstart", *PROCESS_OVERRIDES["masked"]), list(tiny_store.split("train"))[:3]
    policy = start(recipe)
    changes = {**PLAIN, "num_iterations": 2, "beta": 0.02}
    exact, coarse = make_trainer(recipe, policy, **changes), make_trainer(recipe, rounded(policy), **changes)
    assert coarse.settings.recompute_old
    assert not exact.settings.recompute_old
    rollout = sample(recipe, policy, scenes)
    scores = scores_of(leftness(rollout))
    seen = []
    inner = coarse.objective
    coarse.objective = lambda inputs, counts: seen.append(inputs) or inner(inputs, counts)  # type: ignore[func-returns-value]
    a, b = exact.step(0, scenes, rollout, scores), coarse.step(0, scenes, rollout, scores)
    assert [b[f"ratio/first_{name}"] for name in ("min", "mean", "max")] == pytest.approx([1.0, 1.0, 1.0], abs=1e-6)
    assert b["logprob_mismatch/max"] == 0.0
    assert b["loss/total"] == pytest.approx(a["loss/total"], abs=0.02)
    assert b["optim/grad_norm"] == pytest.approx(a["optim/grad_norm"], rel=0.1)
    sampled = flatten_steps(rollout.trace.logp)
    for inputs in seen:
        assert torch.equal(inputs.behaviour_logp, sampled[: len(inputs.logp)])
        assert not torch.equal(inputs.old_logp, inputs.behaviour_logp)
    assert all(p.dtype == torch.float32 for p in coarse.policy.parameters())
