"""A process that scores: the Ray actor around the in-process engine, and the driver's end of it."""

from __future__ import annotations

import os
import pickle
import socket
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from rewards.carriers import Scores
from rewards.compose import RewardConfig
from rewards.service import LocalRewardService
from rlhf_drive.scenes import Scene, Trajectories
from rlhf_drive.workers.actor import RayActor, WorkerInfo, WorkerLostError, import_ray, why_lost

__all__ = ["RayWorker", "RewardWorker", "ShardResult", "WorkerOptions"]

_FETCH_TIMEOUT_S = 60.0


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
                raise WorkerLostError(f"it could not fetch a scene: {why_lost(error)}") from error
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
        self._actor = RayActor(RewardWorker, options, num_cpus=options.num_cpus)
        self.start, self.ping, self.gone, self.kill = (
            self._actor.start, self._actor.ping, self._actor.gone, self._actor.kill
        )  # fmt: skip

    def score(
        self, scenes: Sequence[tuple[int, Sequence[Any]]], trajectories: Trajectories, previous: Trajectories | None
    ) -> Future[ShardResult]:
        """:meth:`RewardWorker.score`."""
        return self._actor.call("score", scenes, trajectories, previous)


def _own(trajectories: Trajectories) -> Trajectories:
    """A copy that can be written to."""
    return Trajectories(np.array(trajectories.poses), np.array(trajectories.scene_index), trajectories.dt_s)
