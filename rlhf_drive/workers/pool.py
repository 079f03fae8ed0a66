"""A fixed number of workers, each replaced when it dies, hangs or takes too long.

Everything here runs in one thread: whoever owns the pool calls it, and what workers answer is posted to the owner.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Literal, Protocol, TypeVar

from rlhf_drive.errors import RlhfDriveError, describe_error
from rlhf_drive.workers.actor import WorkerInfo, WorkerLostError

__all__ = ["Loss", "Owner", "Slot", "Worker", "WorkerPool"]

_PING_EVERY_S = 0.5
_START_TRIES = 4


class Worker(Protocol):
    """What a worker is to the pool; each future raises `WorkerLostError` if the worker is gone."""

    def start(self) -> Future[WorkerInfo]:
        """Done when it can work; raises if it cannot."""
        ...

    def ping(self) -> Future[None]:
        """Comes back at once, also while it works, unless it hangs."""
        ...

    def gone(self) -> Future[None]:
        """Never comes back; raises when the worker is gone."""
        ...

    def kill(self) -> None:
        """End it, whatever it does."""
        ...


@dataclass(frozen=True)
class Loss:
    """How a worker was lost with what it was doing."""

    kind: Literal["died", "timeout", "silent"]
    """Its process ended, it was not done in time, or it gave no sign of life."""
    seconds: float = 0.0
    """How long it was waited for; 0 where it died."""
    reason: str = ""
    """What Ray says about its end; empty where it said nothing."""
    info: WorkerInfo | None = None
    """Where it ran."""


W = TypeVar("W", bound=Worker)
T = TypeVar("T")
T_contra = TypeVar("T_contra", contravariant=True)


class Owner(Protocol[T_contra]):
    """Who is told what becomes of tasks, in its own thread."""

    def post(self, event: Callable[[], None]) -> None:
        """Call `event` soon, in the owner's thread; called from other threads."""
        ...

    def answered(self, index: int, task: T_contra, answer: Any) -> None:
        """What the worker of slot `index` was asked for is here; the slot is free again."""
        ...

    def raised(self, index: int, task: T_contra, error: BaseException) -> None:
        """The call raised; the slot is free again."""
        ...

    def lost(self, index: int, task: T_contra, loss: Loss) -> None:
        """An answer will not come any more; the slot's worker is being replaced."""
        ...

    def hopeless(self, error: RlhfDriveError) -> None:
        """No worker is up, and none can be started."""
        ...


@dataclass
class Slot(Generic[W, T]):
    """The place of one worker, which is filled by one after the other."""

    index: int
    """Its number."""
    state: Literal["starting", "ready", "down"] = "down"
    """Whether its worker can work."""
    since: float = 0.0
    """When the worker was started or got its task; while it is down, when to start one."""
    worker: W | None = None
    """What is in it."""
    info: WorkerInfo | None = None
    """Where that runs; None until it is ready."""
    task: T | None = None
    """What it is doing."""
    limit_s: float = 0.0
    """How long that may take."""
    ticket: int = 0
    """Number of the call whose answer counts; others come too late."""
    asked: float | None = None
    """When it was pinged, until it answers."""
    starts: int = 0
    """Workers started so far."""
    failed_starts: int = 0
    """Starts that failed since the last one that did not."""
    cached_bytes: int = 0
    """Memory that its worker keeps for later, as far as the owner notes it here."""

    @property
    def free(self) -> bool:
        """Whether it can take a task."""
        return self.state == "ready" and self.task is None


