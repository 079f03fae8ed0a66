"""Importance weights by level, by hand on steps of unequal size."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_drive.objectives.importance import ImportanceSamplingLevel, log_importance, step_share

NAN = float("nan")
LOGP = torch.tensor([[0.1, 0.3, 0.5, NAN], [0.2, NAN, -0.4, 0.6]], dtype=torch.float64)
OLD = torch.zeros(2, 4, dtype=torch.float64)
MASK = LOGP.isfinite()
STEP_OF = torch.tensor([2, 0, 2, 0])
"""Steps out of order, one number (1) unused, one step of the first row with a single token."""


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        ("token", [[0.1, 0.3, 0.5, 0.0], [0.2, 0.0, -0.4, 0.6]]),
        ("step", [[0.3, 0.3, 0.3, 0.0], [-0.1, 0.0, -0.1, 0.6]]),
        ("sequence", [[0.9 / 3], [0.4 / 3]]),
        ("sequence_token", [[0.3, 0.3, 0.3, 0.0], [0.4 / 3, 0.0, 0.4 / 3, 0.4 / 3]]),
    ],
)
def test_by_hand(level: ImportanceSamplingLevel, expected: list[list[float]]) -> None:
    found = log_importance(LOGP, OLD, MASK, level, STEP_OF)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        # Derivative of the weight of slot 2 of row 0 by each log-probability of that row.
        ("token", [0.0, 0.0, 1.0, 0.0]),
        ("step", [0.5, 0.0, 0.5, 0.0]),
        ("sequence_token", [0.0, 0.0, 1.0, 0.0]),
    ],
)
def test_gradient_by_hand(level: ImportanceSamplingLevel, expected: list[float]) -> None:
    logp = LOGP.clone().requires_grad_()
    log_importance(logp, OLD, MASK, level, STEP_OF)[0, 2].backward()  # type: ignore[no-untyped-call]
    assert logp.grad is not None
    torch.testing.assert_close(logp.grad[0], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


def test_a_step_is_the_geometric_mean_of_its_ratios() -> None:
    found = log_importance(LOGP, OLD, MASK, "step", STEP_OF).exp()[1, 0].item()
    assert found == pytest.approx(math.sqrt(math.exp(0.2) * math.exp(-0.4)), abs=1e-12)


def test_without_steps_all_slots_are_one_step() -> None:
    step = log_importance(LOGP, OLD, MASK, "step", None)
    sequence = log_importance(LOGP, OLD, MASK, "sequence_token")
    torch.testing.assert_close(step, sequence, rtol=0, atol=1e-12)
    torch.testing.assert_close(step_share(MASK, None, torch.float64), MASK.double(), rtol=0, atol=0)


def test_one_token_a_step_is_the_token_level() -> None:
    step = log_importance(LOGP, OLD, MASK, "step", torch.arange(4))
    torch.testing.assert_close(step, log_importance(LOGP, OLD, MASK, "token"), rtol=0, atol=0)
    torch.testing.assert_close(step_share(MASK, torch.arange(4), torch.float64), MASK.double(), rtol=0, atol=0)


def test_shares_make_a_mean_over_steps() -> None:
    """Row 0: steps {0, 2} and {1}: shares 3/4, 3/2, 3/4. Row 1: {0, 2} and {3}."""
    shares = step_share(MASK, STEP_OF, torch.float64)
    assert shares.tolist() == [[0.75, 1.5, 0.75, 0.0], [0.75, 0.0, 0.75, 1.5]]
    terms = torch.tensor([1.0, 5.0, 2.0])
    assert (terms * shares[0, :3]).mean().item() == pytest.approx(((1 + 2) / 2 + 5) / 2, abs=1e-12)
