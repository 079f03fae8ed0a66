"""The likelihood of autoregressive decoding: one pass over the plan against enumeration and against a pass a step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from oracles.tabular import CausalTable, all_outcomes, scheduled_trace
from oracles.tiny_policy import ARCHITECTURE, observation

from rlhf_drive.errors import ConfigError
from rlhf_drive.likelihood import flatten_steps, trace_logp
from rlhf_drive.likelihood.prefix import whole_plan
from rlhf_drive.likelihood.trace import TraceLikelihood
from rlhf_drive.policies import DecodeTrace, Decoding, Policy, SceneContext, TrajectoryTokenizer
from rlhf_drive.policies.autoregressive import sample

L, V = 3, 3
SCENES = torch.tensor([0, 1])


@pytest.fixture
def table() -> CausalTable:
    return CausalTable(num_scenes=2, length=L, vocab_size=V, seed=0)


def every_plan(temperature: float = 1.0, top_k: int = 0) -> DecodeTrace:
    """The trace of each plan there is, for two scenes, as the sampler would have left it."""
    schedule = [[position] for position in range(L)]
    trace = scheduled_trace(all_outcomes(L, V).repeat(2, 1), schedule, V, temperature=temperature, top_k=top_k)
    return replace(trace, prefix=True)


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (0.6, 0), (1.0, 2), (1.7, 2)])
def test_probabilities_equal_enumeration_and_sum_to_one(table: CausalTable, temperature: float, top_k: int) -> None:
    trace = every_plan(temperature, top_k)
    logp, mask = trace_logp(table, SCENES, trace)
    assert table.calls == [(54, 3 * 54)]
    assert torch.equal(mask, flatten_steps(trace.scored))
    expected = torch.tensor(
        [table.probability(n // 27, plan, temperature, top_k) for n, plan in enumerate(trace.tokens.tolist())],
        dtype=torch.float64,
    )
    reachable = expected > 0
    probability = logp.sum(1).exp().detach()
    torch.testing.assert_close(probability[reachable], expected[reachable], rtol=1e-10, atol=0)
    for scene in probability.where(reachable, 0.0).view(2, 27):
        assert scene.sum().item() == pytest.approx(1.0, abs=1e-12)


def test_importance_sampling_identity(table: CausalTable) -> None:
    new = CausalTable(num_scenes=2, length=L, vocab_size=V, seed=1)
    trace = every_plan()
    value = torch.sin(1.7 * torch.arange(54, dtype=torch.float64))
    weight = (trace_logp(new, SCENES, trace)[0] - trace_logp(table, SCENES, trace)[0]).sum(1).exp().detach()
    plans = list(enumerate(trace.tokens.tolist()))
    old = torch.tensor([table.probability(n // 27, plan) for n, plan in plans], dtype=torch.float64)
    wanted = torch.tensor([new.probability(n // 27, plan) for n, plan in plans], dtype=torch.float64)
    assert (old * weight * value).sum().item() == pytest.approx((wanted * value).sum().item(), abs=1e-12)
    assert abs(((old - wanted) * value).sum().item()) > 0.05


def test_one_pass_equals_a_pass_a_step_in_value_and_gradient(table: CausalTable) -> None:
    trace = every_plan(0.8, 2)
    weights = torch.linspace(-1, 1, 54 * L * L, dtype=torch.float64).view(54, -1)
    results = []
    for one in (trace, replace(trace, prefix=False)):
        found = TraceLikelihood()(table, SCENES, one, entropy=True)
        assert found.entropy is not None
        total = (found.logp * weights).sum() + (found.entropy * weights.roll(1)).sum()
        results.append((found.logp, found.entropy, found.mask, torch.autograd.grad(total, table.table)[0]))
    for whole, stepwise in zip(*results, strict=True):
        torch.testing.assert_close(whole, stepwise, rtol=0, atol=1e-12)


@pytest.mark.parametrize("steps", [[1], [2, 0], []])
def test_some_steps_score_their_positions_alone(table: CausalTable, steps: list[int]) -> None:
    trace = every_plan()
    full = TraceLikelihood()(table, SCENES, trace, entropy=True)
    table.calls.clear()
    part = TraceLikelihood()(table, SCENES, trace, entropy=True, steps=torch.tensor(steps, dtype=torch.long))
    # Only the positions of these steps go through the head.
    assert table.calls == ([(54, 54 * len(steps))] if steps else [])
    kept = torch.zeros(54, L, L, dtype=torch.bool)
    for step in steps:
        kept[:, step, step] = True
    assert torch.equal(part.mask, kept.flatten(1))
    torch.testing.assert_close(part.logp, full.logp.where(part.mask, 0.0), rtol=0, atol=1e-12, check_dtype=False)
    assert full.entropy is not None
    assert part.entropy is not None
    torch.testing.assert_close(part.entropy, full.entropy.where(part.mask, 0.0), rtol=0, atol=0, check_dtype=False)


def test_unscored_draws_still_condition_the_others(table: CausalTable) -> None:
    trace = every_plan()
    scored = trace.scored.clone()
    scored[1] = False
    cut = replace(trace, scored=scored, action=torch.where(scored, trace.action, 0))
    logp, mask = trace_logp(table, SCENES, cut)
    full, _ = trace_logp(table, SCENES, trace)
    assert torch.equal(mask, flatten_steps(scored))
    torch.testing.assert_close(logp, full.where(mask, 0.0), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (0.7, 2), (1.5, 1)])
def test_recomputed_equals_behaviour(table: CausalTable, temperature: float, top_k: int) -> None:
    uniforms = torch.rand(64, 1, L, generator=torch.Generator().manual_seed(1))
    trace = sample(table, SCENES, uniforms, Decoding(L, "causal", temperature, top_k))
    logp, _ = trace_logp(table, SCENES, trace)
    torch.testing.assert_close(logp.float(), flatten_steps(trace.logp), rtol=0, atol=2e-6)


def test_greedy_trace_has_no_likelihood(table: CausalTable) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.temperature"):
        trace_logp(table, SCENES, every_plan(temperature=0.0))


def network(encoding: str = "displacements") -> tuple[Policy, SceneContext, DecodeTrace]:
    """A causal policy, two scenes, and six plans of each with their routing."""
    torch.manual_seed(1)
    policy = Policy(ARCHITECTURE, TrajectoryTokenizer(encoding, -5.0, 20.0, 0.1), "autoregressive").eval()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        context = policy.encode([observation(0), observation(1, agents=2, lines=9)])
    uniforms = torch.rand(12, 1, 16, generator=torch.Generator().manual_seed(2))
    return (
        policy,
        context,
        policy.process.sample(policy, context, uniforms, Decoding(16, "causal", 0.9, 40), keep_experts=True),
    )


@pytest.mark.parametrize("encoding", ["displacements", "waypoints"])
@pytest.mark.parametrize("max_tokens", [0, 16 * 4])
@torch.no_grad()
def test_network_one_pass_equals_a_pass_a_step_and_the_sampler(encoding: str, max_tokens: int) -> None:
    policy, context, trace = network(encoding)
    whole = TraceLikelihood()(policy, context, trace, entropy=True, max_tokens=max_tokens)
    stepwise = TraceLikelihood()(policy, context, replace(trace, prefix=False, experts=None), entropy=True)
    torch.testing.assert_close(whole.logp, stepwise.logp, rtol=0, atol=2e-6)
    torch.testing.assert_close(whole.entropy, stepwise.entropy, rtol=0, atol=2e-6)
    torch.testing.assert_close(whole.logp, flatten_steps(trace.logp), rtol=0, atol=1e-5)
    assert whole.logp.min() < -5


@torch.no_grad()
def test_replayed_routing_is_the_samplers_when_the_router_has_moved() -> None:
    policy, context, trace = network()
    before = TraceLikelihood()(policy, context, trace, keep_experts=True)
    assert before.experts is not None
    assert trace.experts is not None
    assert torch.equal(before.experts, trace.experts)
    for layer in policy.decoder.layers:
        layer.moe.router.weight.copy_(layer.moe.router.weight.roll(1, dims=0))
    free = TraceLikelihood()(policy, context, replace(trace, experts=None), keep_experts=True)
    assert free.experts is not None
    assert (free.experts != trace.experts).float().mean() > 0.5
    replayed = TraceLikelihood()(policy, context, trace, keep_experts=True)
    assert replayed.experts is not None
    assert torch.equal(replayed.experts, trace.experts)
    assert (replayed.logp - free.logp).abs().max() > 1e-2
    # One step at a time, each with the same routing: positions before the step's own route alike in both.
    stepwise = replace(trace, prefix=False, experts=trace.experts.expand(16, -1, -1, -1))
    expected = TraceLikelihood()(policy, context, stepwise)
    torch.testing.assert_close(replayed.logp, expected.logp, rtol=0, atol=2e-6)


def test_whole_plan_keeps_what_the_sampler_was_told() -> None:
    policy, _, trace = network()
    whole = whole_plan(trace, policy.vocab_size)
    assert torch.equal(whole.tokens, trace.tokens)
    assert torch.equal(whole.logp[0], trace.logp.sum(dim=0))
    assert (whole.temperature, whole.top_k, whole.prefix) == (0.9, 40, False)
