"""Coupled masks: the pair keeps the mean, scores every token, and over-scales."""

from __future__ import annotations

import math

import pytest
import torch
from oracles.bounds import Mask, hidden_logp
from oracles.tabular import TabularDenoiser, scheduled_trace
from torch import Tensor

from rlhf_drive.likelihood import make_likelihood, mean_field_logp
from rlhf_drive.likelihood.coupled import coupled_probes

L, V = 3, 3
CONTEXT = torch.tensor([0])
CAUSAL = [[i] for i in range(L)]
SHARES = [0.2 + 0.6 * (i + 0.5) / 6 for i in range(6)]
"""Shares t, spread evenly over their range, as ``1 - t`` is."""
MASKS: list[Mask] = [tuple(bool(bits >> i & 1) for i in range(L)) for bits in range(2**L)]


def every_pair() -> tuple[Tensor, list[float]]:
    """``[6 * 2^L, 1, 1 + L]`` uniform numbers that bring up every share and mask, and their probabilities."""
    rows, probability = [], []
    for t in SHARES:
        for mask in MASKS:
            rows.append([[(t - 0.2) / 0.6, *(t / 2 if hidden else (1 + t) / 2 for hidden in mask)]])
            probability.append(math.prod(t if hidden else 1 - t for hidden in mask) / len(SHARES))
    return torch.tensor(rows, dtype=torch.float64), probability


def expected_estimate(policy: TabularDenoiser, plan: list[int]) -> Tensor:
    """``[L]`` mean of the estimator's log-probabilities over shares and masks."""
    uniforms, probability = every_pair()
    trace = scheduled_trace(torch.tensor([plan]).expand(len(uniforms), -1), CAUSAL, V)
    coupled = make_likelihood("coupled")
    logp = coupled(policy, CONTEXT, trace, coupled.draw(trace, uniforms)).logp.detach()
    return (logp * torch.tensor(probability, dtype=torch.float64)[:, None]).sum(0)


@pytest.mark.parametrize("plan", [[0, 1, 2], [2, 2, 0]])
def test_coupling_keeps_the_mean_of_independent_masks(plan: list[int]) -> None:
    policy = TabularDenoiser(1, L, V, seed=0)
    # One mask at a time, nothing coupled: E[1(i hidden) / t * l_i], twice, and the all-masked term.
    single = [0.0] * L
    for t in SHARES:
        for mask in MASKS:
            p = math.prod(t if hidden else 1 - t for hidden in mask) / len(SHARES)
            for i, value in enumerate(hidden_logp(policy, plan, mask)):
                single[i] += p * value / t
    full = hidden_logp(policy, plan, (True,) * L)
    expected = [0.5 * (f + 2 * s) for f, s in zip(full, single, strict=True)]
    torch.testing.assert_close(
        expected_estimate(policy, plan), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-10
    )


def test_over_scales_by_one_and_a_half() -> None:
    # Without coupling between tokens every l_i is the same, so the weights' mean shows: (1 + 2) / 2.
    policy = TabularDenoiser(1, L, V, seed=0, coupled=False)
    plan = [0, 1, 2]
    exact, _ = mean_field_logp(policy, CONTEXT, scheduled_trace(torch.tensor([plan]), CAUSAL, V))
    torch.testing.assert_close(expected_estimate(policy, plan), 1.5 * exact[0].detach(), rtol=0, atol=1e-10)


def test_by_hand() -> None:
    # t = 0.2 + 0.6 * 0.5 = 0.5; only position 1 lies below.
    probes = coupled_probes(torch.tensor([[[0.5, 0.6, 0.1, 0.9]], [[0.0, 0.1, 0.3, 0.3]]]))
    assert probes.hidden[:, 0].tolist() == [[True] * 3, [False, True, False], [True, False, True]]
    torch.testing.assert_close(probes.weight[:, 0], torch.tensor([[0.5] * 3, [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]]))
    # t = 0.2: w = 1/t = 5 and 1/(1-t) = 1.25, both halved.
    torch.testing.assert_close(probes.weight[1:, 1], torch.tensor([[2.5, 0.0, 0.0], [0.0, 0.625, 0.625]]))


def test_every_draw_scores_every_token_and_draws_are_averaged() -> None:
    uniforms = torch.rand(50, 4, 1 + L, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    probes = coupled_probes(uniforms)
    assert len(probes.hidden) == 1 + 2 * 4
    assert bool(((probes.weight[1:5] > 0) ^ (probes.weight[5:] > 0)).all())
    assert bool((probes.hidden | (probes.weight == 0)).all())
    parts = torch.stack([coupled_probes(uniforms[:, j : j + 1]).weight.sum(0) for j in range(4)])
    torch.testing.assert_close(probes.weight.sum(0), parts.mean(0), rtol=0, atol=1e-12)
