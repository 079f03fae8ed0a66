"""The reward service: scenes and plans in, scores out. A failure becomes a row with a reason, never a number."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rewards.call_thread import CallStoppedError
from rewards.carriers import Scores
from rewards.compose import Reward
from rewards.prepared_scenes import PreparedScenes
from rewards.reward_stats import RewardStats, StatsCounter, reward_failures
from rewards.row_scoring import Batch, SceneRows, ScoredRows, UserReward, assemble, start_table
from rewards.score_checks import check_invalid, check_trajectories
from rlhf_drive.errors import ConfigError
from rlhf_drive.scenes import Scene, Trajectories

__all__ = [
    "LocalRewardService",
    "RewardService",
    "RewardStats",
    "check_invalid",
    "check_trajectories",
    "reward_failures",
]

_PARTS_PER_WORKER = 4
_LEAST_PART = 16


class RewardService(Protocol):
    """Scores plans, wherever that happens."""

    @property
    def stats(self) -> RewardStats:
        """What has been done so far."""
        ...

    def score(
        self, scenes: Sequence[Scene], trajectories: Trajectories, previous: Trajectories | None = None
    ) -> Scores:
        """Scores of N plans; row n was planned for ``scenes[trajectories.scene_index[n]]``."""
        ...

    def submit(
        self, scenes: Sequence[Scene], trajectories: Trajectories, previous: Trajectories | None = None
    ) -> Future[Scores]:
        """The same, while the caller goes on. What :meth:`score` would raise, the future raises."""
        ...

    def close(self) -> None:
        """Wait for what was submitted and end workers."""
        ...


class LocalRewardService:
    """Scores in this process, on threads: scenes side by side, and large groups of plans of one scene in parts.

    Scores do not depend on the number of threads, on how rows are split into calls, or on their order. User rewards are
    called in a thread of their own each, one call at a time; what they raise, return or hang on costs the rows they do
    so for (:func:`rewards.isolation.call_isolated`). A reward that holds the interpreter's lock while it hangs stops
    the whole process: for such rewards, and to kill what hangs, use the Ray engine. The scorer has no time limit here.

    Leaving the ``with`` block waits for what was submitted; leaving it by an exception cancels that instead.

    Example:
        >>> with LocalRewardService(build_reward([RewardSpec("pdms")])) as service:
        ...     pending = service.submit(scenes, trajectories)
        ...     ...  # sample the next plans
        ...     scores = pending.result()
    """

    def __init__(
        self,
        reward: Reward,
        *,
        workers: int = 0,
        cache_size: int = 1024,
        timeout_s: float = 0.0,
        cache_mb: int = 2048,
    ) -> None:
        """Set up; nothing heavy happens before the first call of `score`.

        Args:
            reward: What to compute.
            workers: Threads that run the scorer; 0 takes one per usable core, 1 stays in the calling thread.
            cache_size: Prepared scenes kept, the most recently used ones; 0 keeps none.
            timeout_s: Time that a user's reward may take for one row, and for one call; 0 = no limit. A row that takes
                longer alone is invalid. A function starts with one row a call and gets more as long as calls take less
                than half of `timeout_s`. One `score` loses at most 33 times `timeout_s` (of at least 0.25 s) per user
                reward to calls that hang or raise, then gives up the rows it has not tried.
            cache_mb: Memory that prepared scenes may take (MB); a scene of real size takes one or two.

        Raises:
            ConfigError: A number is negative or not finite.
        """
        numbers = {"workers": workers, "cache_size": cache_size, "timeout_s": timeout_s, "cache_mb": cache_mb}
        for name, value in numbers.items():
            if not 0 <= value < float("inf"):
                raise ConfigError(f"reward.{name} must be at least 0; got {value}.")
        self.reward = reward
        """What is computed."""
        self._workers = workers or _usable_cores()
        self._cache = PreparedScenes(cache_size, cache_mb * 1_000_000)
        self._users = [UserReward(term, timeout_s) for term in reward.user_terms]
        self._counter = StatsCounter()
        self._lock = threading.Lock()
        self._executor: ThreadPoolExecutor | None = None
        self._submitted: set[threading.Thread] = set()
        self._stop = threading.Event()

    @property
    def stats(self) -> RewardStats:
        """What has been done so far."""
        threads = [user.thread for user in self._users]
        return replace(
            self._counter.snapshot(),
            prepared=self._cache.prepared,
            cached_bytes=self._cache.nbytes,
            timeouts=sum(thread.timeouts for thread in threads),
            abandoned=sum(thread.abandoned for thread in threads),
            restarts=sum(thread.restarts for thread in threads),
        )

    def score(
        self, scenes: Sequence[Scene], trajectories: Trajectories, previous: Trajectories | None = None
    ) -> Scores:
        """Scores of N plans over S scenes.

        Args:
            scenes: S scenes.
            trajectories: ``[N, 8, 3]`` plans in their scene's t=0 ego frame, every 0.5 s.
            previous: ``[N, 8, 3]`` plans of the previous frame in that frame's ego frame, row by row; for EC.

        Returns:
            N rows. A row is invalid, with its reason, where the scene cannot be prepared, a plan holds NaN, or the
            scorer or a user's reward fails on it; a row keeps the first reason.

        Raises:
            DataError: The plans have another length or spacing, point at a scene that is not there, or those of the
                previous frame are needed and missing, or do not match.
        """
        return self._score(Batch(scenes, trajectories, previous), self._stop)

    def submit(
        self, scenes: Sequence[Scene], trajectories: Trajectories, previous: Trajectories | None = None
    ) -> Future[Scores]:
        """:meth:`score` in a thread, while the caller goes on; several may be under way.

        The plans are copied, so that their arrays may be used again at once. What :meth:`score` would raise, the future
        raises; a submission that is given up by ``close(cancel=True)`` raises CancelledError.
        """
        batch = Batch(tuple(scenes), _copied(trajectories), None if previous is None else _copied(previous))
        future: Future[Scores] = Future()
        future.set_running_or_notify_cancel()
        with self._lock:
            thread = threading.Thread(
                target=self._fulfil, args=(future, batch, self._stop), name="reward-submit", daemon=True
            )
            self._submitted.add(thread)
            thread.start()
        return future

    def close(self, *, cancel: bool = False) -> None:
        """End the threads. The service can be used again; it then starts new ones.

        Args:
            cancel: Whether to give up what was submitted, instead of waiting until it is done.
        """
        with self._lock:
            pending = self._submitted - {threading.current_thread()}  # a future's callback may close the service
            if cancel:
                self._stop.set()
                self._stop = threading.Event()
        for thread in pending:
            thread.join()
        with self._lock:
            executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown()
        for user in self._users:
            user.thread.close()

    def __enter__(self) -> LocalRewardService:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(cancel=kind is not None)

    def _fulfil(self, future: Future[Scores], batch: Batch, stop: threading.Event) -> None:
        """Score, and put what comes of it into the future."""
        try:
            scores = self._score(batch, stop)
        except BaseException as error:  # whoever asks for the result gets it
            future.set_exception(error)
        else:
            future.set_result(scores)
        finally:
            with self._lock:
                self._submitted.discard(threading.current_thread())

    def _score(self, batch: Batch, stop: threading.Event) -> Scores:
        """The scores; CancelledError where `stop` is set before they are there."""
        try:
            return self._score_columns(batch, stop)
        except CallStoppedError:
            raise CancelledError("the reward service was closed") from None

    def _score_columns(self, batch: Batch, stop: threading.Event) -> Scores:
        """The scorer on all scenes, then each user reward on the rows that are left."""
        two_frame = [term.name for term in (*self.reward.gates, *self.reward.terms) if term.two_frame]
        check_trajectories(batch.trajectories, len(batch.scenes), batch.previous, two_frame=two_frame)
        with self._counter.running():
            columns, failures = start_table(batch, self.reward.names)
            for part in self._scorer_parts(batch, tuple(failures), stop):
                failures |= part.failures
                for i, name in enumerate(self.reward.scorer.columns):
                    columns[name][part.rows] = part.values[:, i]
            for user in self._users:
                user.score(batch, columns, self.reward.scorer.columns, failures, stop)
            scores = assemble(self.reward, batch, columns, failures)
        self._counter.add(scores)
        return scores

    def _scorer_parts(self, batch: Batch, failed: Iterable[int], stop: threading.Event) -> Iterator[ScoredRows]:
        """The scorer's columns of all rows but those that failed before, part by part."""
        parts = _parts(batch.trajectories.scene_index, failed, self._workers)
        tasks = self._tasks(batch, parts, stop)
        if self._workers == 1 or sum(map(len, parts.values())) < 2:
            yield from (task() for task in tasks)
            return
        with self._lock:
            if self._executor is None:
                self._executor = ThreadPoolExecutor(self._workers, thread_name_prefix="reward")
            futures = [self._executor.submit(task) for task in tasks]
        try:
            for future in futures:
                yield future.result()
        finally:  # after an interrupt: what has not begun is not begun
            for future in futures:
                future.cancel()

    def _tasks(
        self, batch: Batch, parts: Mapping[int, Sequence[NDArray[np.int64]]], stop: threading.Event
    ) -> Iterator[Callable[[], ScoredRows]]:
        """One call for each part; nothing but the calls themselves holds a prepared scene."""

        def run(scene_rows: SceneRows, rows: NDArray[np.int64]) -> ScoredRows:
            if stop.is_set():
                raise CallStoppedError
            return scene_rows.score(rows)

        for scene_index, of_scene in parts.items():
            scene_rows = SceneRows(self.reward.scorer, self._cache, batch.scenes[scene_index], batch)
            yield from (partial(run, scene_rows, rows) for rows in of_scene)


def _parts(scene_index: NDArray[np.int64], failed: Iterable[int], workers: int) -> dict[int, list[NDArray[np.int64]]]:
    """Rows to score by scene, in parts that keep all workers busy."""
    rows = np.setdiff1d(np.arange(len(scene_index)), list(failed))
    if len(rows) == 0:
        return {}
    rows = rows[np.argsort(scene_index[rows], kind="stable")]
    most = max(_LEAST_PART, math.ceil(len(rows) / (_PARTS_PER_WORKER * workers))) if workers > 1 else len(rows)
    groups = np.split(rows, np.flatnonzero(np.diff(scene_index[rows])) + 1)
    return {int(scene_index[of[0]]): np.array_split(of, math.ceil(len(of) / most)) for of in groups}


def _copied(plans: Trajectories) -> Trajectories:
    return Trajectories(plans.poses.copy(), plans.scene_index.copy(), plans.dt_s)


def _usable_cores() -> int:
    """Cores this process may run on; its part of them where a launcher has started several on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE") or 1))
