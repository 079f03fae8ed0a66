"""Work of a group of processes that succeeds on all of them or fails on all of them, with one error."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import TypeVar

from rlhf_drive.errors import RlhfDriveError, TrainingError
from rlhf_drive.training.ranks import Ranks

__all__ = ["on_all", "on_main"]

T = TypeVar("T")


def on_main(ranks: Ranks, function: Callable[[], T]) -> T:
    """``function()`` of the main process, on every process: its result, or its error. All must call this.

    Without it, an error on the main process would leave the others waiting for it until they time out.

    Args:
        ranks: The processes.
        function: What only one may do, such as writing files; gives back a small plain value.

    Example:
        >>> on_main(Ranks(), lambda: "written")
        'written'
    """
    if ranks.count == 1:
        return function()
    result: T | None = None
    own: Exception | None = None
    if ranks.main:
        try:
            result = function()
        except Exception as error:
            own = error
    told, failed = ranks.first((result, _sendable(own)))
    if own is not None:
        raise own
    if failed is not None:
        raise failed
    return told  # type: ignore[return-value]


def on_all(ranks: Ranks, function: Callable[[], T]) -> T:
    """``function()`` of each process for itself; if it fails on any, it fails on all with the first one's error."""
    if ranks.count == 1:
        return function()
    result: T | None = None
    own: Exception | None = None
    try:
        result = function()
    except Exception as error:
        own = error
    failed = [error for error in ranks.gather(_sendable(own)) if error is not None]
    if own is not None:
        raise own
    if failed:
        raise failed[0]
    return result  # type: ignore[return-value]


def _sendable(error: Exception | None) -> Exception | None:
    """The error as another process can read it."""
    if error is None or isinstance(error, RlhfDriveError):
        return error
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return TrainingError(f"Another process failed: {type(error).__name__}: {error}")
    return error
