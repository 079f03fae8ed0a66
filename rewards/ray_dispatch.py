"""Cutting jobs into shards and handing these to workers until every row is back.

One thread owns all state and lives on events: a job, a worker's answer, or that time has passed. It waits for nothing
but the next event, and never longer than a moment.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, InvalidStateError
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Protocol

from rewards.carriers import Failure
from rewards.isolation import GIVE_UP_AFTER, describe_error
from rewards.ray_shards import Homes, Job, Shard, ShardLoss, after_loss, plan_shards
from rewards.ray_worker import ShardResult
from rewards.reward_stats import RewardStats, StatsCounter
from rlhf_drive.errors import RewardError, RlhfDriveError
from rlhf_drive.scenes import Scene, Trajectories
from rlhf_drive.workers import DispatchLoop, Loss, Slot, Worker, WorkerInfo, WorkerPool

__all__ = ["Dispatcher", "Limits", "RayRewardStats", "RewardWorkerEnd"]

_HELP_AFTER_S = 0.5
_MAX_ABANDONED = 32
"""A worker that has left more threads behind is replaced: they hang in users' rewards and cannot be ended."""
_START_HINT = "Ray may have too few CPUs free for {} of them: lower workers or num_cpus_per_worker, or give it longer."


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


class RewardWorkerEnd(Worker, Protocol):
    """What a worker that scores is to the dispatcher."""

    def score(
        self, scenes: Sequence[Any], trajectories: Trajectories, previous: Trajectories | None
    ) -> Future[ShardResult]:
        """Scores of the plans."""
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

    @property
    def silence_s(self) -> float | None:
        """Silence of a worker; None where it does not count."""
        return self.timeout_s + self.stall_s if self.timeout_s else None

    def call(self, rows: int) -> float:
        """Scoring `rows`: all may use up their time, and finding those that fail takes the engine some more."""
        if not self.timeout_s:
            return self.call_s
        return self.call_s + self.terms * (rows + GIVE_UP_AFTER + 8) * max(self.timeout_s, 0.25)


class Dispatcher:
    """Scores jobs on workers that may fail at any time."""

    def __init__(
        self,
        spawn: Callable[[], RewardWorkerEnd],
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
        self._fetch, self._limits, self._max_rows, self._max_retries = fetch, limits, max_rows, max_retries
        self._pool: WorkerPool[RewardWorkerEnd, Shard] = WorkerPool(
            spawn, self, workers=workers, kind="reward", failure=RewardError,
            start_s=limits.start_s, start_hint=_START_HINT.format(workers), silence_s=limits.silence_s,
        )  # fmt: skip
        self._queues: list[deque[Shard]] = [deque() for _ in range(workers)]
        self._homes = Homes(workers, remember)
        self._lock = threading.Lock()
        self._jobs: list[Job] = []
        self._ended = False
        self._counter = StatsCounter()
        self._counts: Counter[str] = Counter()
        self.ready = self._pool.ready
        """Done when every worker is up for the first time; an error if one cannot be started."""
        self._loop = DispatchLoop(
            self._pool, kind="reward", failure=RewardError, alive=alive, turn=self._turn, ended=self._end_all
        )
        self._loop.start()

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
        self._loop.end()

    def post(self, event: Callable[[], None]) -> None:
        """Have the thread call `event`."""
        self._loop.post(event)

    def answered(self, index: int, task: Shard, answer: ShardResult) -> None:
        """Take a shard that is back."""
        slot, job = self._pool.slots[index], task.job
        slot.cached_bytes = answer.cached_bytes
        self._counts.update(answer.counts)
        if not job.future.done():
            job.put(task.rows, answer.scores)
            self._settle(job)
        if answer.abandoned > _MAX_ABANDONED:
            self._pool.replace(slot)

    def raised(self, index: int, task: Shard, error: BaseException) -> None:
        """Cut up a shard that cannot be scored whole, or give up its row."""
        self._again(index, task, "raised", f"the worker that scored it raised {describe_error(error)}")

    def lost(self, index: int, task: Shard, loss: Loss) -> None:
        """Hand a shard that does not come back to others, or give up its row."""
        self._again(index, task, "worker_died" if loss.kind == "died" else "timeout", _reason(loss))

    def _again(self, slot: int, shard: Shard, loss: ShardLoss, reason: str) -> None:
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

    def hopeless(self, error: RlhfDriveError) -> None:
        """Tell everybody who waits."""
        self._abandon(self._jobs, error)

    def _end_all(self, error: RlhfDriveError) -> None:
        """Tell everybody who still waits that the thread has ended."""
        with self._lock:
            self._ended = True
        self._abandon(self._jobs, error)

    def _turn(self, now: float) -> None:
        """Hand out work."""
        for slot in self._pool.slots:
            while slot.free and (shard := self._next(slot, now)) is not None:
                self._hand(slot, shard)
        self._forget_done()

    def _plan(self, job: Job) -> None:
        homes = self._homes.of([scene.token for scene in job.scenes])
        index = job.trajectories.scene_index
        for worker, rows in plan_shards(index, homes, workers=len(self._queues), max_rows=self._max_rows):
            self._queues[worker].append(Shard(job, rows))
        self._settle(job)

    def _next(self, slot: Slot[RewardWorkerEnd, Shard], now: float) -> Shard | None:
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

    def _hand(self, slot: Slot[RewardWorkerEnd, Shard], shard: Shard) -> None:
        try:
            scenes = [self._fetch(scene) for scene in shard.job.part(shard.rows)[0]]
        except Exception as problem:  # the object store is full, or a scene cannot be pickled
            error = RewardError(f"Scenes cannot be sent to a reward worker: {describe_error(problem)}")
            error.__cause__ = problem
            return self._abandon([shard.job], error)
        _, plans, before = shard.job.part(shard.rows)
        limit = self._limits.call(len(shard.rows))
        self._pool.hand(slot, shard, lambda worker: worker.score(scenes, plans, before), limit)

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

    def _abandon(self, jobs: Sequence[Job], error: RlhfDriveError) -> None:
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


def _reason(loss: Loss) -> str:
    """What to tell of a row that was lost with its worker."""
    if loss.kind == "timeout":
        return f"the worker that scored it was not done after {loss.seconds:g} s"
    if loss.kind == "silent":
        return f"the worker that scored it gave no sign of life for {loss.seconds:.1f} s"
    return f"the worker that scored it died{': ' if loss.reason else ''}{loss.reason}"
