"""What each of several processes does in the tests of checkpoints."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import torch

from oracles.tiny_policy import ARCHITECTURE
from rlhf_drive.errors import RlhfDriveError
from rlhf_drive.policies import Policy, TrajectoryTokenizer
from rlhf_drive.training.build import build_accelerator
from rlhf_drive.training.checkpoint import CheckpointStore
from rlhf_drive.training.engine import TrainingEngine
from rlhf_drive.training.generators import seed_generators
from rlhf_drive.training.ranks import Ranks
from rlhf_drive.training.run_folder import RunIdentity
from rlhf_drive.training.stopping import StopSignals

RUN = RunIdentity("mine", "recipe")


def make(ranks: Ranks, strategy: str = "ddp") -> TrainingEngine:
    """An engine; each process draws other numbers from here on."""
    torch.manual_seed(3)
    policy = Policy(ARCHITECTURE, TrajectoryTokenizer("displacements", -5.0, 15.0, 0.5))
    engine = TrainingEngine(
        policy, learning_rate=0.01, weight_decay=0.0, accelerator=build_accelerator("cpu"), ranks=ranks,
        strategy=strategy,
    )  # fmt: skip
    seed_generators(100 + ranks.index)
    return engine


def update(engine: TrainingEngine) -> None:
    """A step whose gradient is the same on every process, and the same for any number of them."""
    share = 1.0 / engine.ranks.count
    loss = engine.forward(lambda policy: share * sum((p.square().sum() for p in policy.parameters()), torch.zeros(())))
    engine.backward(loss)
    engine.step(1.0)


def draws() -> list[float]:
    """One number of each generator."""
    return [float(torch.rand(())), random.random(), float(np.random.rand())]  # noqa: NPY002


def weights(engine: TrainingEngine) -> torch.Tensor:
    """All weights in a row, whole."""
    return torch.cat([tensor.detach().flatten() for tensor in engine.whole_policy().state_dict().values()])


def saved(ranks: Ranks, folder: str, strategy: str) -> dict[str, Any]:
    """Two steps, a checkpoint, one more step."""
    engine = make(ranks, strategy)
    store = CheckpointStore(Path(folder), 2, run=RUN)
    for _ in range(2 if strategy == "ddp" else 0):
        update(engine)
    draws()
    store.save(2, engine, {"rank": ranks.index}, {"mine": torch.tensor([ranks.index])})
    at, later = weights(engine), draws()
    if strategy == "ddp":
        update(engine)
    return {"at": at, "draws": later, "after": weights(engine)}


def resumed(ranks: Ranks, folder: str, strategy: str) -> dict[str, Any]:
    """The checkpoint's state, and one more step."""
    engine = make(ranks, strategy)
    state = CheckpointStore(Path(folder), 2, run=RUN).load(engine)
    assert state is not None
    at, later = weights(engine), draws()
    if strategy == "ddp":
        update(engine)
    return {"at": at, "draws": later, "after": weights(engine), "state": state}


def refused(ranks: Ranks, folder: str) -> list[str]:
    """What every process is told where only the main one can know, and where only the second one can."""
    engine, said = make(ranks), []
    store = CheckpointStore(Path(folder), 2, run=RUN)
    foreign = Path(folder) / "step-000009"
    for attempt in (lambda: store.load(engine), lambda: store.save(9, engine)):
        try:
            attempt()
        except RlhfDriveError as error:
            said.append(str(error))
    ranks.wait()
    if ranks.main:
        foreign.rename(Path(folder) / "away")
    elif ranks.index == 1:
        store._read = lambda *_: (_ for _ in ()).throw(OSError("not mounted here"))  # type: ignore[method-assign]
    ranks.wait()
    try:
        store.load(engine)
    except Exception as error:
        said.append(f"{type(error).__name__}: {error}")
    return said


def stopped(ranks: Ranks) -> tuple[int, str | None]:
    """The step after which each stops, when the second process alone gets a signal in step 3."""
    with StopSignals(ranks) as signals:
        for step in range(9):
            if step == 3 and ranks.index == 1:
                os.kill(os.getpid(), signal.SIGUSR1)
            if name := signals.requested:
                return step, name
    return -1, None


def everything(ranks: Ranks, folder: str) -> dict[str, Any]:
    """All that two processes do, in one go: to start them is what takes long."""
    found: dict[str, Any] = {}
    for strategy in ("ddp", "fsdp2"):
        found[strategy] = saved(ranks, f"{folder}/rl/{strategy}", strategy)
        found[f"{strategy} again"] = resumed(ranks, f"{folder}/rl/{strategy}", strategy)
    found["from one"] = resumed(ranks, f"{folder}/rl/one", "ddp")
    found["refused"] = refused(ranks, f"{folder}/rl/foreign")
    found["stopped"] = stopped(ranks)
    return found
