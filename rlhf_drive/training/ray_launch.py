"""A run on the processes of Ray Train: the machines of a cluster, or this one."""

from __future__ import annotations

import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from rlhf_drive.config import Recipe
from rlhf_drive.errors import ConfigError, RlhfDriveError, StorageError, TrainingError, describe_error
from rlhf_drive.training.launch import SHOW_UP_S, check_shared, is_main, process_group
from rlhf_drive.training.ranks import RankLostError
from rlhf_drive.training.run_lock import run_lock
from rlhf_drive.workers.actor import import_ray, worker_environment
from rlhf_drive.workers.cluster import connect

__all__ = ["RayProcesses", "run_on_ray"]

_FOLDER = ".ray-train"
"""In the run folder while it runs: Ray Train's own notes, and what the main process says."""
_TAIL_S = 0.5


@dataclass(frozen=True)
class RayProcesses:
    """What Ray is asked for. Example: ``RayProcesses(processes=8, gpus=1.0, cpus=8.0)``."""

    processes: int
    """N processes that train together, at least 1."""
    gpus: float = 0.0
    """GPUs of each, 0 or 1: processes that exchange gradients by NCCL cannot share one."""
    cpus: float = 1.0
    """Cores that Ray sets aside for each, and threads it computes with."""
    placement: str = "spread"
    """`spread` over as many machines as possible, or `pack` onto as few."""
    timeout_s: float = 1800.0
    """How long a process waits for another before the run ends with an error."""

    def __post_init__(self) -> None:
        if self.processes < 1:
            raise ConfigError(f"--processes {self.processes}: a run needs at least one process.")
        if self.gpus not in (0.0, 1.0):
            raise ConfigError(
                f"--gpus-per-process {self.gpus:g}: give 1, or 0 to compute on cores. Processes that train together "
                "cannot share a GPU, and one uses a single GPU."
            )
        if self.cpus <= 0:
            raise ConfigError(f"--cpus-per-process {self.cpus:g}: a process needs a core, or a part of one.")


def run_on_ray(recipe: Recipe, folder: Path, asked: RayProcesses, *, address: str | None = None) -> Path:
    """Run a recipe in a run folder that exists already, on processes that Ray starts; as `rlhf-drive train --resume`.

    The recipe's relative paths count from the working directory here, which every machine must see, as the run folder.
    A Ray that is not there yet is started on this machine and stopped again.

    Args:
        recipe: Validated recipe.
        folder: Run folder, made here or by an earlier session.
        asked: Processes.
        address: `host:port`, `auto`, or None for this machine alone.

    Returns:
        The run folder.

    Raises:
        ConfigError: No Ray at the address, or it has too few cores or GPUs; or another process works in the folder.
        StorageError: Machines do not see the run folder.
        RlhfDriveError: What a process raised; a TrainingError if it was lost.
    """
    ray = import_ray()
    with run_lock(folder):  # held by the main process later; here only to touch nothing of a run that goes on
        pass
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")  # the default since 2.51
    connection = connect(ray, address, _cores(recipe, asked), failure=TrainingError)
    scratch = folder.resolve() / _FOLDER
    try:
        _check_room(ray, asked)
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        with _shown(scratch / "console"):
            _fit(recipe, folder, scratch, asked)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        connection.leave()
    return folder


def _cores(recipe: Recipe, asked: RayProcesses) -> int:
    """Cores that a Ray of our own must have: also for the actors that the recipe asks for."""
    cores = asked.processes * asked.cpus
    if recipe.rollout and recipe.rollout.engine == "ray":
        cores += recipe.rollout.workers * recipe.rollout.cpus_per_worker
    if recipe.reward and recipe.reward.engine == "ray":
        cores += recipe.reward.workers or os.cpu_count() or 1
    return math.ceil(cores) + 1


def _check_room(ray: Any, asked: RayProcesses) -> None:
    """Refuse what the cluster can never give; Ray itself would wait for machines to join."""
    there = ray.cluster_resources()
    for name, each in (("CPU", asked.cpus), ("GPU", asked.gpus)):
        if asked.processes * each > there.get(name, 0.0):
            raise ConfigError(
                f"{asked.processes} processes with {each:g} {name}s each need {asked.processes * each:g}, and Ray has "
                f"{there.get(name, 0.0):g}. Start fewer processes, or add machines to the cluster."
            )


