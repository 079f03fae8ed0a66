"""How per-token terms become one number: mean over sequences, over tokens, or over a fixed length.

Every denominator is a count over the whole optimisation batch, never over the micro-batch at hand, so that the losses
(and gradients) of the micro-batches add up to those of the full batch, however it was split.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

__all__ = ["LOSS_TYPES", "Denominators", "LossType", "aggregate", "count_denominators"]

LossType = Literal["grpo", "dapo", "dr_grpo"]
LOSS_TYPES: tuple[str, ...] = get_args(LossType)


@dataclass(frozen=True)
class Denominators:
    """Counts over the whole optimisation batch (all micro-batches, all processes)."""

    sequences: float
    """Number of rows that are learned from."""
    tokens: float
    """Number of scored tokens in those rows."""
    max_length: int
    """Largest number of scored tokens a row can have (`L` for a policy that scores each action token once)."""


def count_denominators(mask: Tensor, rows: Tensor | None = None, *, max_length: int) -> Denominators:
    """Denominators of a batch that is held as a whole.

    Args:
        mask: ``[N, T]`` bool, scored tokens.
        rows: ``[N]`` bool, rows that are learned from; None means all.
        max_length: Largest number of scored tokens a row can have.

    Example:
        >>> mask = torch.tensor([[True, True], [True, False], [True, True]])
        >>> count_denominators(mask, torch.tensor([True, True, False]), max_length=2)
        Denominators(sequences=2.0, tokens=3.0, max_length=2)
    """
    if rows is None:
        rows = torch.ones(mask.shape[0], dtype=torch.bool, device=mask.device)
    tokens = (mask & rows[:, None]).sum()
    return Denominators(sequences=float(rows.sum()), tokens=float(tokens), max_length=max_length)


def aggregate(terms: Tensor, mask: Tensor, loss_type: LossType, denominators: Denominators) -> Tensor:
    """Sum of `terms` over scored tokens, weighted as `loss_type` says.

    ``grpo``: mean over a row's tokens, then over rows. ``dapo``: every token of the batch weighs the same
    (2503.14476). ``dr_grpo``: sum over ``sequences * max_length`` (2503.20783), so length carries no weight.

    Args:
        terms: ``[N, T]`` or ``[N, 1]`` (the same term for each token of a row).
        mask: ``[N, T]`` bool; False for unscored tokens and for all tokens of rows that are not learned from.
        loss_type: One of `LOSS_TYPES`.
        denominators: Counts over the whole optimisation batch.

    Returns:
        Scalar; the full batch's value is the sum over its micro-batches. Zero where nothing is scored.
    """
    row_sums = torch.where(mask, terms, 0.0).sum(-1)
    if loss_type == "grpo":
        return (row_sums / mask.sum(-1).clamp(min=1)).sum() / max(denominators.sequences, 1.0)
    if loss_type == "dapo":
        return row_sums.sum() / max(denominators.tokens, 1.0)
    return row_sums.sum() / max(denominators.sequences * denominators.max_length, 1.0)
