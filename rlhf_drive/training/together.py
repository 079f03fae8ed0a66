"""Work that one process does for all, or each does a part of, with errors that reach everybody.

A process that raised alone would leave the others waiting for it until their time is up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from rlhf_drive.errors import RlhfDriveError, TrainingError
from rlhf_drive.training.ranks import Ranks

__all__ = ["by_all", "by_main"]

T = TypeVar("T")


def by_main(ranks: Ranks, work: Callable[[], T]) -> T:
    """What `work` gives on the main process, on all of them; it runs nowhere else.

    Raises:
        RlhfDriveError: What `work` raised, on every process; a TrainingError in place of other errors.
    """
    if ranks.count == 1:
        return work()
    result, error = _tried(work) if ranks.main else (None, None)
    result, error = ranks.first((result, error))
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def by_all(ranks: Ranks, work: Callable[[], T]) -> list[T]:
    """What `work` gives on each process, in their order, on all of them.

    Raises:
        RlhfDriveError: What the first process that failed raised, on every process; a TrainingError in place of others.
    """
    if ranks.count == 1:
        return [work()]
    found = ranks.gather(_tried(work))
    for _, error in found:
        if error is not None:
            raise error
    return [result for result, _ in found]  # type: ignore[misc]


def _tried(work: Callable[[], T]) -> tuple[T | None, RlhfDriveError | None]:
    """The result, or an error that can be pickled."""
    try:
        return work(), None
    except RlhfDriveError as error:
        return None, error
    except Exception as error:  # a defect: its own class may not survive the way to the others
        import traceback

        return None, TrainingError("".join(traceback.format_exception(error)))
