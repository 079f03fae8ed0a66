"""The driver's end of one worker process: an actor of Ray whose calls return futures."""

from __future__ import annotations

import os
import site
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_drive.errors import ConfigError, RlhfDriveError

__all__ = ["RayActor", "WorkerInfo", "WorkerLostError", "import_ray", "why_lost", "worker_environment"]


def import_ray() -> Any:
    """The package `ray`.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            f"Workers on Ray need the package ray, which cannot be imported ({error}). Install it with "
            "pip install 'rlhf-drive[ray]', or use the local service."
        ) from error
    return ray


@dataclass(frozen=True)
class WorkerInfo:
    """Where a worker runs."""

    pid: int
    """Its process."""
    host: str
    """Name of its machine."""


class WorkerLostError(RlhfDriveError, RuntimeError):
    """A worker's process is gone, or Ray cannot reach it."""


class RayActor:
    """One actor. Calls return futures at once; a worker that is gone makes them raise :class:`WorkerLostError`.

    The actor's class has, beside its own methods, ``start() -> WorkerInfo``, ``ping()`` and ``linger()``, which never
    returns. Ping, linger and calls with ``control=True`` run beside the one call that does the work.
    """

    def __init__(
        self,
        kind: type,
        options: object,
        *,
        num_cpus: float,
        num_gpus: float = 0.0,
        strategy: str = "SPREAD",
        threads: int = 1,
        control: int = 2,
    ) -> None:
        """Ask Ray for the process.

        Args:
            kind: The actor's class; it is given `options`.
            options: What it is made of.
            num_cpus: Cores that Ray sets aside.
            num_gpus: Share of a GPU, or several.
            strategy: Ray's scheduling strategy.
            threads: Threads of numeric libraries.
            control: How many control calls may run side by side; :meth:`gone` takes one for good.
        """
        self._ray = import_ray()
        # A dead actor is replaced, not restarted, and no call is repeated by Ray: what a call costs is counted here.
        actor = self._ray.remote(
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            max_restarts=0,
            max_task_retries=0,
            concurrency_groups={"control": control},
            scheduling_strategy=strategy,
            enable_task_events=False,  # Ray would keep a record of each call
            runtime_env={"env_vars": worker_environment(threads)},
        )(kind)
        self._actor = actor.remote(options)

    def call(self, method: str, *arguments: object, control: bool = False) -> Future[Any]:
        """The answer to a call: its value, the error it raised, or `WorkerLostError`."""
        bound = getattr(self._actor, method)
        reference = (bound.options(concurrency_group="control") if control else bound).remote(*arguments)
        outer: Future[Any] = Future()

        def pass_on(inner: Future[Any]) -> None:
            error = inner.exception()
            if error is None:
                outer.set_result(inner.result())
            elif isinstance(error, self._ray.exceptions.RayTaskError):
                outer.set_exception(error.cause if isinstance(error.cause, Exception) else error)
            else:
                outer.set_exception(WorkerLostError(why_lost(error)))

        reference.future().add_done_callback(pass_on)
        return outer

    def start(self) -> Future[WorkerInfo]:
        """Done when it can work; raises if it cannot."""
        return self.call("start")

    def ping(self) -> Future[None]:
        """Comes back at once while the worker's interpreter runs, even if it is working."""
        return self.call("ping", control=True)

    def gone(self) -> Future[None]:
        """Raises when the worker is gone, and only then."""
        return self.call("linger", control=True)

    def kill(self) -> None:
        """End the process, whatever it is doing."""
        self._ray.kill(self._actor)


def worker_environment(threads: int = 1) -> Mapping[str, str]:
    """Environment of a worker: libraries that do not spin, our packages, and Numba's cache."""
    variables = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    root = str(Path(__file__).resolve().parents[2])
    if root not in (*site.getsitepackages(), site.getusersitepackages()):  # a source tree that may not be installed
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    if cache := os.environ.get("NUMBA_CACHE_DIR"):
        variables["NUMBA_CACHE_DIR"] = cache
    return variables


def why_lost(error: BaseException) -> str:
    """What Ray says about the end of a worker, in a line and without its advice."""
    text = " ".join(str(error).split())
    detail = text.partition("Worker exit detail: ")[2] or text.partition("The actor is dead because ")[2] or text
    return f"{type(error).__name__}: {detail.partition(' Some common causes')[0][:200]}"
