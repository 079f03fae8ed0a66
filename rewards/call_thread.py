"""Calling functions that may never return: a thread of their own, a deadline, and leaving behind what hangs."""

from __future__ import annotations

import asyncio
import inspect
import queue
import threading
import time
import weakref
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

__all__ = ["MAX_ABANDONED", "CallStoppedError", "CallThread", "CallTimeoutError", "NoThreadError", "WorkerDiedError"]

MAX_ABANDONED = 64
"""Calls of one function that may hang at the same time; beyond that it is not called until one of them ends."""
_GRACE_S = 1.0
_POLL_S = 0.1
T = TypeVar("T")


class CallTimeoutError(Exception):
    """A call took longer than it may."""


class CallStoppedError(Exception):
    """Nobody wants the result of a call any more."""


class WorkerDiedError(Exception):
    """The thread that a call ran in ended before the call did."""


class NoThreadError(Exception):
    """There is no thread to make a call in; it was not made."""


@dataclass
class _Job:
    """One call and what becomes of it."""

    work: Callable[[], object]
    finish: Callable[[Any], object]
    deadline: float | None
    awaiting: bool = False
    done: threading.Event = field(default_factory=threading.Event)
    result: object = None
    error: BaseException | None = None

    @property
    def fatal(self) -> bool:
        """Whether what was raised ends the thread, as SystemExit does."""
        return not isinstance(self.error, (Exception, KeyboardInterrupt, type(None)))


class CallThread:
    """Makes calls one after the other in a daemon thread, so that one that hangs can be given up.

    A call that is late cannot be killed: its thread is left behind (`abandoned`), ends when the call does, and the next
    call gets a fresh thread (`restarts`). What a function awaits is cancelled instead, and its thread kept, unless it
    ignores that for a second. A call that holds the interpreter's lock, as some C code does, stops every thread of the
    process and no deadline helps: such functions need worker processes.

    The thread is the same from call to call, and so is its event loop: sessions that an async function keeps open stay
    usable, and so does what a library keeps per thread.
    """

    def __init__(self, name: str, timeout_s: float = 0.0) -> None:
        """Start nothing yet.

        Args:
            name: Of the thread.
            timeout_s: Time that one call may take; 0 = no limit.
        """
        self.timeouts = 0
        """Calls that ran out of time."""
        self.restarts = 0
        """Threads that had to be started in place of one that was left behind or died."""
        self._name = name
        self._timeout_s = timeout_s
        self._turn = threading.Lock()
        self._worker: _Worker | None = None
        self._left: list[_Worker] = []
        self._replaces = False
        self._abandoned = 0

    @property
    def abandoned(self) -> int:
        """Threads left behind so far, whether or not their call has ended since."""
        return self._abandoned

    def call(self, work: Callable[[], object], finish: Callable[[Any], T], stop: threading.Event | None = None) -> T:
        """``finish(work())``, both in the thread; what `work` returns is awaited first where it is awaitable.

        Calls from several threads take turns; waiting for one's turn does not count as time.

        Args:
            work: The call.
            finish: Makes the result out of what it returns.
            stop: Gives the call up when set.

        Raises:
            CallTimeoutError: The call took longer than `timeout_s`.
            WorkerDiedError: The thread ended, as by ``sys.exit``.
            NoThreadError: `MAX_ABANDONED` calls hang already, or no thread can be started. The call was not made.
            CallStoppedError: `stop` was set.
            Exception: Whatever the call raises; KeyboardInterrupt as well.
        """
        with self._turn:
            worker = self._ready_worker()
            job = _Job(work, finish, time.monotonic() + self._timeout_s if self._timeout_s else None)
            worker.jobs.put(job)
            try:
                self._wait(job, worker, stop)
            except BaseException:  # also an interrupt of the caller: nobody may wait behind a call that was given up
                self._leave(worker)
                raise
            if job.fatal:
                self._worker, self._replaces = None, True
        if job.error is None:
            return cast(T, job.result)
        if not job.fatal:
            raise job.error
        raise WorkerDiedError(f"it ended its thread: {type(job.error).__name__}: {job.error}".rstrip(": "))

    def close(self) -> None:
        """End the thread once its call is done; a later call starts a new one."""
        with self._turn:
            if self._worker is not None:
                self._worker.jobs.put(None)
                self._worker = None

    def _ready_worker(self) -> _Worker:
        """The thread, started where there is none."""
        self._left = [worker for worker in self._left if worker.is_alive()]
        if self._worker is None or not self._worker.is_alive():
            if len(self._left) >= MAX_ABANDONED:
                raise NoThreadError(f"{len(self._left)} earlier calls still hang")
            fresh = _Worker(self._name)
            try:
                fresh.start()
            except RuntimeError as error:
                raise NoThreadError(f"no thread can be started: {error}") from error
            self.restarts += self._replaces or self._worker is not None
            self._worker, self._replaces = fresh, False
            weakref.finalize(self, fresh.jobs.put, None)  # a service that nobody closes leaves no thread behind
        return self._worker

    def _wait(self, job: _Job, worker: _Worker, stop: threading.Event | None) -> None:
        """Return when the job is done; raise when it is late, its thread is dead or nobody wants it any more."""
        while not job.done.wait(self._patience(job)):
            if stop is not None and stop.is_set():
                raise CallStoppedError
            if not worker.is_alive() and not job.done.is_set():
                raise WorkerDiedError("its thread ended")
            if job.deadline is not None and time.monotonic() >= job.deadline + (_GRACE_S if job.awaiting else 0.0):
                self.timeouts += 1
                raise CallTimeoutError
        if isinstance(job.error, CallTimeoutError):
            self.timeouts += 1

    @staticmethod
    def _patience(job: _Job) -> float:
        left = _POLL_S if job.deadline is None else job.deadline - time.monotonic()
        return min(max(left, 0.005), _POLL_S)

    def _leave(self, worker: _Worker) -> None:
        """Give up the thread that hangs: it ends when its call does."""
        worker.jobs.put(None)
        self._worker, self._replaces = None, True
        if worker.is_alive():
            self._abandoned += 1
            self._left.append(worker)


class _Worker(threading.Thread):
    """Does one job after the other until it is handed None or a job ends it."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self.jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._runner: asyncio.Runner | None = None

    def run(self) -> None:
        try:
            while (job := self.jobs.get()) is not None:
                self._do(job)
                if job.fatal:
                    return
                del job  # or the plans of the last call would stay in memory until the next one
        finally:
            if self._runner is not None:
                self._runner.close()

    def _do(self, job: _Job) -> None:
        """Make the call."""
        try:
            result = job.work()
            if inspect.isawaitable(result):
                result = self._await(result, job)
            job.result = job.finish(result)
        except BaseException as error:  # even what means to end the thread is told to the caller first
            job.error = error
        job.done.set()

    def _await(self, awaitable: Awaitable[object], job: _Job) -> object:
        """The awaited result; cancelled at the deadline."""

        async def limited() -> object:
            left = None if job.deadline is None else job.deadline - time.monotonic()
            try:
                async with asyncio.timeout(left) as limit:
                    return await awaitable
            except TimeoutError:
                if limit.expired():
                    raise CallTimeoutError from None
                raise  # the function's own
            except asyncio.CancelledError as error:
                raise RuntimeError("it was cancelled from within") from error

        if self._runner is None:
            self._runner = asyncio.Runner()
        job.awaiting = True
        return self._runner.run(limited())
