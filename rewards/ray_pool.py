"""A fixed number of workers, each replaced when it dies, hangs or takes too long.

Everything here runs in one thread: whoever owns the pool calls it, and what workers answer is posted to the owner.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

from rewards.isolation import GIVE_UP_AFTER, describe_error
from rewards.ray_shards import Loss, Shard
from rewards.ray_worker import ShardResult, WorkerInfo, WorkerLostError
from rlhf_drive.errors import RewardError
from rlhf_drive.scenes import Trajectories

__all__ = ["Limits", "Owner", "Slot", "Worker", "WorkerPool"]

_PING_EVERY_S = 0.5
_START_TRIES = 4
_MAX_ABANDONED = 32
"""A worker that has left more threads behind is replaced: they hang in users' rewards and cannot be ended."""


_NO_START = (
    "A reward worker did not start within {:g} s. Ray may have too few CPUs free for {} of them: lower workers or "
    "num_cpus_per_worker, or give it longer."
)


class Worker(Protocol):
    """What a worker is to the pool; each future raises `WorkerLostError` if the worker is gone."""

    def start(self) -> Future[WorkerInfo]:
        """Done when it can score; raises if it cannot."""
        ...

    def score(
        self, scenes: Sequence[Any], trajectories: Trajectories, previous: Trajectories | None
    ) -> Future[ShardResult]:
        """Scores of the plans."""
        ...

    def ping(self) -> Future[None]:
        """Comes back at once, also while it scores, unless it hangs."""
        ...

    def gone(self) -> Future[None]:
        """Never comes back; raises when the worker is gone."""
        ...

    def kill(self) -> None:
        """End it, whatever it does."""
        ...


class Owner(Protocol):
    """Who is told what becomes of shards."""

    def post(self, event: Callable[[], None]) -> None:
        """Call `event` soon, in the owner's thread; called from other threads."""
        ...

    def scored(self, shard: Shard, result: ShardResult) -> None:
        """A shard is back."""
        ...

    def lost(self, slot: int, shard: Shard, loss: Loss, reason: str) -> None:
        """A shard will not come back from that worker."""
        ...

    def hopeless(self, error: RewardError) -> None:
        """No worker is up, and none can be started."""
        ...


@dataclass(frozen=True)
class Limits:
    """How long things may take, seconds."""

    timeout_s: float
    """A user's reward for one row; 0 = no limit."""
    terms: int
    """How many user's rewards there are."""
    start_s: float
    """Starting a worker."""
    stall_s: float
    """Silence of a worker beyond `timeout_s`; counts only where that is set."""
    call_s: float
    """Scoring a shard without the user's rewards."""

    def call(self, rows: int) -> float:
        """Scoring `rows`: all may use up their time, and finding those that fail takes the engine some more."""
        if not self.timeout_s:
            return self.call_s
        return self.call_s + self.terms * (rows + GIVE_UP_AFTER + 8) * max(self.timeout_s, 0.25)


@dataclass
class Slot:
    """The place of one worker, which is filled by one after the other."""

    index: int
    """Its number."""
    state: Literal["starting", "ready", "down"] = "down"
    """Whether its worker can score."""
    since: float = 0.0
    """When the worker was started or got its shard; while it is down, when to start one."""
    worker: Worker | None = None
    """What is in it."""
    info: WorkerInfo | None = None
    """Where that runs; None until it is ready."""
    shard: Shard | None = None
    """What it is scoring."""
    ticket: int = 0
    """Number of the call whose answer counts; others come too late."""
    asked: float | None = None
    """When it was pinged, until it answers."""
    starts: int = 0
    """Workers started so far."""
    failed_starts: int = 0
    """Starts that failed since the last one that did not."""
    cached_bytes: int = 0
    """Memory of the scenes that its worker keeps prepared."""

    @property
    def free(self) -> bool:
        """Whether it can take a shard."""
        return self.state == "ready" and self.shard is None


