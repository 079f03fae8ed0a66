"""Random masks: the mean over hidden tokens, evenly spaced shares, and how they differ from the lower bound."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from oracles.bounds import hidden_logp, lower_bound
from oracles.tabular import TabularDenoiser, scheduled_trace
from torch import Tensor

from rlhf_drive.likelihood import make_likelihood
from rlhf_drive.likelihood.random_mask import random_mask_probes

L, V = 3, 3
CONTEXT = torch.tensor([0])
CAUSAL = [[i] for i in range(L)]


def test_by_hand() -> None:
    policy = TabularDenoiser(1, L, V, seed=0)
    plan = [2, 0, 1]
    trace = scheduled_trace(torch.tensor([plan]), CAUSAL, V)
    likelihood = make_likelihood("random_mask")
    # The share 0.5 hides the positions whose number lies below: 0 and 2.
    probes = likelihood.draw(trace, torch.tensor([[[0.5, 0.4, 0.7, 0.1]]], dtype=torch.float64))
    found = likelihood(policy, CONTEXT, trace, probes)
    hidden = hidden_logp(policy, plan, (True, False, True))
    # UniGRPO's log-probability per token is the mean over hidden tokens, and so is the mean of our L slots.
    assert found.logp.mean().item() == pytest.approx(sum(hidden) / 2, abs=1e-12)
    assert bool(found.mask.all())
    assert float(found.logp[0, 1]) == 0.0


def every_outcome() -> Tensor:
    """``[(L + 1) * L!, 1, 1 + L]``: the share's place among the positions' numbers, and their order, each once."""
    rows = [
        [[(s + 0.5) / (L + 1), *((place + 1) / (L + 1) for place in order)]]
        for s in range(L + 1)
        for order in itertools.permutations(range(L))
    ]
    return torch.tensor(rows, dtype=torch.float64)


def test_mean_by_enumeration_and_not_the_lower_bound() -> None:
    policy = TabularDenoiser(1, L, V, seed=0)
    plan = [0, 1, 2]
    uniforms = every_outcome()
    trace = scheduled_trace(torch.tensor([plan]).expand(len(uniforms), -1), CAUSAL, V)
    likelihood = make_likelihood("random_mask")
    mean = float(likelihood(policy, CONTEXT, trace, likelihood.draw(trace, uniforms)).logp.sum(1).mean())
    # 0 … L hidden tokens are equally likely; none counts as one.
    expected = 0.0
    for size in range(L + 1):
        sets = list(itertools.combinations(range(L), max(size, 1)))
        for chosen in sets:
            logp = hidden_logp(policy, plan, tuple(i in chosen for i in range(L)))
            expected += L / len(chosen) * sum(logp) / len(sets) / (L + 1)
    assert mean == pytest.approx(expected, abs=1e-10)
    assert abs(mean - lower_bound(policy, plan)) > 0.01


def test_draws_are_evenly_spaced_shares() -> None:
    length, draws = 100, 4
    position = (torch.arange(length) + 0.5) / length
    uniforms = torch.cat([torch.tensor([0.37]), position]).expand(1, draws, -1)
    probes = random_mask_probes(uniforms)
    # Shares 0.37, 0.62, 0.87 and 1.12 - 1: a random number of each draw's own would not be so spaced.
    assert probes.hidden.sum(-1).flatten().tolist() == [37, 62, 87, 12]
    torch.testing.assert_close(probes.weight.sum(-1), torch.full((draws, 1), length / draws), rtol=1e-5, atol=0)


def test_something_is_always_hidden() -> None:
    probes = random_mask_probes(torch.tensor([[[0.0, 0.3, 0.2, 0.9]]]))
    assert probes.hidden.tolist() == [[[False, True, False]]]
    assert probes.weight.tolist() == [[[0.0, 3.0, 0.0]]]
    assert math.isfinite(float(probes.weight.sum()))
