"""A process that scores: the Ray actor around the in-process engine, and the driver's end of it."""

from __future__ import annotations

import os
import pickle
import site
import socket
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rewards.carriers import Scores
from rewards.compose import RewardConfig
from rewards.service import LocalRewardService
from rlhf_drive.errors import ConfigError, RewardError
from rlhf_drive.scenes import Scene, Trajectories

__all__ = ["RayWorker", "RewardWorker", "ShardResult", "WorkerInfo", "WorkerLostError", "WorkerOptions", "import_ray"]

_FETCH_TIMEOUT_S = 60.0


def import_ray() -> Any:
    """The package `ray`.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            f"Scoring on Ray needs the package ray, which cannot be imported ({error}). Install it with "
            "pip install 'rlhf-drive[ray]', or use the local reward service."
        ) from error
    return ray


@dataclass(frozen=True)
class WorkerInfo:
    """Where a worker runs."""

    pid: int
    """Its process."""
    host: str
    """Name of its machine."""


@dataclass(frozen=True)
class WorkerOptions:
    """What a worker is made of."""

    reward: RewardConfig
    """What it computes."""
    threads: int
    """Threads that score."""
    cache_size: int
    """Scenes it keeps prepared."""
    cache_mb: int
    """Memory that these may take (MB)."""
    timeout_s: float
    """Time that a user's reward may take for one row; 0 = no limit."""
    num_cpus: float
    """Cores that Ray sets aside for it."""


@dataclass(frozen=True)
class ShardResult:
    """What a worker brings back."""

    scores: Scores
    """One row for each plan of the call."""
    counts: Mapping[str, int]
    """By how much the counts of `RewardStats` grew that only the worker knows: `prepared`, `timeouts`, `abandoned`."""
    cached_bytes: int
    """Memory of the prepared scenes it keeps."""
    abandoned: int
    """Calls that the worker has given up since it was started; each leaves a thread behind that may never end."""


class WorkerLostError(RewardError):
    """A worker's process is gone, or Ray cannot reach it."""


class RewardWorker:
    """The engine of this process behind methods that Ray calls from elsewhere.

    Scenes are kept by the number that the driver gave them, unpickled from bytes: their arrays are this process's own
    and can be written to. Ray's arrays are read-only views of shared memory; Numba would compile every kernel anew for
    them, and each view would hold its piece of shared memory.
    """

    def __init__(self, options: WorkerOptions) -> None:
        """Set up; whatever may fail happens in :meth:`start`."""
        self._options = options
        self._scenes: OrderedDict[int, tuple[Scene, int]] = OrderedDict()
        self._scenes_bytes = 0

    def start(self) -> WorkerInfo:
        """Build the reward.

        Raises:
            RlhfDriveError: It cannot be built here, say because a plug-in's file is not on this machine.
        """
        o = self._options
        self._service = LocalRewardService(
            o.reward.build(), workers=o.threads, cache_size=o.cache_size, timeout_s=o.timeout_s, cache_mb=o.cache_mb
        )
        return WorkerInfo(os.getpid(), socket.gethostname())

    def score(
        self, scenes: Sequence[tuple[int, Sequence[Any]]], trajectories: Trajectories, previous: Trajectories | None
    ) -> ShardResult:
        """Scores of N plans.

        Args:
            scenes: Number of each scene and, as the only item of a list, Ray's reference to its pickled bytes: within
                a list Ray fetches nothing that is not asked for.
            trajectories: N plans.
            previous: N plans of the previous frame.
        """
        here = [self._scene(number, reference[0]) for number, reference in scenes]
        before = self._service.stats
        try:
            scores = self._service.score(here, _own(trajectories), None if previous is None else _own(previous))
        except KeyboardInterrupt as interrupt:  # Ray would take it for its own and end the call without a word
            raise RuntimeError("KeyboardInterrupt") from interrupt
        self._forget()
        after = self._service.stats
        counts = {name: getattr(after, name) - getattr(before, name) for name in ("prepared", "timeouts", "abandoned")}
        return ShardResult(scores, counts, after.cached_bytes, after.abandoned)

    def ping(self) -> None:
        """Nothing; that it returns shows that the interpreter runs."""

    def linger(self) -> None:
        """Never returns; that the call fails shows that the process is gone."""
        threading.Event().wait()

    def _scene(self, number: int, reference: Any) -> Scene:
        """The scene of that number, fetched if it is not kept here."""
        if number not in self._scenes:
            ray = import_ray()
            try:
                data: bytes = ray.get(reference, timeout=_FETCH_TIMEOUT_S)
            except ray.exceptions.RayError as error:  # no fault of the rows: another worker may be luckier
                raise WorkerLostError(f"it could not fetch a scene: {_why_lost(error)}") from error
            self._scenes[number] = pickle.loads(data), len(data)
            self._scenes_bytes += len(data)
        self._scenes.move_to_end(number)
        return self._scenes[number][0]

    def _forget(self) -> None:
        """Drop the scenes used longest ago until the rest may be kept."""
        o = self._options
        while self._scenes and (len(self._scenes) > o.cache_size or self._scenes_bytes > o.cache_mb * 1_000_000):
            self._scenes_bytes -= self._scenes.popitem(last=False)[1][1]


