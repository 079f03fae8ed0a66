"""The reward service on Ray: the in-process engine in many processes, on one machine or many."""

from __future__ import annotations

import math
import socket
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from types import TracebackType

from rewards.carriers import Scores
from rewards.compose import RewardConfig
from rewards.ray_dispatch import Dispatcher, Limits, RayRewardStats
from rewards.ray_scenes import SceneReferences
from rewards.ray_shards import Job
from rewards.ray_worker import RayWorker, WorkerOptions
from rewards.score_checks import check_trajectories
from rlhf_drive.errors import ConfigError, RewardError, RlhfDriveError
from rlhf_drive.scenes import Scene, Trajectories
from rlhf_drive.workers import Connection, WorkerInfo, WorkerLostError, connect, import_ray, wait_for_exit

__all__ = ["RayRewardService", "RayRewardStats"]

_SCENES_BYTES = 100 * 2**20
_START_GRACE_S = 30.0


class RayRewardService:
    """Scores on Ray actors; the scores are those of the in-process engine bit for bit, on any number of workers.

    A batch is cut into shards. A scene stays with one worker, which keeps it prepared; a large group of one scene is
    spread over several. A worker that dies is replaced and its shard scored elsewhere; one that hangs is ended first. A
    shard that keeps doing this is cut up until the rows that cause it are found: these become invalid as `worker_died`
    or `timeout`, all others are scored. Every row comes back once, and no wait is without a limit.

    Memory: a scene is pickled into Ray's object store once, and stays there while it is among the `cache_size` scenes
    used last and these take less than 100 MB together; a worker copies what it needs, so nothing is pinned by views.
    Each worker keeps up to `cache_size` scenes of its own prepared. Plans and scores travel inside the calls and are
    freed with them. A reward that runs out of time leaves its thread behind; a worker with many of them is replaced.

    With no `address`, a Ray that this process has started or joined already is used, then the one that RAY_ADDRESS or
    `ray start` offers, and otherwise one is started on this machine, and stopped again by the :meth:`close` of the last
    service that uses it.

    Example:
        >>> with RayRewardService(reward.config, workers=8, address="auto") as service:  # doctest: +SKIP
        ...     scores = service.score(scenes, trajectories)
    """

    def __init__(
        self,
        config: RewardConfig,
        *,
        workers: int = 2,
        cache_size: int = 1024,
        timeout_s: float = 0.0,
        threads_per_worker: int = 1,
        address: str | None = None,
        max_retries: int = 2,
        num_cpus_per_worker: float = 1,
        shard_rows: int = 256,
        stall_s: float = 10.0,
        call_s: float = 600.0,
        start_s: float = 120.0,
        cache_mb: int = 2048,
    ) -> None:
        """Start the workers and wait until they are up.

        Args:
            config: What to compute, as ``build_reward(…).config`` has it: paths in it hold on every machine.
            workers: Processes; 0 takes as many as the cores of the cluster allow.
            cache_size: Scenes that each worker keeps prepared.
            timeout_s: Time that a user's reward may take for one row; 0 = no limit.
            threads_per_worker: Threads that score in each worker.
            address: `host:port` of a Ray cluster, `auto` for the one that runs here, `local` to start one.
            max_retries: How often a row is tried again after a worker died that held it alone.
            num_cpus_per_worker: Cores that Ray sets aside for each.
            shard_rows: Rows that a worker gets at once.
            stall_s: How long beyond `timeout_s` a worker may give no sign of life, as when code without a Python
                instruction holds its interpreter; with a `timeout_s` only.
            call_s: How long scoring a shard may take, users' rewards apart; the first call compiles.
            start_s: How long Ray may take to start the workers.
            cache_mb: Memory that prepared scenes may take in each worker (MB).

        Raises:
            ConfigError: An argument is out of range, ray is not installed, the reward cannot be built, here or on a
                worker, or the address does not answer.
            RewardError: Ray cannot start the workers in time, or they die while they start.
        """
        _check_sizes(
            workers=workers, cache_size=cache_size, timeout_s=timeout_s, max_retries=max_retries,
            num_cpus_per_worker=num_cpus_per_worker, threads_per_worker=threads_per_worker - 1,
            shard_rows=shard_rows - 1, cache_mb=cache_mb, stall_s=stall_s, call_s=call_s, start_s=start_s,
        )  # fmt: skip
        self.reward = config.build()
        """What is computed."""
        self._address, self._workers, self._cache_size = address, workers, cache_size
        self._shard_rows, self._max_retries = shard_rows, max_retries
        self._options = WorkerOptions(
            self.reward.config, threads_per_worker, cache_size, cache_mb, timeout_s, num_cpus_per_worker
        )
        self._limits = Limits(timeout_s, len(self.reward.user_terms), start_s, stall_s, call_s)
        self._dispatcher: Dispatcher | None = None
        self._connection: Connection | None = None
        self._lock = threading.Lock()
        self._stats = RayRewardStats()
        self._start()

    @property
    def stats(self) -> RayRewardStats:
        """What has been done since the workers were started."""
        return self._stats if self._dispatcher is None else self._dispatcher.stats

    @property
    def workers(self) -> list[WorkerInfo]:
        """The workers that are up."""
        return [] if self._dispatcher is None else self._dispatcher.workers

    def score(
        self, scenes: Sequence[Scene], trajectories: Trajectories, previous: Trajectories | None = None
    ) -> Scores:
        """Scores of N plans over S scenes; see :meth:`rewards.LocalRewardService.score`.

        Raises:
            DataError: The trajectories have another length or spacing, or point at a scene that is not there.
            RewardError: Scoring came to an end: no worker can be started any more, or Ray was shut down.
        """
        future = self.submit(scenes, trajectories, previous)
        try:
            return future.result()
        finally:
            future.cancel()  # after an interrupt nobody wants the rest; a future that is done takes no notice

    def submit(
        self, scenes: Sequence[Scene], trajectories: Trajectories, previous: Trajectories | None = None
    ) -> Future[Scores]:
        """:meth:`score`, while the caller goes on; several may be under way.

        The plans are copied, so that their arrays may be used again at once. What :meth:`score` would raise, the future
        raises. Cancelling it drops what is not scored yet.
        """
        plans, before = _copied(trajectories), None if previous is None else _copied(previous)
        job = Job(tuple(scenes), plans, before, self.reward.names, self.reward.scorer.info)
        two_frame = [term.name for term in (*self.reward.gates, *self.reward.terms) if term.two_frame]
        try:
            check_trajectories(plans, len(scenes), before, two_frame=two_frame)
            with self._lock:
                dispatcher = self._dispatcher or self._start()
            dispatcher.add(job)
        except RlhfDriveError as error:
            job.future.set_exception(error)
        return job.future

    def close(self, *, cancel: bool = False) -> None:
        """End the workers, and Ray if it was started here. The service can be used again; it then starts new ones.

        Args:
            cancel: Whether to give up what was submitted, instead of waiting until it is done.
        """
        dispatcher, self._dispatcher = self._dispatcher, None
        if dispatcher is None:
            return
        dispatcher.close(cancel=cancel)
        infos = dispatcher.workers
        dispatcher.end()
        self._stats = dispatcher.stats
        if self._connection is not None:
            self._connection.leave()
        wait_for_exit(info.pid for info in infos if info.host == socket.gethostname())

    def __enter__(self) -> RayRewardService:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(cancel=kind is not None)

    def _start(self) -> Dispatcher:
        """Workers, and what they run on."""
        ray = import_ray()
        cpus = self._options.num_cpus
        needed = math.ceil(max(self._workers, 1) * cpus)
        self._connection = connect(ray, self._address, needed, failure=RewardError)
        workers = self._workers or max(1, int(ray.cluster_resources().get("CPU", 1) // (cpus or 1)))
        scenes = SceneReferences(self._cache_size, _SCENES_BYTES, ray.put)
        self._dispatcher = Dispatcher(
            partial(RayWorker, self._options), scenes.get, ray.is_initialized, self._limits,
            workers=workers, remember=workers * max(self._cache_size, 1),
            max_rows=self._shard_rows, max_retries=self._max_retries,
        )  # fmt: skip
        try:
            self._dispatcher.ready.result(self._limits.start_s + _START_GRACE_S)
        except BaseException as error:
            self.close(cancel=True)
            if isinstance(error, Exception):
                raise _start_error(error) from error
            raise
        return self._dispatcher


def _check_sizes(**values: float) -> None:
    for name, value in values.items():
        if not value >= 0 or math.isinf(value):
            least = 1 if name in ("threads_per_worker", "shard_rows") else 0
            raise ConfigError(f"{name} of the reward service must be at least {least}; got {value + least:g}.")


def _start_error(error: Exception) -> RlhfDriveError:
    """Why the workers did not come up, and what to do."""
    hint = "Every machine needs rlhf-drive in the same version, and the plug-ins under the same paths."
    if isinstance(error, RewardError | WorkerLostError):
        return RewardError(f"The reward workers do not start: {str(error).rstrip('.')}. {hint}")
    return ConfigError(f"The reward cannot be built on a Ray worker: {str(error).rstrip('.')}. {hint}")


def _copied(plans: Trajectories) -> Trajectories:
    return Trajectories(plans.poses.copy(), plans.scene_index.copy(), plans.dt_s)