class WorkerPool:
    """The workers."""

    def __init__(self, spawn: Callable[[], Worker], owner: Owner, limits: Limits, workers: int) -> None:
        """Make the slots; the first :meth:`watch` starts the workers.

        Args:
            spawn: Starts a worker.
            owner: Who is told what happens.
            limits: How long things may take.
            workers: How many.
        """
        self._spawn, self._owner, self._limits = spawn, owner, limits
        self._tickets = itertools.count(1)
        self.slots = [Slot(i) for i in range(workers)]
        """Each with its worker."""
        self.counts: Counter[str] = Counter()
        """`deaths`, `hangs`, `restarts` and `late` answers so far."""
        self.ready: Future[None] = Future()
        """Done when every worker is up for the first time; an error if one cannot be started."""

    def hand(self, slot: Slot, shard: Shard, scenes: Sequence[Any]) -> None:
        """Let a free slot score a shard whose scenes are sent as `scenes`."""
        assert slot.worker is not None
        _, plans, before = shard.job.part(shard.rows)
        future = slot.worker.score(scenes, plans, before)
        slot.shard, slot.since, slot.asked, slot.ticket = shard, time.monotonic(), None, next(self._tickets)
        self._listen(future, slot, self._scored)

    def watch(self, now: float) -> None:
        """Start what is to be started, and end what takes too long."""
        limits = self._limits
        for slot in self.slots:
            if slot.state == "down" and now >= slot.since:
                self._start(slot)
            elif slot.state == "starting" and now - slot.since > limits.start_s:
                self._start_failed(slot, RewardError(_NO_START.format(limits.start_s, len(self.slots))))
            elif slot.shard is None or slot.worker is None:
                continue
            elif now - slot.since > (limit := limits.call(len(slot.shard.rows))):
                self._lost(slot, "timeout", f"the worker that scored it was not done after {limit:g} s")
            elif slot.asked is not None:
                if now - slot.asked > limits.timeout_s + limits.stall_s:
                    silent = now - slot.asked
                    self._lost(slot, "timeout", f"the worker that scored it gave no sign of life for {silent:.1f} s")
            elif limits.timeout_s and now - slot.since > _PING_EVERY_S:
                slot.asked = now
                self._listen(slot.worker.ping(), slot, self._answered)

    def postpone(self, seconds: float) -> None:
        """Leave out of account that the owner itself stood still for so long."""
        for slot in self.slots:
            slot.since += seconds
            slot.asked = None if slot.asked is None else slot.asked + seconds

    def end(self) -> None:
        """End all workers."""
        for slot in self.slots:
            self._end(slot)

    def _listen(self, future: Future[Any], slot: Slot, react: Callable[[Slot, Future[Any]], None]) -> None:
        """Call `react` when the future is done, unless the slot has gone on to another call or worker by then."""
        ticket = slot.ticket

        def happened() -> None:
            if slot.ticket == ticket:
                react(slot, future)
            elif react == self._scored and future.exception() is None:
                self.counts["late"] += 1

        future.add_done_callback(lambda _: self._owner.post(happened))

    def _start(self, slot: Slot) -> None:
        slot.state, slot.since, slot.ticket = "starting", time.monotonic(), next(self._tickets)
        self.counts["restarts"] += slot.starts > 0
        slot.starts += 1
        slot.worker = self._spawn()
        self._listen(slot.worker.start(), slot, self._started)

    def _started(self, slot: Slot, future: Future[WorkerInfo]) -> None:
        error, worker = future.exception(), slot.worker
        if error is not None or worker is None:
            return self._start_failed(slot, error or WorkerLostError("a worker was ended while it started"))
        slot.state, slot.info, slot.failed_starts = "ready", future.result(), 0
        # A worker that dies while it has nothing to do is replaced before a shard is blamed for it.
        worker.gone().add_done_callback(lambda _: self._owner.post(partial(self._gone, slot, worker)))
        if not self.ready.done() and all(other.state == "ready" for other in self.slots):
            self.ready.set_result(None)

    def _start_failed(self, slot: Slot, error: BaseException) -> None:
        """Try again after a while; say so where no worker is up and trying again seems vain."""
        self._end(slot)
        slot.failed_starts += 1
        slot.since = time.monotonic() + min(30.0, 0.125 * 2**slot.failed_starts)
        if slot.failed_starts < _START_TRIES and isinstance(error, WorkerLostError):
            return
        if not self.ready.done():
            self.ready.set_exception(error)
        elif all(other.info is None for other in self.slots):
            reason = RewardError(f"No reward worker can be started any more: {describe_error(error)}")
            reason.__cause__ = error
            self._owner.hopeless(reason)

    def _gone(self, slot: Slot, worker: Worker) -> None:
        if slot.worker is worker:
            self._lost(slot, "worker_died", "the worker that scored it died")

    def _scored(self, slot: Slot, future: Future[ShardResult]) -> None:
        """Pass on what a call brought back."""
        error, shard = future.exception(), slot.shard
        assert shard is not None
        if isinstance(error, WorkerLostError):
            return self._lost(slot, "worker_died", f"the worker that scored it died: {error}")
        slot.shard, slot.ticket = None, next(self._tickets)
        if error is not None:
            reason = f"the worker that scored it raised {describe_error(error)}"
            return self._owner.lost(slot.index, shard, "raised", reason)
        result = future.result()
        slot.cached_bytes = result.cached_bytes
        self._owner.scored(shard, result)
        if result.abandoned > _MAX_ABANDONED:
            self._replace(slot)

    def _answered(self, slot: Slot, future: Future[None]) -> None:
        slot.asked = None

    def _lost(self, slot: Slot, loss: Loss, reason: str) -> None:
        """Replace a worker, and see to what it was scoring."""
        self.counts["hangs" if loss == "timeout" else "deaths"] += 1
        shard = slot.shard
        self._replace(slot)
        if shard is not None:
            self._owner.lost(slot.index, shard, loss, reason)

    def _replace(self, slot: Slot) -> None:
        self._end(slot)
        self._start(slot)

    def _end(self, slot: Slot) -> None:
        """End the slot's worker; what it may still answer comes too late."""
        if slot.worker is not None:
            with contextlib.suppress(Exception):  # it may be gone already, and Ray with it
                slot.worker.kill()
        slot.worker = slot.info = slot.shard = slot.asked = None
        slot.cached_bytes = 0
        slot.state, slot.ticket = "down", next(self._tickets)
