"""How a reward says which of its rows it could not score, and why."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from rewards.carriers import FailureKind

__all__ = ["PartlyScoredError", "RowResult", "gather_rows"]

RowResult = float | tuple[FailureKind, str]
"""What a reward found for one row: a value, or kind and reason of the failure."""


class PartlyScoredError(Exception):
    """Raised by a reward that has values for some rows and reasons for the others.

    Calling the reward on fewer rows would not help: whoever catches this takes `values` as they are.
    """

    def __init__(self, values: NDArray[np.float64], failures: Mapping[int, tuple[FailureKind, str]]) -> None:
        """Give the values and the reasons.

        Args:
            values: ``[N]``; NaN in the rows that failed.
            failures: Kind and reason by row, counted within this call.
        """
        super().__init__(values, failures)
        self.values = values
        """``[N]``."""
        self.failures = dict(failures)
        """Kind and reason by row."""

    def __str__(self) -> str:
        reasons = list(dict.fromkeys(reason for _, reason in self.failures.values()))
        return "; ".join(reasons[:3]) + (" …" if len(reasons) > 3 else "")


def gather_rows(results: list[RowResult]) -> NDArray[np.float64]:
    """The values ``[N]`` of N rows.

    Raises:
        PartlyScoredError: Some row has a failure instead.
    """
    values = np.array([result if isinstance(result, float) else np.nan for result in results], dtype=np.float64)
    failures = {row: result for row, result in enumerate(results) if not isinstance(result, float)}
    if failures:
        raise PartlyScoredError(values, failures)
    return values
