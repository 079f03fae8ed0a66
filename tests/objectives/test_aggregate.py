"""Aggregations by hand on rows of unequal length."""

from __future__ import annotations

import pytest
import torch

from rlhf_drive.objectives import Denominators, count_denominators
from rlhf_drive.objectives.aggregate import Aggregation, aggregate

NAN = float("nan")
MASK = torch.tensor([[True, True, True], [True, False, False], [True, True, False]])
TERMS = torch.tensor([[1.0, 2.0, 6.0], [5.0, NAN, NAN], [4.0, 8.0, NAN]])


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [
        ("grpo", (9 / 3 + 5 / 1 + 12 / 2) / 3),
        ("dapo", (9 + 5 + 12) / 6),
        ("dr_grpo", (9 + 5 + 12) / (3 * 4)),
    ],
)
def test_by_hand_and_split(loss_type: Aggregation, expected: float) -> None:
    denominators = count_denominators(MASK, max_length=4)
    assert denominators == Denominators(sequences=3.0, tokens=6.0, max_length=4)
    assert float(aggregate(TERMS, MASK, loss_type, denominators)) == pytest.approx(expected, abs=1e-6)
    parts = [aggregate(TERMS[i : i + 1], MASK[i : i + 1], loss_type, denominators) for i in range(3)]
    assert float(sum(parts)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("loss_type", "expected"), [("grpo", 5.0), ("dapo", (3 * 3 + 5 + 7 * 2) / 6), ("dr_grpo", 28 / 12)]
)
def test_one_term_a_row_counts_for_each_of_its_tokens(loss_type: Aggregation, expected: float) -> None:
    value = aggregate(torch.tensor([[3.0], [5.0], [7.0]]), MASK, loss_type, count_denominators(MASK, max_length=4))
    assert float(value) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_nothing_scored_is_zero(loss_type: Aggregation) -> None:
    mask = torch.zeros_like(MASK)
    rows = torch.zeros(3, dtype=torch.bool)
    denominators = count_denominators(mask, rows, max_length=4)
    assert denominators == Denominators(0.0, 0.0, 4)
    assert float(aggregate(TERMS, mask, loss_type, denominators)) == 0.0
