"""Results of step after step, worked out when they are asked for or, in threads, some steps ahead."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

__all__ = ["Lookahead"]

T = TypeVar("T")


class Lookahead(Generic[T]):
    """Calls ``work(step)`` once for each step; with `ahead` > 0 up to so many steps before the result is wanted.

    ``take(t)`` begins the work of steps up to ``t + ahead``, each in a thread of its own, and waits for that of step t.
    So work on step s begins when step ``s - ahead`` is taken, and not before: what has happened until then is behind by
    at most `ahead` steps. With ``ahead=0`` everything happens in the caller's thread, in order.

    Example:
        >>> with Lookahead(lambda step: step * step, ahead=2, last=4) as squares:
        ...     [squares.take(step) for step in range(4)]
        [0, 1, 4, 9]
    """

    def __init__(self, work: Callable[[int], T], *, ahead: int, last: int) -> None:
        """Begin nothing yet.

        Args:
            work: What is to be done for a step; called from several threads at once.
            ahead: Steps that may be begun before they are wanted.
            last: No step from this one on is begun ahead.
        """
        self._work, self._ahead, self._last = work, ahead, last
        self._begun: dict[int, Future[T]] = {}
        self._threads = ThreadPoolExecutor(ahead + 1, thread_name_prefix="collect") if ahead else None
        self.waited_s = 0.0
        """Seconds that the caller of the latest :meth:`take` waited."""

    @property
    def ready(self) -> int:
        """Steps that are done and not taken yet."""
        return sum(future.done() for future in self._begun.values())

    def take(self, step: int) -> T:
        """The result for `step`, or the error that the work raised."""
        started = time.perf_counter()
        try:
            if self._threads is None:
                return self._work(step)
            for s in range(step, max(step + 1, min(step + self._ahead + 1, self._last))):
                if s not in self._begun:
                    self._begun[s] = self._threads.submit(self._work, s)
            return self._begun.pop(step).result()
        finally:
            self.waited_s = time.perf_counter() - started

    def __enter__(self) -> Lookahead[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Begin nothing more; work that is under way ends by itself, and nobody waits for it."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
