"""A process that samples: the Ray actor around the in-process engine, and the driver's end of it."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rlhf_drive.errors import ConfigError
from rlhf_drive.policies import Architecture, LoraSettings, Policy, TrajectoryTokenizer, add_lora
from rlhf_drive.workers import RayActor, WorkerInfo, WorkerLostError, import_ray
from rlhf_drive.workers.actor import why_lost
from rollout.service import LocalRolloutService
from rollout.transport import PackedRollout, SampleCall, SentFeatures
from rollout.weights import Piece, SentWeights, load_pieces, named_weights

__all__ = ["Loaded", "RayRolloutWorker", "RolloutWorker", "Sampled", "WorkerOptions", "load_limit_s"]

_LOAD_S = 60.0
_LOAD_BYTES_PER_S = 10e6
"""A slow network; what takes longer than this hangs."""


def load_limit_s(weights: SentWeights) -> float:
    """Seconds that a worker may take to fetch and load weights."""
    return _LOAD_S + (weights.trained_bytes + weights.base_bytes) / _LOAD_BYTES_PER_S


@dataclass(frozen=True)
class WorkerOptions:
    """What a worker is made of."""

    description: Mapping[str, Mapping[str, Any]]
    """What :func:`describe_policy` says of the policy."""
    precision: Any
    """The policy's attribute of this name; None where it has none."""
    seed: int
    """Keys all random numbers."""
    max_rows: int
    """Rows decoded at once."""
    num_cpus: float
    """Cores; as many threads, at least one, compute."""
    num_gpus: float
    """Share of a GPU; 0 = it computes on its cores."""


@dataclass(frozen=True)
class Loaded:
    """A worker has these weights now."""

    number: int
    """Number of the push."""
    seconds: float
    """How long fetching and loading took."""


@dataclass(frozen=True)
class Sampled:
    """What a worker brings back."""

    rollout: PackedRollout
    """The plans."""
    number: int
    """Number of the push whose weights sampled."""
    busy_s: float
    """Seconds it sampled."""