class WorkerPool(Generic[W, T]):
    """The workers."""

    def __init__(
        self,
        spawn: Callable[[], W],
        owner: Owner[T],
        *,
        workers: int,
        kind: str,
        failure: type[RlhfDriveError],
        start_s: float,
        start_hint: str,
        silence_s: float | None,
    ) -> None:
        """Make the slots; the first :meth:`watch` starts the workers.

        Args:
            spawn: Starts a worker.
            owner: Who is told what happens.
            workers: How many.
            kind: What messages call a worker, such as "reward".
            failure: What is raised where workers cannot be started.
            start_s: How long starting one may take.
            start_hint: What may be wrong where one does not start in time, and what to do.
            silence_s: How long one that works may give no sign of life; None does not ask for any.
        """
        self._spawn, self._owner, self._kind, self._failure = spawn, owner, kind, failure
        self._start_s, self._start_hint, self._silence_s = start_s, start_hint, silence_s
        self._tickets = itertools.count(1)
        self.slots: list[Slot[W, T]] = [Slot(i) for i in range(workers)]
        """Each with its worker."""
        self.counts: Counter[str] = Counter()
        """`deaths`, `hangs`, `restarts` and `late` answers so far."""
        self.ready: Future[None] = Future()
        """Done when every worker is up for the first time; an error if one cannot be started."""

    def hand(self, slot: Slot[W, T], task: T, call: Callable[[W], Future[Any]], limit_s: float) -> None:
        """Let a free slot do `task`, which is `call`, within `limit_s`."""
        assert slot.worker is not None
        future = call(slot.worker)
        slot.task, slot.since, slot.limit_s = task, time.monotonic(), limit_s
        slot.asked, slot.ticket = None, next(self._tickets)
        self._listen(future, slot, self._done)

    def watch(self, now: float) -> None:
        """Start what is to be started, and end what takes too long."""
        for slot in self.slots:
            if slot.state == "down" and now >= slot.since:
                self._start(slot)
            elif slot.state == "starting" and now - slot.since > self._start_s:
                late = f"A {self._kind} worker did not start within {self._start_s:g} s. {self._start_hint}"
                self._start_failed(slot, self._failure(late))
            elif slot.task is None or slot.worker is None:
                continue
            elif now - slot.since > slot.limit_s:
                self._lost(slot, "timeout", slot.limit_s)
            elif self._silence_s is None:
                continue
            elif slot.asked is not None:
                if now - slot.asked > self._silence_s:
                    self._lost(slot, "silent", now - slot.asked)
            elif now - slot.since > _PING_EVERY_S:
                slot.asked = now
                self._listen(slot.worker.ping(), slot, self._lives)

    def postpone(self, seconds: float) -> None:
        """Leave out of account that the owner itself stood still for so long."""
        for slot in self.slots:
            slot.since += seconds
            slot.asked = None if slot.asked is None else slot.asked + seconds

    def replace(self, slot: Slot[W, T]) -> None:
        """End the slot's worker and start another."""
        self._end(slot)
        self._start(slot)

    def end(self) -> None:
        """End all workers."""
        for slot in self.slots:
            self._end(slot)

    def _listen(self, future: Future[Any], slot: Slot[W, T], react: Callable[[Slot[W, T], Future[Any]], None]) -> None:
        """Call `react` when the future is done, unless the slot has gone on to another call or worker by then."""
        ticket = slot.ticket

        def happened() -> None:
            if slot.ticket == ticket:
                react(slot, future)
            elif react == self._done and future.exception() is None:
                self.counts["late"] += 1

        future.add_done_callback(lambda _: self._owner.post(happened))

    def _start(self, slot: Slot[W, T]) -> None:
        slot.state, slot.since, slot.ticket = "starting", time.monotonic(), next(self._tickets)
        self.counts["restarts"] += slot.starts > 0
        slot.starts += 1
        slot.worker = self._spawn()
        self._listen(slot.worker.start(), slot, self._started)

    def _started(self, slot: Slot[W, T], future: Future[WorkerInfo]) -> None:
        error, worker = future.exception(), slot.worker
        if error is not None or worker is None:
            return self._start_failed(slot, error or WorkerLostError("a worker was ended while it started"))
        slot.state, slot.info, slot.failed_starts = "ready", future.result(), 0
        # A worker that dies while it has nothing to do is replaced before a task is blamed for it.
        worker.gone().add_done_callback(lambda _: self._owner.post(partial(self._gone, slot, worker)))
        if not self.ready.done() and all(other.state == "ready" for other in self.slots):
            self.ready.set_result(None)

    def _start_failed(self, slot: Slot[W, T], error: BaseException) -> None:
        """Try again after a while; say so where no worker is up and trying again seems vain."""
        self._end(slot)
        slot.failed_starts += 1
        slot.since = time.monotonic() + min(30.0, 0.125 * 2**slot.failed_starts)
        if slot.failed_starts < _START_TRIES and isinstance(error, WorkerLostError):
            return
        if not self.ready.done():
            self.ready.set_exception(error)
        elif all(other.info is None for other in self.slots):
            reason = self._failure(f"No {self._kind} worker can be started any more: {describe_error(error)}")
            reason.__cause__ = error
            self._owner.hopeless(reason)

    def _gone(self, slot: Slot[W, T], worker: W) -> None:
        if slot.worker is worker:
            self._lost(slot, "died", 0.0)

    def _done(self, slot: Slot[W, T], future: Future[Any]) -> None:
        """Pass on what a call brought back."""
        error, task = future.exception(), slot.task
        assert task is not None
        if isinstance(error, WorkerLostError):
            return self._lost(slot, "died", 0.0, str(error))
        slot.task, slot.ticket = None, next(self._tickets)
        if error is not None:
            return self._owner.raised(slot.index, task, error)
        self._owner.answered(slot.index, task, future.result())

    def _lives(self, slot: Slot[W, T], future: Future[None]) -> None:
        slot.asked = None

    def _lost(
        self, slot: Slot[W, T], kind: Literal["died", "timeout", "silent"], seconds: float, reason: str = ""
    ) -> None:
        """Replace a worker, and see to what it was doing."""
        self.counts["deaths" if kind == "died" else "hangs"] += 1
        task, loss = slot.task, Loss(kind, seconds, reason, slot.info)
        self.replace(slot)
        if task is not None:
            self._owner.lost(slot.index, task, loss)

    def _end(self, slot: Slot[W, T]) -> None:
        """End the slot's worker; what it may still answer comes too late."""
        if slot.worker is not None:
            with contextlib.suppress(Exception):  # it may be gone already, and Ray with it
                slot.worker.kill()
        slot.worker = slot.info = slot.task = slot.asked = None
        slot.cached_bytes = 0
        slot.state, slot.ticket = "down", next(self._tickets)