def _fit(recipe: Recipe, folder: Path, scratch: Path, asked: RayProcesses) -> None:
    """Run to the end on Ray Train."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    backend = "cpu:gloo,cuda:nccl" if asked.gpus else "gloo"
    environment = dict(worker_environment(max(1, int(asked.cpus))))
    if not asked.gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ""  # `device: auto` must not find a GPU that Ray has not given
    trainer = TorchTrainer(
        _work,
        train_loop_config={
            "recipe": recipe, "folder": str(folder), "scratch": str(scratch), "directory": str(Path.cwd()),
        },
        torch_config=TorchConfig(backend=backend, timeout_s=int(asked.timeout_s)),
        scaling_config=ScalingConfig(
            num_workers=asked.processes,
            use_gpu=asked.gpus > 0,
            resources_per_worker={"CPU": asked.cpus, **({"GPU": asked.gpus} if asked.gpus else {})},
            placement_strategy=asked.placement.upper(),
        ),
        run_config=RunConfig(
            name="processes",
            storage_path=str(scratch),
            # No process is replaced behind the user's back: the run ends, and goes on from its checkpoint.
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
            worker_runtime_env={"env_vars": environment},
        ),
    )  # fmt: skip
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit()
    except RlhfDriveError:
        raise
    except Exception as error:
        raise _reason(error, folder, asked.processes) from error
    finally:
        if main:
            signal.signal(signal.SIGINT, before)  # Ray Train leaves a handler that calls what is gone


def _reason(error: Exception, folder: Path, processes: int) -> RlhfDriveError:
    """An error on purpose of any process, else what Ray says about one that failed or was lost."""
    failures: Mapping[int, Exception] = getattr(error, "worker_failures", {})
    causes = {rank: getattr(failure, "_base_exc", failure) for rank, failure in sorted(failures.items())}
    # Processes that waited for the one that failed have failed too, and do not know why.
    told = {rank: cause for rank, cause in causes.items() if not isinstance(cause, RankLostError)} or causes
    for cause in told.values():
        if isinstance(cause, RlhfDriveError) and not isinstance(cause, RankLostError):
            return cause
    rank, cause = next(iter(told.items()), (-1, error))
    who = "Ray Train failed" if rank < 0 else f"Process {rank} of {processes} ended"
    # Of a defect the whole trace, which nobody sees otherwise.
    trace = "" if isinstance(cause, RlhfDriveError) else getattr(failures.get(rank), "_traceback_str", "")
    return TrainingError(
        f"{who}: {describe_error(cause)}. Go on from the last checkpoint with: rlhf-drive train --resume {folder} "
        f"--ray --processes {processes}" + (f"\n{trace}" if trace else "")
    )


def _work(job: Mapping[str, Any]) -> None:
    """One process of the run, in a worker of Ray Train."""
    import ray.train

    scratch, directory = Path(job["scratch"]), Path(job["directory"])
    _check_seen(scratch, directory)
    os.chdir(directory)
    from rlhf_drive.training.pipeline import run

    with (Path(scratch / "console") if is_main() else Path(os.devnull)).open("a") as out, redirect_stdout(out):
        with process_group(job["recipe"].device, 1800.0) as ranks:
            check_shared(scratch, ranks)
        run(job["recipe"], resume=Path(job["folder"]))
    ray.train.report({"done": 1})


def _check_seen(scratch: Path, directory: Path) -> None:
    """Make sure that this machine sees what the one that started the run sees.

    Raises:
        StorageError: It does not.
    """
    import socket

    deadline = time.monotonic() + SHOW_UP_S
    while not (scratch.is_dir() and directory.is_dir()):
        if time.monotonic() > deadline:
            lacking = scratch.parent if directory.is_dir() else directory
            raise StorageError(
                f"{socket.gethostname()} does not see {lacking}, which the run was started from. Start it in a folder "
                "on storage that all machines of the cluster share, and let output_dir be on it too."
            )
        time.sleep(0.2)


@contextmanager
def _shown(path: Path) -> Iterator[None]:
    """Show what the main process writes into a file while the block runs."""
    path.touch()
    ended = threading.Event()

    def show() -> None:
        with path.open() as file:
            while not ended.wait(_TAIL_S):
                _copy(file)
            _copy(file)

    thread = threading.Thread(target=show, name="console", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _copy(file: TextIO) -> None:
    while text := file.read(65536):
        sys.stdout.write(text)
    sys.stdout.flush()