class RolloutWorker:
    """The engine of this process behind methods that Ray calls from elsewhere."""

    def __init__(self, options: WorkerOptions) -> None:
        """Set up; whatever may fail happens in :meth:`start`."""
        self._options = options
        self._lock = threading.Lock()
        self._number = self._base_number = 0
        self._fetched: tuple[SentWeights, list[list[Piece]]] | None = None

    def start(self) -> WorkerInfo:
        """Build the policy, whose weights come later.

        Raises:
            ConfigError: A share of a GPU is asked for, and there is none.
            RlhfDriveError: The policy cannot be built here.
        """
        o = self._options
        torch.set_num_threads(max(1, int(o.num_cpus)))
        if o.num_gpus and not torch.cuda.is_available():
            raise ConfigError(
                f"A rollout worker on {socket.gethostname()} was to have {o.num_gpus:g} GPUs, and torch finds none "
                "there. Install a CUDA build of torch on every machine, or set rollout.gpus_per_worker to 0."
            )
        policy = _build(o.description).to("cuda" if o.num_gpus else "cpu")
        if o.precision is not None:
            policy.precision = o.precision
        self._weights = named_weights(policy)
        self._engine: Any = LocalRolloutService(policy, seed=o.seed, features=SentFeatures(), max_rows=o.max_rows)
        return WorkerInfo(os.getpid(), socket.gethostname())

    def fetch(self, weights: SentWeights) -> None:
        """Bring weights to this machine while the worker may be sampling; load them if it is not."""
        if weights.number <= self._number:
            return
        chunks = self._chunks(weights)
        if not self._lock.acquire(blocking=False):
            self._fetched = (weights, chunks)  # the call under way ends with the weights it began with
            return
        try:
            if weights.number > self._number:
                self._load(weights, chunks)
            self._fetched = None  # older ones would stay in the object store for as long as they are held
        finally:
            self._lock.release()

    def load(self, weights: SentWeights) -> Loaded:
        """Have these weights, and no others, from now on."""
        started = time.perf_counter()
        with self._lock:
            self._ensure(weights)
        return Loaded(self._number, time.perf_counter() - started)

    def sample(self, weights: SentWeights, call: SampleCall) -> Sampled:
        """G plans for each scene, with these weights."""
        with self._lock:
            self._ensure(weights)
            self._engine.version = weights.version
            before = self._engine.stats.busy_s
            rollout = self._engine.sample(
                call.scenes, call.num_generations, call.decoding, step=call.step, keep_experts=call.keep_experts
            )
            return Sampled(PackedRollout.of(rollout), self._number, self._engine.stats.busy_s - before)

    def ping(self) -> None:
        """Nothing; that it returns shows that the interpreter runs."""

    def linger(self) -> None:
        """Never returns; that the call fails shows that the process is gone."""
        threading.Event().wait()

    def _ensure(self, weights: SentWeights) -> None:
        if weights.number == self._number:
            return
        fetched, self._fetched = self._fetched, None
        known = fetched is not None and fetched[0].number == weights.number
        self._load(weights, fetched[1] if known and fetched is not None else self._chunks(weights))

    def _load(self, weights: SentWeights, chunks: list[list[Piece]]) -> None:
        self._number = 0  # half loaded is no version
        for i, chunk in enumerate(chunks):
            load_pieces(self._weights, chunk)
            # As where they come from: torch chooses kernels by it, also without gradients, and rounding follows.
            learned = i >= len(chunks) - len(weights.trained)
            for weight in (self._weights[piece.name] for piece in chunk):
                if isinstance(weight, nn.Parameter):
                    weight.requires_grad_(learned)
        self._number, self._base_number = weights.number, weights.base_number

    def _chunks(self, weights: SentWeights) -> list[list[Piece]]:
        """What this worker lacks of the weights."""
        ray, limit = import_ray(), load_limit_s(weights)
        base = () if self._base_number == weights.base_number else weights.base
        try:
            found: list[list[Piece]] = ray.get([*base, *weights.trained], timeout=limit)
        except ray.exceptions.GetTimeoutError as error:  # another machine may be luckier
            raise WorkerLostError(f"it waited {limit:g} s for the object store to bring {weights}") from error
        except ray.exceptions.RayError as error:
            raise WorkerLostError(f"it could not fetch {weights}: {why_lost(error)}") from error
        return found


def _build(description: Mapping[str, Mapping[str, Any]]) -> Policy:
    """A policy of that description; its weights do not matter."""
    options = dict(description["process"])
    policy = Policy(
        Architecture(**description["architecture"]), TrajectoryTokenizer(**description["tokenizer"]),
        options.pop("name"), options,
    )  # fmt: skip
    if "lora" in description:
        add_lora(policy, LoraSettings(**description["lora"]))
    return policy.eval().requires_grad_(False)


class RayRolloutWorker:
    """The driver's end of one worker. Calls return futures at once; a worker that is gone makes them raise."""

    def __init__(self, options: WorkerOptions, strategy: str, reserve: bool) -> None:
        """Ask Ray for the process.

        Args:
            options: What it is made of.
            strategy: Ray's scheduling strategy.
            reserve: Whether Ray sets its cores aside.
        """
        self._actor = RayActor(
            RolloutWorker, options, num_cpus=options.num_cpus if reserve else 0.0, num_gpus=options.num_gpus,
            strategy=strategy, threads=max(1, int(options.num_cpus)), control=4,
        )  # fmt: skip
        self.start, self.ping, self.gone, self.kill = (
            self._actor.start, self._actor.ping, self._actor.gone, self._actor.kill
        )  # fmt: skip

    def fetch(self, weights: SentWeights) -> Future[None]:
        """:meth:`RolloutWorker.fetch`, beside a call that may be under way."""
        return self._actor.call("fetch", weights, control=True)

    def load(self, weights: SentWeights) -> Future[Loaded]:
        """:meth:`RolloutWorker.load`."""
        return self._actor.call("load", weights)

    def sample(self, weights: SentWeights, call: SampleCall) -> Future[Sampled]:
        """:meth:`RolloutWorker.sample`."""
        return self._actor.call("sample", weights, call)
