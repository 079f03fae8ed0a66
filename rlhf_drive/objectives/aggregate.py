"""How per-token terms become one number: mean over sequences, over tokens, or over a fixed length.

Every denominator is a count over the whole optimisation batch, never over the micro-batch at hand, so that the losses
(and gradients) of the micro-batches add up to those of the full batch, however it was split. `bnpo` alone is defined
by the micro-batch and depends on the split.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

__all__ = ["AGGREGATIONS", "Aggregation", "Denominators", "aggregate", "count_denominators"]

Aggregation = Literal["grpo", "bnpo", "dapo", "dr_grpo", "luspo"]
AGGREGATIONS: tuple[str, ...] = get_args(Aggregation)


@dataclass(frozen=True)
class Denominators:
    """Counts over the whole optimisation batch (all micro-batches, all processes)."""

    sequences: float
    """Number of rows that are learned from."""
    tokens: float
    """Number of scored tokens in those rows."""
    max_length: int
    """Largest number of scored tokens a row can have (`L` for a policy that scores each action token once)."""
    micro_batches: int = 1
    """Micro-batches the batch is split into; `bnpo` is a mean over them."""


def count_denominators(
    mask: Tensor, rows: Tensor | None = None, *, max_length: int, micro_batches: int = 1
) -> Denominators:
    """Denominators of a batch that is held as a whole.

    Args:
        mask: ``[N, T]`` bool, scored tokens.
        rows: ``[N]`` bool, rows that are learned from; None means all.
        max_length: Largest number of scored tokens a row can have.
        micro_batches: Micro-batches the batch is split into.

    Example:
        >>> mask = torch.tensor([[True, True], [True, False], [True, True]])
        >>> count_denominators(mask, torch.tensor([True, True, False]), max_length=2)
        Denominators(sequences=2.0, tokens=3.0, max_length=2, micro_batches=1)
    """
    if rows is None:
        rows = torch.ones(mask.shape[0], dtype=torch.bool, device=mask.device)
    tokens = (mask & rows[:, None]).sum()
    return Denominators(float(rows.sum()), float(tokens), max_length, micro_batches)


def aggregate(
    terms: Tensor, mask: Tensor, aggregation: Aggregation, denominators: Denominators, weight: Tensor | None = None
) -> Tensor:
    """Sum of `terms` over scored tokens, weighted as `aggregation` says.

    * ``grpo``: mean over a row's tokens, then over rows.
    * ``dapo`` (2503.14476): every token of the batch weighs the same.
    * ``dr_grpo`` (2503.20783): sum over ``sequences * max_length``, so length carries no weight.
    * ``luspo`` (2602.05261): sum over a row's tokens, mean over rows.
    * ``bnpo``: mean over the micro-batch's tokens, then over micro-batches, as in TRL. It depends on the split.

    Args:
        terms: ``[N, T]`` or ``[N, 1]`` (the same term for each token of a row).
        mask: ``[N, T]`` bool; False for unscored tokens and for all tokens of rows that are not learned from.
        aggregation: One of `AGGREGATIONS`.
        denominators: Counts over the whole optimisation batch.
        weight: ``[N, T]``, factors on the terms (`LossInputs.weight`); they change no count. None means 1.

    Returns:
        Scalar; the full batch's value is the sum over its micro-batches. Zero where nothing is scored.
    """
    row_sums = torch.where(mask, terms if weight is None else terms * weight, 0.0).sum(-1)
    if aggregation == "grpo":
        row_sums = row_sums / mask.sum(-1).clamp(min=1)
    total = row_sums.sum()
    if aggregation == "bnpo":
        return total / mask.sum().clamp(min=1) / denominators.micro_batches
    if aggregation == "dapo":
        return total / max(denominators.tokens, 1.0)
    if aggregation == "dr_grpo":
        return total / max(denominators.sequences * denominators.max_length, 1.0)
    return total / max(denominators.sequences, 1.0)
