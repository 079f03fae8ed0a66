"""The thread that owns a pool of workers: it lives on events and on the clock, and never waits longer than a moment."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any

from rlhf_drive.errors import RlhfDriveError, describe_error
from rlhf_drive.workers.pool import WorkerPool

__all__ = ["DispatchLoop"]

_TURN_S = 0.05
_LATE_S = 1.0
_END_S = 30.0


class DispatchLoop:
    """Calls what is posted to it, watches the pool and hands out work, until it is ended or something goes wrong."""

    def __init__(
        self,
        pool: WorkerPool[Any, Any],
        *,
        kind: str,
        failure: type[RlhfDriveError],
        alive: Callable[[], bool],
        turn: Callable[[float], None],
        ended: Callable[[RlhfDriveError], None],
    ) -> None:
        """Set up; :meth:`start` starts the thread.

        Args:
            pool: The workers; they end with the thread.
            kind: What messages call the service, such as "reward".
            failure: What those who still wait at the end are told.
            alive: Whether Ray is up at all.
            turn: Hands out work, at the time it is given (``time.monotonic``).
            ended: Called at the end, in the thread, with the reason.
        """
        self._pool, self._kind, self._failure = pool, kind, failure
        self._alive, self._hand_out, self._tell = alive, turn, ended
        self._events: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=f"{kind}-dispatch", daemon=True)

    def start(self) -> None:
        """Start the thread, which starts the workers."""
        self._thread.start()

    def post(self, event: Callable[[], None]) -> None:
        """Have the thread call `event` soon."""
        self._events.put(event)

    def end(self) -> None:
        """End the workers and the thread."""
        self.post(self._stop)
        self._thread.join(_END_S)

    def _stop(self) -> None:
        self._closing = True

    def _run(self) -> None:
        error = self._failure(f"The {self._kind} service was closed before this was done.")
        try:
            last = time.monotonic()
            while not self._closing:
                last = self._turn(last)
        except Exception as problem:  # nobody may wait for a thread that has ended
            error = self._failure(f"Dispatching to the {self._kind} workers failed: {describe_error(problem)}")
            error.__cause__ = problem
        self._pool.end()
        self._tell(error)
        if not self._pool.ready.done():
            self._pool.ready.set_exception(error)

    def _turn(self, last: float) -> float:
        """Take in what has happened, look at the clock, hand out work."""
        with contextlib.suppress(Empty):
            self._events.get(timeout=_TURN_S)()
            while True:
                self._events.get_nowait()()
        now = time.monotonic()
        if now - last > _LATE_S:  # this process stood still itself, which is no worker's fault
            self._pool.postpone(now - last)
        self._pool.watch(now)
        if not self._alive():
            raise self._failure(f"Ray was shut down while the {self._kind} service used it. Close the service first.")
        self._hand_out(now)
        return now
