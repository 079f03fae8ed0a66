"""The rollout service on Ray: the in-process engine in many processes, on one machine or many."""

from __future__ import annotations

import logging
import math
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from types import TracebackType
from typing import Any, Literal

from rlhf_drive.errors import ConfigError, RlhfDriveError, RolloutError, describe_error
from rlhf_drive.policies import Decoding, Policy
from rlhf_drive.policies.checkpoints import describe_difference, describe_policy
from rlhf_drive.policies.feature_cache import FeatureCache
from rlhf_drive.scenes import Scene
from rlhf_drive.workers import Connection, WorkerInfo, WorkerLostError, connect, import_ray, wait_for_exit
from rollout.carriers import Rollout
from rollout.ray_dispatch import RolloutDispatcher
from rollout.ray_worker import RayRolloutWorker, WorkerOptions
from rollout.service import RolloutStats
from rollout.transport import PackedRollout, SampleCall, SentScene
from rollout.weights import WeightSender, named_weights

__all__ = ["RayRolloutService"]

_START_GRACE_S = 30.0
_STRATEGIES = {"spread": "SPREAD", "pack": "DEFAULT"}
_SMALL_STORE_BYTES = 200 * 2**20
_logger = logging.getLogger(__name__)


class RayRolloutService:
    """Samples on Ray actors; plans, traces and log-probabilities are those of the in-process engine bit for bit.

    Each worker holds a copy of the policy. A call of :meth:`submit` is one chunk, decoded as one batch by one worker,
    so that the number of workers changes nothing; that numbers agree to the last bit needs the same kind of device and
    the same number of threads (``int(cpus_per_worker)``). Workers get network inputs, never a scene's reference.

    Weights go into Ray's object store once and from there to all workers, the frozen ones a single time. A chunk is
    sampled with the newest weights when a worker takes it up. A worker that dies, or is not done in time, is replaced
    and its chunk sampled again; no wait is without a limit.

    With no `address`, a Ray that this process has started or joined already is used, then the one that RAY_ADDRESS or
    `ray start` offers, and otherwise one is started on this machine, and stopped again by the :meth:`close` of the last
    service that uses it. GPUs were not at hand when this was written: their use has not been run.

    Example:
        >>> with RayRolloutService(policy, seed=0, workers=8, address="auto") as service:  # doctest: +SKIP
        ...     service.push_weights(policy, version=1)
        ...     futures = [service.submit(chunk, 8, decoding, step=1) for chunk in chunks]
        ...     rollouts = [future.result() for future in futures]
    """

    def __init__(
        self,
        policy: Policy,
        *,
        seed: int,
        workers: int,
        cpus_per_worker: float = 1.0,
        gpus_per_worker: float = 0.0,
        timeout_s: float = 600.0,
        address: str | None = None,
        placement: Literal["spread", "pack"] = "spread",
        start_s: float = 300.0,
        max_retries: int = 2,
        chunk_mb: int = 64,
        max_rows: int = 2048,
        features: FeatureCache | None = None,
    ) -> None:
        """Start the workers and wait until they are up.

        Args:
            policy: What to sample from, until :meth:`push_weights` says otherwise; with its adapters, if it has any.
            seed: Keys all random numbers together with step, scene token and sample.
            workers: Processes.
            cpus_per_worker: Cores that Ray sets aside for each, and threads that it computes with.
            gpus_per_worker: GPUs for each, also parts of one such as 0.5; 0 = it samples on its cores.
            timeout_s: How long sampling a chunk may take, until its worker is replaced and another one tries.
            address: `host:port` of a Ray cluster, `auto` for the one that runs here, `local` to start one.
            placement: `spread` puts workers on as many machines as there are; `pack` fills one after the other.
            start_s: How long Ray may take to start the workers.
            max_retries: How often a chunk is tried again whose worker was lost.
            chunk_mb: Size in which weights travel (MB).
            max_rows: Rows decoded at once; as in the in-process engine.
            features: Cache of network inputs, shared with the trainer.

        Raises:
            ConfigError: An argument is out of range, ray is not installed, the policy cannot be built on a worker, or
                the address does not answer.
            RolloutError: Ray cannot start the workers in time, or they die while they start.
        """
        _check(
            placement, workers=workers - 1, cpus_per_worker=cpus_per_worker, gpus_per_worker=gpus_per_worker,
            timeout_s=timeout_s, start_s=start_s, max_retries=max_retries, chunk_mb=chunk_mb - 1,
            max_rows=max_rows - 1,
        )  # fmt: skip
        self.policy = policy
        """The policy whose weights were pushed last."""
        self.features = features or FeatureCache()
        self._description = describe_policy(policy)
        self._lock, self._push_lock = threading.Lock(), threading.Lock()
        self._pushed = False
        self._push_s = 0.0
        self._stats = RolloutStats()
        self._connection: Connection | None = None
        self._dispatcher: RolloutDispatcher | None = None
        options = WorkerOptions(
            self._description, getattr(policy, "precision", None), seed, max_rows, cpus_per_worker, gpus_per_worker
        )
        self._new_sender = partial(WeightSender, import_ray().put, chunk_mb * 1_000_000)
        self._sender = self._new_sender()
        self._start(options, address, _STRATEGIES[placement], workers, timeout_s, start_s, max_retries)

    @property
    def stats(self) -> RolloutStats:
        """What has been done so far."""
        return self._stats if self._dispatcher is None else self._dispatcher.stats(self._push_s)

    @property
    def workers(self) -> list[WorkerInfo]:
        """The workers that are up."""
        return [] if self._dispatcher is None else self._dispatcher.workers

    def push_weights(self, policy: Policy, version: int) -> None:
        """Use these weights for all that no worker has taken up yet.

        They are copied into the object store; the workers load them while the caller goes on. Where weights are divided
        among processes (FSDP2), the others must call :meth:`rollout.follower.Follower.push_weights`.

        Raises:
            ConfigError: The policy is built differently from the one that the service was started with.
            RolloutError: The object store does not take them, or the service is closed.
        """
        started = time.perf_counter()
        if (described := describe_policy(policy)) != self._description:
            raise ConfigError(
                "Weights of another policy were pushed to the rollout service "
                f"({describe_difference(described, self._description)}). Start a service for that policy."
            )
        dispatcher = self._running()
        with self._push_lock:
            try:
                weights = self._sender.send(policy, version)
            except import_ray().exceptions.RayError as error:
                raise RolloutError(
                    f"Weights version {version} cannot be put into Ray's object store: {describe_error(error)}. Give "
                    "it more memory (ray start --object-store-memory), or room to spill to."
                ) from error
            dispatcher.use(weights)
            self.policy, self._pushed = policy, True
            self._push_s += time.perf_counter() - started

    def submit(
        self,
        scenes: Sequence[Scene],
        num_generations: int,
        decoding: Decoding,
        *,
        step: int,
        keep_experts: bool = False,
    ) -> Future[Rollout]:
        """:meth:`sample` of one chunk, while the caller goes on; many may be under way, from several threads.

        What :meth:`sample` would raise while sampling, the future raises. Cancelling it drops what is not begun yet.

        Raises:
            ConfigError: The policy's process cannot decode so.
            RolloutError: The service is closed.
        """
        policy = self.policy
        policy.process.check(policy.tokenizer.length, decoding)
        dispatcher = self._running()
        with self._lock:
            if not self._pushed:
                self.push_weights(policy, 0)
        rows = self.features.rows(policy, scenes)
        sent = tuple(SentScene(scene.token, row) for scene, row in zip(scenes, rows, strict=True))
        return dispatcher.add(SampleCall(sent, num_generations, decoding, step, keep_experts))

    def sample(
        self,
        scenes: Sequence[Scene],
        num_generations: int,
        decoding: Decoding,
        *,
        step: int,
        keep_experts: bool = False,
    ) -> Rollout:
        """G plans for each scene; see :meth:`rollout.LocalRolloutService.sample`.

        Raises:
            ConfigError: The policy's process cannot decode so.
            RolloutError: Workers were lost over the scenes too often, none can be started, or the service was closed.
        """
        future = self.submit(scenes, num_generations, decoding, step=step, keep_experts=keep_experts)
        try:
            return future.result()
        finally:
            future.cancel()  # after an interrupt nobody wants the rest; a future that is done takes no notice

    def close(self) -> None:
        """End the workers, and Ray if no other service of this process uses the one that was started here."""
        dispatcher, self._dispatcher = self._dispatcher, None
        if dispatcher is not None:
            infos = dispatcher.workers
            dispatcher.end()
            self._stats = dispatcher.stats(self._push_s)
            self._sender = self._new_sender()  # which holds no references any more
        if self._connection is not None:
            self._connection.leave()
        if dispatcher is not None:
            wait_for_exit(info.pid for info in infos if info.host == socket.gethostname())

    def __enter__(self) -> RayRolloutService:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _running(self) -> RolloutDispatcher:
        if self._dispatcher is None:
            raise RolloutError("The rollout service is closed. Start another one.")
        return self._dispatcher

    def _unpacked(self, packed: PackedRollout) -> Rollout:
        return packed.unpacked(self.policy.device)

    def _start(
        self, options: WorkerOptions, address: str | None, strategy: str, workers: int, timeout_s: float,
        start_s: float, max_retries: int,
    ) -> None:  # fmt: skip
        """Ray, and the workers on it."""
        ray, nbytes = import_ray(), sum(w.numel() * w.element_size() for w in named_weights(self.policy).values())
        self._connection = connect(
            ray, address, math.ceil(workers * options.num_cpus), failure=RolloutError,
            store_bytes=_SMALL_STORE_BYTES + 2 * nbytes,
        )  # fmt: skip
        try:
            # A machine of our own is shared with nobody, and with the reward workers we share it as it comes.
            reserve = not self._connection.local
            hint = _check_resources(ray.cluster_resources(), options, workers, reserve, nbytes)
            self._dispatcher = RolloutDispatcher(
                partial(RayRolloutWorker, options, strategy, reserve), self._unpacked, ray.is_initialized,
                workers=workers, timeout_s=timeout_s, start_s=start_s, start_hint=hint, max_retries=max_retries,
            )  # fmt: skip
            self._dispatcher.ready.result(start_s + _START_GRACE_S)
        except BaseException as error:
            self.close()
            if isinstance(error, RlhfDriveError | TimeoutError):
                raise _start_error(error) from error
            raise


