"""The tempered log-probability by hand."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_drive.likelihood import tempered_logp

LOGITS = torch.tensor([[3.0, 2.0, 2.0, -1.0]])


@pytest.mark.parametrize(
    ("action", "temperature", "top_k", "expected"),
    [
        (0, 1.0, 0, 3 - math.log(math.exp(3) + 2 * math.exp(2) + math.exp(-1))),
        (3, 2.0, 0, -0.5 - math.log(math.exp(1.5) + 2 * math.exp(1) + math.exp(-0.5))),
        (0, 1.0, 1, 0.0),
        # Both tokens of the tie at the second place stay, as in sampling.
        (1, 1.0, 2, 2 - math.log(math.exp(3) + 2 * math.exp(2))),
        (2, 1.0, 2, 2 - math.log(math.exp(3) + 2 * math.exp(2))),
        # The action has dropped out of the live top-k: it alone is added, not what lies between.
        (3, 1.0, 1, -1 - math.log(math.exp(3) + math.exp(-1))),
        (3, 1.0, 9, -1 - math.log(math.exp(3) + 2 * math.exp(2) + math.exp(-1))),
    ],
)
def test_by_hand(action: int, temperature: float, top_k: int, expected: float) -> None:
    value = tempered_logp(LOGITS, torch.tensor([action]), temperature, top_k)
    assert float(value) == pytest.approx(expected, abs=1e-6)


def test_half_precision_logits_are_reduced_in_float32() -> None:
    logits = torch.randn(16, 500, generator=torch.Generator().manual_seed(0)).bfloat16()
    action = torch.arange(16)
    value = tempered_logp(logits, action, 1.3, 0)
    exact = torch.log_softmax(logits.double() / 1.3, -1)[torch.arange(16), action]
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), exact, rtol=0, atol=2e-6)


@pytest.mark.parametrize("action", [0, 3])
def test_gradient_stays_inside_the_support(action: int) -> None:
    logits = LOGITS.clone().requires_grad_()
    tempered_logp(logits, torch.tensor([action]), 1.0, 1).sum().backward()
    # Support {0} for action 0: log 1. Support {0, 3} for action 3: one-hot minus softmax over the two.
    p3 = math.exp(-1) / (math.exp(3) + math.exp(-1))
    expected = [0.0, 0.0, 0.0, 0.0] if action == 0 else [p3 - 1, 0.0, 0.0, 1 - p3]
    torch.testing.assert_close(logits.grad, torch.tensor([expected]), rtol=0, atol=1e-6)


def test_far_tokens_cost_no_accuracy() -> None:
    """Logits of a narrow distribution over many numbers fall to minus tens of thousands."""
    offset = torch.linspace(-25.0, 25.0, 501, dtype=torch.float64)
    logits = (-0.5 * (offset / torch.tensor([[0.05], [0.3], [2.0]])).square()).requires_grad_()
    action = torch.tensor([250, 0, 260])  # at the peak, at -3472 nats, near the peak
    value = tempered_logp(logits, action, 1.0, 0)
    exact = torch.log_softmax(logits, -1)[torch.arange(3), action]
    torch.testing.assert_close(value, exact, rtol=1e-14, atol=1e-14)
    (found,) = torch.autograd.grad(value.sum(), logits)
    (expected,) = torch.autograd.grad(exact.sum(), logits)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
