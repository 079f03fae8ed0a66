"""Policy terms: values by hand, and on which side of the trust region the gradient lives."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlhf_drive.objectives.surrogates import (
    cispo_surrogate,
    clipped_surrogate,
    geometric_mean_weight,
    sapo_surrogate,
    weighted_likelihood,
)


def _column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


def _slope(value: Tensor, at: Tensor) -> list[float]:
    return [float(x) for x in torch.autograd.grad(value.sum(), at)[0].flatten()]


def test_two_sided_clipping_bounds_bad_rows_only() -> None:
    weight = _column(0.5, 1.5, 4.0, 0.5, 1.5, 4.0).requires_grad_()
    advantages = _column(1.0, 1.0, 1.0, -1.0, -1.0, -1.0)
    value = clipped_surrogate(weight, advantages, 0.2, 0.3, delta=2.0)
    # A > 0: min(w, 1.3). A < 0: -max(w, .8), but not below -2.
    assert value.flatten().tolist() == pytest.approx([0.5, 1.3, 1.3, -0.8, -1.5, -2.0])
    assert _slope(value, weight) == [1.0, 0.0, 0.0, 0.0, -1.0, 0.0]
    unbounded = clipped_surrogate(weight, advantages, 0.2, 0.3)
    assert unbounded.flatten().tolist() == pytest.approx([0.5, 1.3, 1.3, -0.8, -1.5, -4.0])


def test_cispo_caps_the_weight_and_keeps_every_gradient() -> None:
    logp = torch.tensor([[-1.0, -2.0, -3.0]], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[0.5, 2.0, 9.0]], dtype=torch.float64, requires_grad=True)
    value = cispo_surrogate(weight, _column(-1.5), logp, cap=3.0)
    assert value.flatten().tolist() == pytest.approx([0.75, 6.0, 13.5])
    assert _slope(value, logp) == pytest.approx([-0.75, -3.0, -4.5])
    (by_weight,) = torch.autograd.grad(
        cispo_surrogate(weight, _column(1.0), logp, cap=3.0).sum(), weight, allow_unused=True
    )
    assert by_weight is None


def test_sapo_has_the_slope_of_the_ratio_at_one_and_fades() -> None:
    weight = _column(1.0, 1.0, 3.0, 3.0, 3.0).requires_grad_()
    advantages = _column(2.0, -2.0, 2.0, -2.0, 0.0)
    value = sapo_surrogate(weight, advantages, 1.0, 3.0)
    slopes = _slope(value, weight)

    def gate(tau: float, w: float) -> float:
        sigmoid = 1 / (1 + math.exp(-tau * (w - 1)))
        return 4 * sigmoid * (1 - sigmoid)

    assert slopes == pytest.approx([2.0, -2.0, 2 * gate(1.0, 3.0), -2 * gate(3.0, 3.0), 0.0])
    assert abs(slopes[3]) < abs(slopes[2])  # the higher temperature fades faster
    assert value[0].item() == pytest.approx(2 * 4 / 1.0 / 2)


def test_gmpo_clips_tokens_in_log_space_on_one_side() -> None:
    log_ratio = torch.tensor([[0.5, -0.6, 0.1]] * 3, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(3, 3, dtype=torch.bool)
    weight = geometric_mean_weight(log_ratio, _column(1.0, -1.0, 0.0), mask, epsilon=0.2, epsilon_high=0.4)
    up, down = math.exp((0.4 - 0.6 + 0.1) / 3), math.exp((0.5 - 0.2 + 0.1) / 3)
    assert weight.flatten().tolist() == pytest.approx([up, down, down])
    slopes = _slope(weight[:2], log_ratio)
    # The token beyond the bound is stopped, the others of its row go on.
    assert slopes[:6] == pytest.approx([0.0, up / 3, up / 3, down / 3, 0.0, down / 3])


def test_gmpo_counts_scored_tokens_only() -> None:
    log_ratio = torch.tensor([[0.1, 0.3, 0.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False]])
    weight = geometric_mean_weight(log_ratio, _column(1.0), mask, epsilon=0.5, epsilon_high=0.5)
    assert weight.item() == pytest.approx(math.exp(0.2))


def test_weighted_likelihood_by_hand() -> None:
    """A = (log 3, 0): softmax (3/4, 1/4), of -A (1/4, 3/4). One row of three is left out; in the last group all are."""
    advantages = _column(math.log(3.0), 0.0, 7.0, 0.0, math.log(3.0), float("nan"), 1.0, 2.0, 3.0)
    rows = torch.tensor([True, True, False, True, True, False, False, False, False])
    weights = weighted_likelihood(advantages, rows, 3).flatten().tolist()
    assert weights == pytest.approx([2 * 0.5, -2 * 0.5, 0.0, -1.0, 1.0, 0.0, 0.0, 0.0, 0.0])


def test_weights_of_likelihood_add_up_to_nothing() -> None:
    advantages = torch.randn(12, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    groups = weighted_likelihood(advantages, torch.ones(12, dtype=torch.bool), 4).view(3, 4)
    torch.testing.assert_close(groups.sum(1), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)
    # In the order of the advantages.
    assert torch.equal(groups.argsort(1), advantages.view(3, 4).argsort(1))