def _check(placement: str, **values: float) -> None:
    if placement not in _STRATEGIES:
        raise ConfigError(f"Unknown ray.placement {placement!r}. Known: {', '.join(_STRATEGIES)}.")
    for name, value in values.items():
        if not value >= 0 or math.isinf(value):
            least = 1 if name in ("workers", "chunk_mb", "max_rows") else 0
            raise ConfigError(f"{name} of the rollout service must be at least {least}; got {value + least:g}.")


def _check_resources(has: dict[str, Any], options: WorkerOptions, workers: int, reserve: bool, nbytes: int) -> str:
    """What Ray has and what is asked for; refuses what one machine can never give."""
    gpus, cpus = has.get("GPU", 0.0), has.get("CPU", 0.0)
    if not reserve and options.num_gpus * workers > gpus:
        raise ConfigError(
            f"{workers} rollout workers with {options.num_gpus:g} GPUs each need {options.num_gpus * workers:g}; this "
            f"machine has {gpus:g}. Lower rollout.workers or rollout.gpus_per_worker (0 samples on cores)."
        )
    if (store := has.get("object_store_memory", math.inf)) < 2 * nbytes:
        _logger.warning(
            "Ray's object store holds %.0f MB and two versions of the weights take %.0f MB: they will spill to disk, "
            "which is slow. Give it more (ray start --object-store-memory), or start rollouts before rewards.",
            store / 1e6, 2 * nbytes / 1e6,
        )  # fmt: skip
    return (
        f"Ray has {cpus:g} CPUs and {gpus:g} GPUs in all; {workers} rollout workers were to have "
        f"{options.num_cpus:g} CPUs and {options.num_gpus:g} GPUs each. Lower rollout.workers, cpus_per_worker or "
        "gpus_per_worker, or see who else uses the cluster (ray status)."
    )


def _start_error(error: BaseException) -> RlhfDriveError:
    """Why the workers did not come up, and what to do."""
    hint = "Every machine needs rlhf-drive and torch in the same version."
    said = str(error).rstrip(".") or describe_error(error)
    if isinstance(error, RolloutError | WorkerLostError | TimeoutError):
        return RolloutError(f"The rollout workers do not start: {said}. {hint}")
    return ConfigError(f"The policy cannot be built on a Ray worker: {said}. {hint}")
