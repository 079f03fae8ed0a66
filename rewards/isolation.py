"""Calling a function on many rows so that a row it fails on is lost alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from rewards.carriers import FailureKind
from rewards.partly_scored import PartlyScoredError

__all__ = ["OutputError", "call_isolated", "describe_error"]

RowFunction = Callable[[NDArray[np.int64]], NDArray[np.float64]]


class OutputError(ValueError):
    """A function returned something that cannot be its values; calling it on fewer rows would not help."""


def describe_error(error: Exception) -> str:
    """Type and first line of the message, short enough to print by the row."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def call_isolated(
    function: RowFunction, rows: NDArray[np.int64], width: int
) -> tuple[NDArray[np.float64], dict[int, tuple[FailureKind, str]]]:
    """``function(rows)``; where it raises, the rows are halved until only those that it fails on are lost.

    Args:
        function: Takes ``[n]`` row indices, returns ``[n, width]``; a row's values must not depend on the other rows.
        rows: ``[n]``, n >= 1.
        width: Columns of the result.

    Returns:
        ``[n, width]`` values, NaN where the function failed, and kind and reason by row index. A result of another
        shape or type loses all rows at once, without further calls; PartlyScoredError says itself which rows are lost.
    """
    try:
        try:
            values, failures = function(rows), {}
        except PartlyScoredError as partly:
            values, failures = partly.values, partly.failures
        return _checked(values, len(rows), width), {int(rows[i]): failure for i, failure in failures.items()}
    except OutputError as error:
        reason = str(error)
        return np.full((len(rows), width), np.nan), {int(row): ("wrong_output", reason) for row in rows}
    except Exception as error:  # user code may raise anything; what it raises becomes data
        if len(rows) == 1:
            return np.full((1, width), np.nan), {int(rows[0]): ("raised", describe_error(error))}
    half = len(rows) // 2
    left, left_failures = call_isolated(function, rows[:half], width)
    right, right_failures = call_isolated(function, rows[half:], width)
    return np.concatenate([left, right]), left_failures | right_failures


def _checked(values: object, count: int, width: int) -> NDArray[np.float64]:
    """`values` as float64 ``[count, width]``; a single column may come as ``[count]``."""
    array = np.asarray(values)
    if array.dtype.kind not in "fiub":
        raise OutputError(f"returned {type(values).__name__} of type {array.dtype}, not numbers")
    if array.shape not in ((count, width), *([(count,)] if width == 1 else [])):
        raise OutputError(f"returned shape {list(array.shape)} for {count} rows")
    return array.astype(np.float64).reshape(count, width)
