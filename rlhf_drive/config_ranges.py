"""Ranges of a recipe's numbers, beside their types."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

__all__ = [
    "ACTION_TOKENS",
    "Bounds",
    "Count",
    "CountOrZero",
    "NotNegative",
    "OpenShare",
    "Order",
    "Positive",
    "Share",
]

ACTION_TOKENS = 16
"""L: tokens of a plan, 8 poses of two numbers each; a decode reveals at least one per step, so K <= L."""


@dataclass(frozen=True)
class Bounds:
    """Range of a number: ``low <= x <= high``, or strict where `open` says so."""

    low: float = float("-inf")
    """Smallest value."""
    high: float = float("inf")
    """Largest value."""
    open: Literal["", "low", "high", "both"] = ""
    """Which of the two ends is itself excluded."""

    def problem(self, value: float) -> str:
        """Empty when `value` lies inside, else what it should have been."""
        above = value > self.low if self.open in ("low", "both") else value >= self.low
        below = value < self.high if self.open in ("high", "both") else value <= self.high
        if above and below:
            return ""
        ends = []
        if self.low != float("-inf"):
            ends.append(f"{'greater than' if self.open in ('low', 'both') else 'at least'} {self.low:g}")
        if self.high != float("inf"):
            ends.append(f"{'less than' if self.open in ('high', 'both') else 'at most'} {self.high:g}")
        return f"must be {' and '.join(ends)}; got {value!r}"


Positive = Annotated[float, Bounds(0.0, open="low")]
NotNegative = Annotated[float, Bounds(0.0)]
Share = Annotated[float, Bounds(0.0, 1.0)]
OpenShare = Annotated[float, Bounds(0.0, 1.0, open="both")]
Count = Annotated[int, Bounds(1)]
CountOrZero = Annotated[int, Bounds(0)]
Order = Literal["causal", "reverse_causal", "random", "confidence", "all"]
