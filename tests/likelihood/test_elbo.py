"""The lower bound by enumeration: every mask size with every order of the positions."""

from __future__ import annotations

import math

import pytest
import torch
from oracles.bounds import coupled_model, every_size_and_order, hidden_logp, lower_bound, random_order_logp
from oracles.tabular import TabularDenoiser, all_outcomes, scheduled_trace
from torch import Tensor

from rlhf_drive.likelihood import make_likelihood
from rlhf_drive.likelihood.elbo import antithetic_probes, elbo_probes

L, V = 4, 2
CONTEXT = torch.tensor([0])
CAUSAL = [[i] for i in range(L)]


def estimates(policy: TabularDenoiser, antithetic: bool) -> Tensor:
    """``[plans, L * L!]`` the estimate for every outcome of the random numbers, in float64."""
    plans, uniforms = all_outcomes(L, V), every_size_and_order(L)
    trace = scheduled_trace(plans.repeat_interleave(len(uniforms), 0), CAUSAL, V)
    elbo = make_likelihood("elbo", draws=2 if antithetic else 1, antithetic=antithetic)
    probes = elbo.draw(trace, uniforms.repeat(len(plans), 1)[:, None])
    with torch.no_grad():
        return elbo(policy, CONTEXT, trace, probes).logp.sum(1).view(len(plans), -1)


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_unbiased_for_the_bound_and_below_log_p(seed: int, antithetic: bool) -> None:
    policy = TabularDenoiser(1, L, V, seed=seed)
    mean = estimates(policy, antithetic).mean(1)
    bound = torch.tensor([lower_bound(policy, plan) for plan in all_outcomes(L, V).tolist()], dtype=torch.float64)
    torch.testing.assert_close(mean, bound, rtol=0, atol=1e-10)
    exact = torch.tensor([random_order_logp(policy, plan) for plan in all_outcomes(L, V).tolist()])
    gap = exact - mean
    assert float(gap.min()) > 0.01
    # Not trivially low either: tokens that do not depend on each other leave no gap.
    alone = TabularDenoiser(1, L, V, seed=seed, coupled=False)
    plain = torch.tensor([lower_bound_alone(alone, plan) for plan in all_outcomes(L, V).tolist()], dtype=torch.float64)
    torch.testing.assert_close(estimates(alone, antithetic).mean(1), plain, rtol=0, atol=1e-10)


def lower_bound_alone(policy: TabularDenoiser, plan: list[int]) -> float:
    table = policy.table[0, 0].detach().log_softmax(-1)
    return sum(float(table[i, token]) for i, token in enumerate(plan))


@pytest.mark.parametrize(("coupling", "share"), [(0.1, 0.5), (0.5, 0.85)])
def test_pairs_vary_less_than_two_independent_masks(coupling: float, share: float) -> None:
    # A pair scores every token, so what it saves is the noise of leaving some out. The stronger tokens depend on each
    # other, the more noise comes from what they are scored under, which no pairing takes away.
    old, new = coupled_model(0, coupling, vocab=V), coupled_model(1, coupling, vocab=V, base=101)
    for two in (False, True):
        single, paired = (
            (estimates(new, kind) - two * estimates(old, kind)).var(1, correction=0).mean() for kind in (False, True)
        )
        assert float(paired) < share * float(single) / 2


def test_weights_by_hand() -> None:
    # u = 0.3 of L = 4 hides floor(1.2) + 1 = 2 positions, those of the smallest numbers: 3 and 1.
    uniforms = torch.tensor([[[0.3, 0.8, 0.2, 0.9, 0.1]]])
    plain = elbo_probes(uniforms)
    assert plain.hidden.tolist() == [[[False, True, False, True]]]
    assert plain.weight.tolist() == [[[0.0, 2.0, 0.0, 2.0]]]  # L / l
    pair = antithetic_probes(uniforms)
    assert pair.hidden[1].tolist() == [[True, False, True, False]]
    assert pair.weight.tolist() == [[[0.0, 1.0, 0.0, 1.0]], [[1.0, 0.0, 1.0, 0.0]]]  # L / 2l and L / 2(L - l)
    everything = antithetic_probes(torch.tensor([[[0.99, 0.8, 0.2, 0.9, 0.1]]]))
    assert everything.weight.tolist() == [[[1.0] * 4], [[0.0] * 4]]  # not 1/2: its complement is never drawn


def test_draws_are_averaged() -> None:
    policy = TabularDenoiser(1, L, V, seed=0)
    uniforms = every_size_and_order(L)[[3, 30, 77]]
    plan = [1, 0, 1, 1]
    trace = scheduled_trace(torch.tensor([plan]), CAUSAL, V)
    elbo = make_likelihood("elbo", draws=3)
    assert elbo.probe_shape(L) == (3, 1 + L)
    probes = elbo.draw(trace, uniforms[None])
    expected = 0.0
    for row in uniforms.tolist():
        size = math.floor(row[0] * L) + 1
        mask = tuple(number in sorted(row[1:])[:size] for number in row[1:])
        expected += L / size * sum(hidden_logp(policy, plan, mask)) / 3
    assert elbo(policy, CONTEXT, trace, probes).logp.sum().item() == pytest.approx(expected, abs=1e-12)
