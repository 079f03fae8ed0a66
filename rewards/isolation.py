"""Calling a function on many rows so that a row it fails on is lost alone, in bounded time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rewards.call_thread import CallStoppedError, CallTimeoutError, NoThreadError, WorkerDiedError
from rewards.carriers import FailureKind
from rewards.partly_scored import PartlyScoredError
from rlhf_drive.errors import describe_error

__all__ = ["GIVE_UP_AFTER", "Call", "OutputError", "Pace", "RowFailure", "call_here", "call_isolated", "describe_error"]

GIVE_UP_AFTER = 32
"""Limits of time that may be lost to calls that fail, in one :func:`call_isolated`."""
_LEAST_LIMIT_S = 0.25
RowFunction = Callable[[NDArray[np.int64]], object]
RowFailure = tuple[FailureKind, str]
"""Kind and reason."""
_Answer = tuple[NDArray[np.float64], dict[int, RowFailure]]
"""Values ``[n, width]`` and the failures that the function itself reports, by position."""


class OutputError(ValueError):
    """A function returned something that cannot be its values; calling it on fewer rows would not help."""


class Call(Protocol):
    """How a call is made: ``finish(work())``, somewhere."""

    def __call__(self, work: Callable[[], object], finish: Callable[[Any], _Answer]) -> _Answer:
        """What `finish` makes of the call; raises what the call raises, or that it was late or lost its thread."""
        ...


def call_here(work: Callable[[], object], finish: Callable[[Any], _Answer]) -> _Answer:
    """The call in the calling thread, without a limit."""
    try:
        return finish(work())
    except SystemExit as error:
        raise WorkerDiedError(describe_error(error)) from error


@dataclass
class Pace:
    """How many rows a function gets at a time, so that a call takes less than its limit.

    Starts with one row; doubles while calls take less than half the limit; halves when a call runs out of time. Kept
    from one :func:`call_isolated` to the next. Without a limit a function gets all rows at once.
    """

    timeout_s: float = 0.0
    """What one call may take; 0 = no limit."""
    rows: int = 1
    """Rows of the next call."""

    def share(self, count: int) -> int:
        """Rows of the next call if `count` are left."""
        return min(count, self.rows) if self.timeout_s else count

    def returned(self, count: int, seconds: float) -> None:
        """A call on `count` rows came back."""
        if count >= self.rows and seconds < self.timeout_s / 2:
            self.rows = 2 * count

    def ran_out(self, count: int) -> None:
        """A call on `count` rows did not come back in time."""
        self.rows = max(1, count // 2)


def call_isolated(
    function: RowFunction,
    rows: NDArray[np.int64],
    width: int,
    *,
    call: Call = call_here,
    pace: Pace | None = None,
) -> tuple[NDArray[np.float64], dict[int, RowFailure]]:
    """``function(rows)``; where it fails, the rows are halved until only those that it fails on are lost.

    A row is lost for good only by a call on that row alone, so what happens to a row does not depend on the rows it was
    called with: it counts as `timeout` if, alone, it takes longer than ``pace.timeout_s``, as `raised` if it raises,
    as `worker_died` if it ends its thread. A call on several rows has the same limit, and :class:`Pace` sees to it that
    honest functions keep it. To find one row that hangs among n costs at most ``1 + log2 n`` limits.

    With a limit, the time lost to calls that fail stays below ``GIVE_UP_AFTER + 1`` limits (of at least 0.25 s): then
    every row that has no result yet is given up as `timeout` without having been tried, and its reason says so. Without
    a limit, nothing bounds the time.

    Args:
        function: Takes ``[n]`` row indices, returns ``[n, width]``; a row's values must not depend on the other rows.
        rows: ``[n]``, n >= 1.
        width: Columns of the result.
        call: Where and under what limit the calls are made.
        pace: That limit, and how many rows a call gets; kept up to date.

    Returns:
        ``[n, width]`` values, NaN where the function failed, and kind and reason by row index. A result of another
        shape or type loses all rows of its call at once (`wrong_output`), without further calls; PartlyScoredError says
        itself which rows are lost.
    """
    search = _Search(function, rows, width, call, pace or Pace())
    search.run()
    return search.values, search.failures


@dataclass
class _Search:
    """One function on its way through the rows."""

    function: RowFunction
    rows: NDArray[np.int64]
    width: int
    call: Call
    pace: Pace
    values: NDArray[np.float64] = field(init=False)
    failures: dict[int, RowFailure] = field(default_factory=dict)
    timeouts: int = 0
    lost_s: float = 0.0
    refused: str = ""

    def __post_init__(self) -> None:
        self.values = np.full((len(self.rows), self.width), np.nan)
        self.todo: list[tuple[int, int, int]] = [(0, len(self.rows), -1)]
        """Spans that are left, the next one last: start, stop, and the number of timeouts at which the span is known to
        hold a row that hangs (its whole ran out of time and nothing before it has since), or -1."""

    def run(self) -> None:
        """Work through all spans."""
        while self.todo:
            start, stop, hangs_at = self.todo.pop()
            if reason := self._spent():
                self._lose(start, stop, "timeout", reason)
            elif hangs_at == self.timeouts and stop - start > 1:
                self._halve(start, stop, hangs_at)
            elif (share := self.pace.share(stop - start)) < stop - start:
                self.todo += [(start + share, stop, hangs_at), (start, start + share, -1)]
            else:
                self._try(start, stop)

    def _try(self, start: int, stop: int) -> None:
        """One call."""
        count, began = stop - start, time.monotonic()
        finish = partial(_checked, count=count, width=self.width)
        try:
            self._keep(start, stop, self._call(partial(self.function, self.rows[start:stop]), finish))
        except OutputError as error:
            self._lose(start, stop, "wrong_output", str(error))
        except NoThreadError as error:
            self.refused = f"given up untried: {error}"
            self._lose(start, stop, "timeout", self.refused)
            return
        except CallTimeoutError:
            self.timeouts += 1
            self.pace.ran_out(count)
            self._split(start, stop, began, "timeout", f"took longer than {self.pace.timeout_s:g} s")
            return
        except WorkerDiedError as error:
            self._split(start, stop, began, "worker_died", str(error))
            return
        except CallStoppedError:  # by whoever waits for the rows, so they are no matter of the function's
            raise
        except Exception as error:  # user code may raise anything; what it raises becomes data
            self._split(start, stop, began, "raised", describe_error(error))
            return
        self.pace.returned(count, time.monotonic() - began)

    def _call(self, work: Callable[[], object], finish: Callable[[Any], _Answer]) -> _Answer:
        try:
            return self.call(work, finish)
        except PartlyScoredError as partly:
            return finish(partly)

    def _keep(self, start: int, stop: int, answer: _Answer) -> None:
        self.values[start:stop] = answer[0]
        self.failures |= {int(self.rows[start + i]): failure for i, failure in answer[1].items()}

    def _split(self, start: int, stop: int, began: float, kind: FailureKind, reason: str) -> None:
        """Try the halves of a span whose call failed; a single row is lost."""
        self.lost_s += time.monotonic() - began
        if stop - start == 1:
            self._lose(start, stop, kind, reason)
        else:
            self._halve(start, stop, self.timeouts if kind == "timeout" else -1)

    def _halve(self, start: int, stop: int, hangs_at: int) -> None:
        middle = (start + stop) // 2
        self.todo += [(middle, stop, hangs_at), (start, middle, -1)]

    def _lose(self, start: int, stop: int, kind: FailureKind, reason: str) -> None:
        self.failures |= dict.fromkeys(self.rows[start:stop].tolist(), (kind, reason))

    def _spent(self) -> str:
        """Why nothing more is tried, or nothing."""
        limit_s = GIVE_UP_AFTER * max(self.pace.timeout_s, _LEAST_LIMIT_S)
        if not self.refused and self.pace.timeout_s and self.lost_s >= limit_s:
            self.refused = (
                f"given up untried: calls that failed took {self.lost_s:.3g} s ({self.timeouts} of them ran out of "
                f"time); at most {limit_s:g} s are spent on them"
            )
        return self.refused


def _checked(returned: object, *, count: int, width: int) -> _Answer:
    """Float64 ``[count, width]`` and failures by position; a single column may come as ``[count]``.

    Raises:
        OutputError: It is not numbers, or of another shape.
    """
    values: object = returned.values if isinstance(returned, PartlyScoredError) else returned
    failures = returned.failures if isinstance(returned, PartlyScoredError) else {}
    if isinstance(values, np.ma.MaskedArray):
        values = np.ma.filled(values.astype(np.float64), np.nan)
    try:
        array = np.asarray(values)
    except Exception as error:  # conversion is the returned object's own code
        raise OutputError(f"returned {type(values).__name__}, not numbers: {describe_error(error)}") from error
    if array.dtype.kind not in "fiub":
        what = "None" if values is None else f"{type(values).__name__} of type {array.dtype}"
        raise OutputError(f"returned {what}, not numbers")
    if array.shape not in ((count, width), *([(count,)] if width == 1 else [])):
        raise OutputError(f"returned shape {list(array.shape)} for {count} rows")
    if wild := [i for i in failures if not 0 <= i < count]:
        raise OutputError(f"reported a failure of row {wild[0]} of {count}")
    return array.astype(np.float64, copy=False).reshape(count, width), dict(failures)
