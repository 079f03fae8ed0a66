"""What the one-pass surrogate keeps and what it loses."""

from __future__ import annotations

import pytest
import torch
from oracles.tabular import TabularDenoiser, all_outcomes, outcome_probability, scheduled_trace

from rlhf_drive.likelihood import mean_field_logp, trace_logp

L, V = 3, 3
CONTEXT = torch.tensor([0])
CAUSAL = [[0], [1], [2]]


def test_equals_the_trace_when_tokens_are_independent() -> None:
    policy = TabularDenoiser(1, L, V, seed=0, coupled=False)
    trace = scheduled_trace(all_outcomes(L, V), CAUSAL, V, temperature=0.7)
    exact, _ = trace_logp(policy, CONTEXT, trace)
    surrogate, mask = mean_field_logp(policy, CONTEXT, trace)
    torch.testing.assert_close(surrogate.sum(1), exact.sum(1), rtol=0, atol=1e-12)
    assert mask.shape == (V**L, L)
    assert bool(mask.all())


def test_differs_from_the_trace_when_tokens_are_coupled() -> None:
    policy = TabularDenoiser(1, L, V, seed=0)
    trace = scheduled_trace(all_outcomes(L, V), CAUSAL, V)
    exact = trace_logp(policy, CONTEXT, trace)[0].sum(1).detach()
    surrogate = mean_field_logp(policy, CONTEXT, trace)[0].sum(1).detach()
    # A probability of its own, but another one: off by 0.62 nat on average over the sampler's draws, by 4.7 at most.
    assert float(surrogate.exp().sum()) == pytest.approx(1.0, abs=1e-12)
    divergence = float((exact.exp() * (exact - surrogate)).sum())
    assert divergence == pytest.approx(0.6248, abs=1e-3)
    assert float((exact - surrogate).abs().max()) == pytest.approx(4.687, abs=1e-2)


def test_equals_one_step_decoding_and_takes_one_pass() -> None:
    policy = TabularDenoiser(1, L, V, seed=0)
    plans = all_outcomes(L, V)
    trace = scheduled_trace(plans, [[2], [0], [1]], V, temperature=1.3, top_k=2)
    policy.calls.clear()
    surrogate = mean_field_logp(policy, CONTEXT, trace, max_rows=1)[0].sum(1).exp()
    assert policy.calls == [(V**L, V**L * L)]
    at_once = [outcome_probability(policy, 0, plan, [[0, 1, 2]], 1.3, 2) for plan in plans.tolist()]
    expected = torch.tensor(at_once, dtype=torch.float64)
    torch.testing.assert_close(surrogate[expected > 0], expected[expected > 0], rtol=1e-10, atol=0)
