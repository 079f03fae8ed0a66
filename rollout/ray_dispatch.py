"""Handing chunks to workers that sample, until every chunk is back or cannot be had."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any, Protocol

from rlhf_drive.errors import RlhfDriveError, RolloutError, describe_error
from rlhf_drive.workers import DispatchLoop, Loss, Slot, Worker, WorkerInfo, WorkerPool
from rollout.carriers import Rollout
from rollout.ray_worker import Loaded, Sampled, load_limit_s
from rollout.service import RolloutStats
from rollout.transport import PackedRollout, SampleCall
from rollout.weights import SentWeights

__all__ = ["RolloutDispatcher", "RolloutWorkerEnd"]

_NAMES = 5


class RolloutWorkerEnd(Worker, Protocol):
    """What a worker that samples is to the dispatcher."""

    def fetch(self, weights: SentWeights) -> Future[None]:
        """Bring weights near, whatever the worker is doing."""
        ...

    def load(self, weights: SentWeights) -> Future[Loaded]:
        """Have these weights from now on."""
        ...

    def sample(self, weights: SentWeights, call: SampleCall) -> Future[Sampled]:
        """Plans sampled with these weights."""
        ...


@dataclass(eq=False)
class _Chunk:
    """A call on its way."""

    call: SampleCall
    weights: SentWeights | None = None
    future: Future[Rollout] = field(default_factory=Future)
    losses: list[str] = field(default_factory=list)


class RolloutDispatcher:
    """Samples chunks on workers that may fail at any time.

    A chunk is sampled with the newest weights there are when a worker takes it up. It waits in one queue for whichever
    worker is free; one that was lost with its worker goes to the front.
    """

    def __init__(
        self,
        spawn: Callable[[], RolloutWorkerEnd],
        unpack: Callable[[PackedRollout], Rollout],
        alive: Callable[[], bool],
        *,
        workers: int,
        timeout_s: float,
        start_s: float,
        start_hint: str,
        max_retries: int,
    ) -> None:
        """Start the thread, which starts the workers.

        Args:
            spawn: Starts a worker.
            unpack: Makes a rollout of what a worker brings back.
            alive: Whether the engine is up at all.
            workers: How many.
            timeout_s: What sampling a chunk may take.
            start_s: What starting a worker may take.
            start_hint: What may be wrong where one does not start.
            max_retries: How often a chunk is tried again.
        """
        self._unpack, self._timeout_s, self._max_retries = unpack, timeout_s, max_retries
        self._pool: WorkerPool[RolloutWorkerEnd, _Chunk] = WorkerPool(
            spawn, self, workers=workers, kind="rollout", failure=RolloutError, start_s=start_s,
            start_hint=start_hint, silence_s=None,
        )  # fmt: skip
        self._queue: deque[_Chunk] = deque()
        self._open: set[_Chunk] = set()
        self._lock = threading.Lock()
        self._ended: RlhfDriveError | None = None
        self._weights: SentWeights | None = None
        self._has: dict[int, tuple[int, int]] = {}
        self._fetching: set[tuple[int, int]] = set()
        self._rollouts = self._retries = 0
        self._busy_s = 0.0
        self.ready = self._pool.ready
        """Done when every worker is up for the first time; an error if one cannot be started."""
        self._loop = DispatchLoop(
            self._pool, kind="rollout", failure=RolloutError, alive=alive, turn=self._turn, ended=self._end_all
        )
        self._loop.start()

    @property
    def workers(self) -> list[WorkerInfo]:
        """The workers that are up."""
        return [info for slot in self._pool.slots if (info := slot.info) is not None]

    def stats(self, push_s: float) -> RolloutStats:
        """What has been done so far."""
        return RolloutStats(
            rollouts=self._rollouts, busy_s=self._busy_s, workers=len(self._pool.slots), queued=len(self._queue),
            restarts=self._pool.counts["restarts"], retries=self._retries, push_s=push_s,
        )  # fmt: skip

    def use(self, weights: SentWeights) -> None:
        """Sample all that no worker has taken up yet with these weights."""
        self._weights = weights
        self.post(self._announce_all)

    def add(self, call: SampleCall) -> Future[Rollout]:
        """Sample `call`.

        Raises:
            RolloutError: The dispatcher has ended.
        """
        chunk = _Chunk(call)
        with self._lock:
            if self._ended is not None:
                raise RolloutError(f"The rollout workers have ended: {self._ended}") from self._ended
            self._open.add(chunk)
        self.post(lambda: self._queue.append(chunk))
        return chunk.future

    def end(self) -> None:
        """End the workers and the thread; what is under way gets an error."""
        self._loop.end()

    def post(self, event: Callable[[], None]) -> None:
        """Have the thread call `event`."""
        self._loop.post(event)

    def answered(self, index: int, task: _Chunk, answer: Any) -> None:
        """Go on to sampling once a worker has its weights; take a chunk that is back."""
        slot, weights = self._pool.slots[index], task.weights
        assert weights is not None
        if answer.number != weights.number:
            return self._fail(task, _wrong_version(self._name(slot.index, slot.info), weights, answer.number))
        self._has[index] = (slot.starts, answer.number)
        if isinstance(answer, Loaded):
            return self._sample(slot, task) if not task.future.done() else self._close(task)
        self._rollouts += len(answer.rollout.tokens)
        self._busy_s += answer.busy_s
        try:
            rollout = self._unpack(answer.rollout)
        except Exception as error:  # the driver's own device has no room for it
            return self._fail(task, error)
        self._close(task)
        with contextlib.suppress(InvalidStateError):  # the caller gave up
            task.future.set_result(rollout)

    def raised(self, index: int, task: _Chunk, error: BaseException) -> None:
        """Pass on an error of the policy as it is, with a note that says where it was raised."""
        where = self._name(index, self._pool.slots[index].info)
        error.add_note(f"Raised on {where}, which was to sample {task.call}.")
        self._fail(task, error)

    def lost(self, index: int, task: _Chunk, loss: Loss) -> None:
        """Have a chunk sampled again by another worker, unless that was tried too often."""
        task.losses.append(self._told(index, task, loss))
        if len(task.losses) > self._max_retries:
            return self._fail(task, _lost_too_often(task.call, task.losses))
        if not task.future.done():
            self._retries += 1
        self._queue.appendleft(task)

    def hopeless(self, error: RlhfDriveError) -> None:
        """Tell everybody who waits."""
        for chunk in list(self._open):
            self._fail(chunk, error)
        self._queue.clear()

    def _turn(self, now: float) -> None:
        """Hand out work."""
        for slot in self._pool.slots:
            while slot.free and self._queue:
                chunk = self._queue.popleft()
                if not chunk.future.done():
                    self._hand(slot, chunk)
                else:
                    self._close(chunk)

    def _hand(self, slot: Slot[RolloutWorkerEnd, _Chunk], chunk: _Chunk) -> None:
        weights = chunk.weights = self._weights
        assert weights is not None  # the service pushes before it submits
        if self._has.get(slot.index) == (slot.starts, weights.number):
            return self._sample(slot, chunk)
        self._call(slot, chunk, lambda worker: worker.load(weights), load_limit_s(weights))

    def _sample(self, slot: Slot[RolloutWorkerEnd, _Chunk], chunk: _Chunk) -> None:
        weights = chunk.weights
        assert weights is not None
        self._call(slot, chunk, lambda worker: worker.sample(weights, chunk.call), self._timeout_s)

    def _call(
        self,
        slot: Slot[RolloutWorkerEnd, _Chunk],
        chunk: _Chunk,
        call: Callable[[RolloutWorkerEnd], Future[Any]],
        limit_s: float,
    ) -> None:
        try:
            self._pool.hand(slot, chunk, call, limit_s)
        except Exception as problem:  # the object store is full
            error = RolloutError(f"{chunk.call} cannot be sent to a rollout worker: {describe_error(problem)}")
            error.__cause__ = problem
            self._fail(chunk, error)

    def _announce_all(self) -> None:
        for slot in self._pool.slots:
            self._announce(slot)

    def _announce(self, slot: Slot[RolloutWorkerEnd, _Chunk]) -> None:
        """Let a worker fetch the newest weights early, once it is through with those before: a worker that hangs would
        otherwise hold on to every version there was. One that cannot fetch says so when it is to load."""
        process, weights = (slot.index, slot.starts), self._weights
        if slot.state != "ready" or slot.worker is None or weights is None or process in self._fetching:
            return

        def fetched() -> None:
            self._fetching.discard(process)
            if weights is not self._weights and process == (slot.index, slot.starts):
                self._announce(slot)

        self._fetching.add(process)
        slot.worker.fetch(weights).add_done_callback(lambda _: self.post(fetched))

    def _told(self, index: int, chunk: _Chunk, loss: Loss) -> str:
        """What happened to a worker, in words."""
        slot, weights, name = self._pool.slots[index], chunk.weights, self._name(index, loss.info)
        loaded = self._has.get(index) == (slot.starts - 1, weights.number if weights else 0)
        aim = f"to sample {chunk.call} with {weights}" if loaded else f"to load {weights}"
        if loss.kind == "died":
            return f"{name} died while it was {aim}{': ' if loss.reason else ''}{loss.reason}"
        return f"the driver waited {loss.seconds:g} s for {name} {aim}"

    def _name(self, index: int, info: WorkerInfo | None) -> str:
        place = f" ({info.host}, process {info.pid})" if info is not None else ""
        return f"rollout worker {index}{place}"

    def _fail(self, chunk: _Chunk, error: BaseException) -> None:
        self._close(chunk)
        with contextlib.suppress(InvalidStateError):
            chunk.future.set_exception(error)

    def _close(self, chunk: _Chunk) -> None:
        """Let go of a chunk."""
        with self._lock:
            self._open.discard(chunk)
        if chunk.future.cancelled():
            chunk.future.set_running_or_notify_cancel()

    def _end_all(self, error: RlhfDriveError) -> None:
        """Tell everybody who still waits that the thread has ended."""
        with self._lock:
            self._ended = error
            chunks = list(self._open)
        for chunk in chunks:
            self._fail(chunk, error)


def _wrong_version(name: str, weights: SentWeights, number: int) -> RolloutError:
    return RolloutError(
        f"{name} answered with the weights of push {number} where those of push {weights.number}, {weights}, were "
        "asked for; this must not happen, and its plans are not used."
    )


def _lost_too_often(call: SampleCall, losses: list[str]) -> RolloutError:
    names = ", ".join(repr(scene.token) for scene in call.scenes[:_NAMES])
    more = f" and {len(call.scenes) - _NAMES} more" if len(call.scenes) > _NAMES else ""
    told = "; ".join(f"({i}) {loss}" for i, loss in enumerate(losses, 1))
    return RolloutError(
        f"{call} could not be sampled; workers were lost over them {len(losses)} times: {told}. Scenes: {names}{more}. "
        "A worker that dies has often run out of memory: lower rollout.scenes_per_chunk or rollout.workers. One that "
        "is slow needs a higher rollout.timeout_s, or fewer scenes_per_chunk."
    )
