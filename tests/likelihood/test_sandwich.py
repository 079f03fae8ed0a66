"""Both bounds against log p by enumeration, and which one a rollout gets."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from oracles.bounds import every_size_and_order, lower_bound, random_order_logp, renyi_bound
from oracles.tabular import TabularDenoiser, all_outcomes, scheduled_trace
from torch import Tensor

from rlhf_drive.errors import DataError
from rlhf_drive.likelihood import Probes, make_likelihood
from rlhf_drive.likelihood.sandwich import BETA, MIX, upper_bound

L, V = 3, 2
CONTEXT = torch.tensor([0])
CAUSAL = [[i] for i in range(L)]
PLANS = all_outcomes(L, V)


def all_draws(policy: TabularDenoiser) -> tuple[Tensor, Probes]:
    """``[P, plans, L]`` log-probabilities under every mask with its exact weight, and the probes."""
    uniforms = every_size_and_order(L)
    trace = scheduled_trace(PLANS, CAUSAL, V)
    elbo = make_likelihood("elbo", draws=len(uniforms))
    probes = elbo.draw(trace, uniforms.expand(len(PLANS), -1, -1))
    logp = []
    for p in range(len(uniforms)):
        one = Probes(probes.hidden[p : p + 1], probes.hidden[p : p + 1].double())
        logp.append(elbo(policy, CONTEXT, trace, one).logp)
    return torch.stack(logp).detach(), probes


@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("seed", [0, 3])
def test_bounds_enclose_log_p(seed: int, scale: float) -> None:
    policy = TabularDenoiser(1, L, V, seed=seed, scale=scale)
    logp, probes = all_draws(policy)
    exact = torch.tensor([random_order_logp(policy, plan) for plan in PLANS.tolist()], dtype=torch.float64)
    upper = {beta: upper_bound(logp, probes, beta).sum(1) for beta in (1.0, BETA, float(L), 20.0)}
    lower = (logp * probes.weight).sum((0, 2))
    for beta, value in upper.items():
        by_hand = [renyi_bound(policy, plan, beta) for plan in PLANS.tolist()]
        torch.testing.assert_close(value, torch.tensor(by_hand, dtype=torch.float64), rtol=0, atol=1e-10)
    by_hand = [lower_bound(policy, plan) for plan in PLANS.tolist()]
    torch.testing.assert_close(lower, torch.tensor(by_hand, dtype=torch.float64), rtol=0, atol=1e-10)
    # Beta = L is a bound for certain (Hölder), with no constant left out, and larger orders lie above it.
    assert float((exact - lower).min()) > 0
    assert float((upper[float(L)] - exact).min()) > 0
    assert bool((upper[1.0] < upper[BETA]).all() & (upper[BETA] < upper[L]).all() & (upper[L] < upper[20.0]).all())


def test_a_small_order_is_no_bound_for_certain() -> None:
    # Strong coupling: tokens are likely together, in the same states.
    policy = TabularDenoiser(1, L, V, seed=3, scale=4.0)
    logp, probes = all_draws(policy)
    exact = torch.tensor([random_order_logp(policy, plan) for plan in PLANS.tolist()], dtype=torch.float64)
    assert float((upper_bound(logp, probes, BETA).sum(1) - exact).min()) < -0.2
    assert float((upper_bound(logp, probes, 1.0).sum(1) - exact).min()) < -0.5


def test_no_constant_is_missing_where_tokens_are_independent() -> None:
    policy = TabularDenoiser(1, L, V, seed=1, coupled=False)
    logp, probes = all_draws(policy)
    exact = policy.table[0, 0].log_softmax(-1)[torch.arange(L), PLANS].sum(1).detach()
    for beta in (1.0, BETA, 7.0):
        torch.testing.assert_close(upper_bound(logp, probes, beta).sum(1), exact, rtol=0, atol=1e-10)
    torch.testing.assert_close((logp * probes.weight).sum((0, 2)), exact, rtol=0, atol=1e-10)


def test_the_sign_of_the_advantage_chooses_the_bound() -> None:
    policy = TabularDenoiser(1, L, V, seed=0)
    trace = scheduled_trace(PLANS, CAUSAL, V)
    sandwich = make_likelihood("sandwich", draws=2, antithetic=True)
    assert not sandwich.has_ratio
    shape = sandwich.probe_shape(L)
    assert shape == (1, 1 + L)
    uniforms = torch.rand(len(PLANS), *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    probes = sandwich.draw(trace, uniforms)
    with pytest.raises(DataError, match="negative"):
        sandwich(policy, CONTEXT, trace, probes)
    negative = torch.arange(len(PLANS)) % 2 == 0
    logp = sandwich(policy, CONTEXT, trace, replace(probes, negative=negative)).logp
    elbo = make_likelihood("elbo", draws=2, antithetic=True)(policy, CONTEXT, trace, probes).logp
    assert torch.equal(logp[~negative], elbo[~negative])
    # Antithetic pairs score a token once, with weight w: the upper bound of the one value l is l + log(w) / beta.
    weight = probes.weight.sum(0)[negative]
    value = elbo[negative] / weight
    expected = MIX * (value + weight.log() / BETA) + (1 - MIX) * elbo[negative]
    torch.testing.assert_close(logp[negative], expected, rtol=0, atol=1e-12)


def test_tokens_that_no_probe_scores_give_nothing_and_no_bad_gradient() -> None:
    logp = torch.tensor([[[-1.0, 0.0]], [[-2.0, 0.0]]], requires_grad=True)
    weight = torch.tensor([[[0.5, 0.0]], [[0.5, 0.0]]])
    value = upper_bound(logp, Probes(weight > 0, weight), 1.0)
    assert value[0, 0].item() == pytest.approx(-1.37989, abs=1e-5)  # log((e^-1 + e^-2) / 2)
    assert value[0, 1].item() == 0.0
    value.sum().backward()
    # The likelier copy gets the larger share: e^-1 / (e^-1 + e^-2).
    torch.testing.assert_close(logp.grad, torch.tensor([[[0.73106, 0.0]], [[0.26894, 0.0]]]), rtol=0, atol=1e-5)
