"""Cutting jobs into shards and handing these to workers until every row is back.

One thread owns all state and lives on events: a job, a worker's answer, or that time has passed. It waits for nothing
but the next event, and never longer than a moment.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, InvalidStateError
from dataclasses import dataclass, fields
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

from rewards.carriers import Failure
from rewards.isolation import describe_error
from rewards.ray_pool import Limits, Slot, Worker, WorkerPool
from rewards.ray_shards import Homes, Job, Loss, Shard, after_loss, plan_shards
from rewards.ray_worker import ShardResult, WorkerInfo
from rewards.reward_stats import RewardStats, StatsCounter
from rlhf_drive.errors import RewardError
from rlhf_drive.scenes import Scene

__all__ = ["Dispatcher", "RayRewardStats"]

_TURN_S = 0.05
_LATE_S = 1.0
_HELP_AFTER_S = 0.5
_END_S = 30.0


@dataclass(frozen=True)
class RayRewardStats(RewardStats):
    """What a service on Ray has done so far; `restarts` counts processes."""

    deaths: int = 0
    """Workers that died by themselves."""
    hangs: int = 0
    """Workers ended because they gave no sign of life or were not done in time."""
    retries: int = 0
    """Shards handed out again, whole or as parts."""
    late: int = 0
    """Answers of workers that had been replaced by then; they are not used."""


class Dispatcher:
    """Scores jobs on workers that may fail at any time."""

    def __init__(
        self,
        spawn: Callable[[], Worker],
        fetch: Callable[[Scene], Any],
        alive: Callable[[], bool],
        limits: Limits,
        *,
        workers: int,
        remember: int,
        max_rows: int,
        max_retries: int,
    ) -> None:
        """Start the thread, which starts the workers.

        Args:
            spawn: Starts a worker.
            fetch: What a worker is sent for a scene.
            alive: Whether the engine is up at all.
            limits: How long things may take.
            workers: How many.
            remember: Scenes whose worker is remembered.
            max_rows: Rows of a shard at most.
            max_retries: How often a row is tried again after a worker died that held it alone.
        """
        self._fetch, self._alive, self._max_rows, self._max_retries = fetch, alive, max_rows, max_retries
        self._pool = WorkerPool(spawn, self, limits, workers)
        self._queues: list[deque[Shard]] = [deque() for _ in range(workers)]
        self._homes = Homes(workers, remember)
        self._events: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._lock = threading.Lock()
        self._jobs: list[Job] = []
        self._closing = self._ended = False
        self._counter = StatsCounter()
        self._counts: Counter[str] = Counter()
        self.ready = self._pool.ready
        """Done when every worker is up for the first time; an error if one cannot be started."""
        self._thread = threading.Thread(target=self._run, name="reward-dispatch", daemon=True)
        self._thread.start()

    @property
    def workers(self) -> list[WorkerInfo]:
        """The workers that are up."""
        return [info for slot in self._pool.slots if (info := slot.info) is not None]

    @property
    def stats(self) -> RayRewardStats:
        """What has been done so far."""
        base = self._counter.snapshot()
        values = {item.name: getattr(base, item.name) for item in fields(base)}
        kept = {"cached_bytes": sum(slot.cached_bytes for slot in self._pool.slots)}
        return RayRewardStats(**(values | dict(self._counts) | dict(self._pool.counts) | kept))

    def add(self, job: Job) -> None:
        """Score `job`; its future tells the end.

        Raises:
            RewardError: The dispatcher has ended.
        """
        with self._lock:
            if self._ended:
                raise RewardError("The reward workers have ended. Close the service; the next call starts new ones.")
            job.clock.enter_context(self._counter.running())
            self._jobs.append(job)
        self.post(partial(self._plan, job))

    def close(self, *, cancel: bool) -> None:
        """Wait until no job is left, or cancel all that are left."""
        with self._lock:
            jobs = list(self._jobs)
        if cancel:
            for job in jobs:
                job.future.cancel()
        for job in jobs:  # every job ends
            with contextlib.suppress(CancelledError):
                job.future.exception()

    def end(self) -> None:
        """End the workers and the thread."""
        self.post(self._stop)
        self._thread.join(_END_S)

    def post(self, event: Callable[[], None]) -> None:
        """Have the thread call `event`."""
        self._events.put(event)

    def scored(self, shard: Shard, result: ShardResult) -> None:
        """Take a shard that is back."""
        self._counts.update(result.counts)
        if not shard.job.future.done():
            shard.job.put(shard.rows, result.scores)
            self._settle(shard.job)

    def lost(self, slot: int, shard: Shard, loss: Loss, reason: str) -> None:
        """Hand a shard that does not come back to others, or give up its row."""
        job = shard.job
        if job.future.done():
            return
        again = after_loss(shard, loss, self._max_retries)
        if not again:
            row = int(shard.rows[0])
            times = f" ({shard.losses + 1} times)" if shard.losses else ""
            job.give_up(row, Failure("worker", loss, f"scene {job.token(row)!r}: {reason}{times}"))
            self._settle(job)
        self._counts["retries"] += len(again)
        for i, part in enumerate(again, slot + 1):
            self._queues[i % len(self._queues)].append(part)

    def hopeless(self, error: RewardError) -> None:
        """Tell everybody who waits."""
        self._abandon(self._jobs, error)

    def _run(self) -> None:
        error = RewardError("The reward service was closed before these plans were scored.")
        try:
            last = time.monotonic()
            while not self._closing:
                last = self._turn(last)
        except Exception as problem:  # nobody may wait for a thread that has ended
            error = RewardError(f"Dispatching to the reward workers failed: {describe_error(problem)}")
            error.__cause__ = problem
        with self._lock:
            self._ended = True
        self._pool.end()
        self._abandon(self._jobs, error)
        if not self.ready.done():
            self.ready.set_exception(error)

    def _stop(self) -> None:
        self._closing = True

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
            raise RewardError("Ray was shut down while the reward service used it. Close the service first.")
        for slot in self._pool.slots:
            while slot.free and (shard := self._next(slot, now)) is not None:
                self._hand(slot, shard)
        self._forget_done()
        return now

    def _plan(self, job: Job) -> None:
        homes = self._homes.of([scene.token for scene in job.scenes])
        index = job.trajectories.scene_index
        for worker, rows in plan_shards(index, homes, workers=len(self._queues), max_rows=self._max_rows):
            self._queues[worker].append(Shard(job, rows))
        self._settle(job)

    def _next(self, slot: Slot, now: float) -> Shard | None:
        """The next shard of the slot's own; without one, the last of the worker that has most and needs help."""
        mine = self._queues[slot.index]
        while mine:
            if not (shard := mine.popleft()).job.future.done():
                return shard
        other = max(self._pool.slots, key=lambda candidate: len(self._queues[candidate.index]))
        slow = other.state != "ready" or now - other.since > _HELP_AFTER_S
        theirs = self._queues[other.index]
        while len(theirs) > (0 if slow else 1):
            if not (shard := theirs.pop()).job.future.done():
                return shard
        return None

    def _hand(self, slot: Slot, shard: Shard) -> None:
        try:
            scenes = [self._fetch(scene) for scene in shard.job.part(shard.rows)[0]]
        except Exception as problem:  # the object store is full, or a scene cannot be pickled
            error = RewardError(f"Scenes cannot be sent to a reward worker: {describe_error(problem)}")
            error.__cause__ = problem
            return self._abandon([shard.job], error)
        self._pool.hand(slot, shard, scenes)

    def _settle(self, job: Job) -> None:
        """Hand over the scores if all rows are back."""
        if not job.complete or job.future.done():
            return
        scores = job.scores()
        self._counter.add(scores)
        job.clock.close()
        with contextlib.suppress(InvalidStateError):  # the caller gave up this very moment
            job.future.set_result(scores)
        self._forget_done()

    def _abandon(self, jobs: Sequence[Job], error: RewardError) -> None:
        for job in list(jobs):
            with contextlib.suppress(InvalidStateError):
                job.future.set_exception(error)
        self._forget_done()

    def _forget_done(self) -> None:
        """Let go of jobs that are done or cancelled."""
        with self._lock:
            done = [job for job in self._jobs if job.future.done()]
            self._jobs = [job for job in self._jobs if not job.future.done()]
        for job in done:
            job.clock.close()
            if job.future.cancelled():
                job.future.set_running_or_notify_cancel()