class RayWorker:
    """The driver's end of one worker. Calls return futures at once; a worker that is gone makes them raise."""

    def __init__(self, options: WorkerOptions) -> None:
        """Ask Ray for the process."""
        self._ray = import_ray()
        # A dead actor is replaced, not restarted, and no call is repeated by Ray: what a row costs is counted here.
        actor = self._ray.remote(
            num_cpus=options.num_cpus,
            max_restarts=0,
            max_task_retries=0,
            concurrency_groups={"control": 2},
            scheduling_strategy="SPREAD",
            enable_task_events=False,  # Ray would keep a record of each call
            runtime_env={"env_vars": worker_environment()},
        )(RewardWorker)
        self._actor = actor.remote(options)

    def start(self) -> Future[WorkerInfo]:
        """:meth:`RewardWorker.start`."""
        return self._future(self._actor.start.remote())

    def score(
        self, scenes: Sequence[tuple[int, Sequence[Any]]], trajectories: Trajectories, previous: Trajectories | None
    ) -> Future[ShardResult]:
        """:meth:`RewardWorker.score`."""
        return self._future(self._actor.score.remote(scenes, trajectories, previous))

    def ping(self) -> Future[None]:
        """Comes back at once while the worker's interpreter runs, even if it is scoring."""
        return self._future(self._actor.ping.options(concurrency_group="control").remote())

    def gone(self) -> Future[None]:
        """Raises when the worker is gone, and only then."""
        return self._future(self._actor.linger.options(concurrency_group="control").remote())

    def kill(self) -> None:
        """End the process, whatever it is doing."""
        self._ray.kill(self._actor)

    def _future(self, reference: Any) -> Future[Any]:
        """The answer to a call: its value, the error it raised, or `WorkerLostError`."""
        outer: Future[Any] = Future()

        def pass_on(inner: Future[Any]) -> None:
            error = inner.exception()
            if error is None:
                outer.set_result(inner.result())
            elif isinstance(error, self._ray.exceptions.RayTaskError):
                outer.set_exception(error.cause if isinstance(error.cause, Exception) else error)
            else:
                outer.set_exception(WorkerLostError(_why_lost(error)))

        reference.future().add_done_callback(pass_on)
        return outer


def worker_environment() -> Mapping[str, str]:
    """Environment of a worker: single-threaded libraries that do not spin, our packages, and Numba's cache."""
    variables = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    root = str(Path(__file__).resolve().parents[1])
    if root not in (*site.getsitepackages(), site.getusersitepackages()):  # a source tree that may not be installed
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    if cache := os.environ.get("NUMBA_CACHE_DIR"):
        variables["NUMBA_CACHE_DIR"] = cache
    return variables


def _why_lost(error: BaseException) -> str:
    """What Ray says about the end of a worker, in a line and without its advice."""
    text = " ".join(str(error).split())
    detail = text.partition("Worker exit detail: ")[2] or text.partition("The actor is dead because ")[2] or text
    return f"{type(error).__name__}: {detail.partition(' Some common causes')[0][:200]}"


def _own(trajectories: Trajectories) -> Trajectories:
    """A copy that can be written to."""
    return Trajectories(np.array(trajectories.poses), np.array(trajectories.scene_index), trajectories.dt_s)
