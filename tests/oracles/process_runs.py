"""The same updates in one process and in several: jobs, the processes that run them, and how far results lie apart."""

from __future__ import annotations

import copy
import faulthandler
import os
import pickle
import socket
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oracles.tiny_trainer import FEATURES
from rewards.carriers import Scores
from rlhf_drive.config import Recipe
from rlhf_drive.policies import Policy
from rlhf_drive.scenes import Scene
from rlhf_drive.training.build import build_accelerator, build_trainer
from rlhf_drive.training.ranks import Ranks
from rlhf_drive.training.shards import whole
from rlhf_drive.training.trainer import RlTrainer
from rollout import Rollout

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Job:
    """Updates of one trainer on given batches."""

    recipe: Recipe
    """Its `rl` section counts."""
    policy: Policy
    """Start."""
    scenes: Sequence[Scene]
    """Of every batch."""
    batches: Sequence[tuple[Rollout, Scores]]
    """One for each step."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Keys of the section that differ."""
    weights: Mapping[str, float] | None = None
    """Reward terms by weight."""
    stale: bool = False
    """Whether older weights may have sampled."""
    first: int = 0
    """First step; those before it lie in `start`."""
    start: Mapping[str, Any] | None = None
    """What `Outcome.state` was then."""


@dataclass(frozen=True)
class Outcome:
    """What came of a job."""

    metrics: list[dict[str, float]]
    """By step."""
    state: dict[str, Any]
    """Whole weights and optimizer, and what else the trainer keeps."""
    published: dict[str, Tensor]
    """Weights of the whole policy."""


def make(job: Job, strategy: str = "ddp", ranks: Ranks | None = None) -> RlTrainer:
    """The job's trainer."""
    more = {"ranks": ranks, "strategy": strategy} if ranks else {}
    return build_trainer(
        replace(job.recipe.rl, **job.changes), pickle.loads(pickle.dumps(job.policy)), seed=0,
        accelerator=build_accelerator("cpu"), features=FEATURES, folder=Path(job.recipe.output_dir),
        reward_weights=job.weights, **({"stale": True} if job.stale else {}), **more,
    )  # fmt: skip


def run(job: Job, strategy: str = "ddp", ranks: Ranks | None = None) -> Outcome:
    """The outcome, of one process or, called by all, of several."""
    trainer = make(job, strategy, ranks)
    if job.start is not None:
        trainer.engine.restore(copy.deepcopy(job.start["engine"]))  # the optimizer goes on with these very tensors
        trainer.restore(job.start["tensors"], job.start["guard"])
    metrics = [
        trainer.step(step, job.scenes, *batch) for step, batch in enumerate(job.batches[job.first :], start=job.first)
    ]
    engine, kept = trainer.engine.state(), trainer.state()
    published = {name: value.clone() for name, value in trainer.engine.whole_policy().state_dict().items()}
    return Outcome(metrics, {"engine": engine, **kept}, published)


def launch(work: Any, folder: Path, *, processes: int = 2, timeout_s: float = 220.0) -> list[Any]:
    """``work(ranks)`` in processes of its own, that know of one another; what each gave.

    Args:
        work: Pickled; a function of a module that can be imported, or a partial of one.
        folder: For files that go between them.
        processes: How many.
        timeout_s: All are ended then.

    Raises:
        AssertionError: One failed; with its output.
    """
    (folder / "work").write_bytes(pickle.dumps(work))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ, "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))),
    }  # fmt: skip
    logs = [(folder / f"log-{rank}").open("w+") for rank in range(processes)]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", f"from oracles.process_runs import _worker; _worker({str(folder)!r}, {timeout_s})"],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=log, stderr=subprocess.STDOUT,
        )
        for rank, log in enumerate(logs)
    ]  # fmt: skip
    try:
        codes = [process.wait(timeout_s) for process in started]
    except subprocess.TimeoutExpired:
        codes = [None] * processes
    finally:
        for process in started:
            process.kill()
            process.wait()
    output = []
    for log in logs:
        log.seek(0)
        output.append(log.read())
        log.close()
    assert codes == [0] * processes, "\n".join(text[-3000:] for text in output)
    return [pickle.loads((folder / f"found-{rank}").read_bytes()) for rank in range(processes)]


def _worker(folder: str, timeout_s: float) -> None:
    faulthandler.dump_traceback_later(0.9 * timeout_s)  # where it waits, if it does
    torch.set_num_threads(1)
    build_accelerator("cpu", timeout_s=60)
    ranks = Ranks(60)
    work = pickle.loads((Path(folder) / "work").read_bytes())
    try:
        found = work(ranks)
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # the group's threads may wait for a process that is gone
    (Path(folder) / f"found-{ranks.index}").write_bytes(pickle.dumps(found))
    torch.distributed.destroy_process_group()


def run_all(jobs: Mapping[str, tuple[Job, str]], ranks: Ranks) -> dict[str, Outcome]:
    """The outcome of each ``(job, strategy)``."""
    return {name: run(job, strategy, ranks) for name, (job, strategy) in jobs.items()}


def largest(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest difference between tensors of one name, and that name. Biases of attention keys are left out: the
    softmax does not see them, so their gradient is rounding alone, which Adam makes as large as any."""
    assert set(left) == set(right)
    found = (0.0, "")
    for name, value in left.items():
        difference = (whole(value).float() - right[name].float()).abs()
        if name.endswith("qkv.bias"):
            q, _, v = difference.chunk(3)
            difference = torch.cat([q, v])
        if name.endswith("key_value.bias"):
            difference = difference.chunk(2)[1]
        found = max(found, (float(difference.max()) if difference.numel() else 0.0, name))
    return found


def metric_gap(left: Sequence[Mapping[str, float]], right: Sequence[Mapping[str, float]]) -> tuple[float, str]:
    """The largest difference between metrics that are not times, relative to those above 1, and where it is."""
    found = (0.0, "")
    for step, (a, b) in enumerate(zip(left, right, strict=True)):
        assert set(a) == set(b), set(a) ^ set(b)
        for name in a:
            if not name.startswith("time/"):
                found = max(found, (abs(a[name] - b[name]) / max(1.0, abs(a[name])), f"{name} at step {step}"))
    return found
