"""Supervised trainings that one process, or several that share the micro-batches, run in the same way."""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch import Tensor

from rlhf_drive.errors import RunStoppedError
from rlhf_drive.policies import Policy
from rlhf_drive.policies.feature_cache import FeatureCache
from rlhf_drive.scenes.store import SceneStore
from rlhf_drive.training import sft_step
from rlhf_drive.training.build import build_accelerator
from rlhf_drive.training.ranks import Ranks
from rlhf_drive.training.sft import SftResult, SftSettings, train_sft


@dataclass
class Lines:
    """A journal that keeps what it is told and, after a step, lets somebody send SIGTERM."""

    stop_after: int = 0
    lines: list[dict[str, float]] = field(default_factory=list)
    first: int = 0

    def note(self, text: str) -> None:
        """As the protocol says."""

    def resume(self, step: int) -> None:
        """As the protocol says."""
        self.first = step

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """As the protocol says; times are left out."""
        self.lines.append({name: value for name, value in metrics.items() if not name.startswith("time/")})
        if step == self.stop_after:
            os.kill(os.getpid(), signal.SIGTERM)


@dataclass(frozen=True)
class SftJob:
    """A training."""

    policy: Policy
    settings: SftSettings
    store: Path
    folder: Path
    strategy: str = "ddp"
    stop_after: int = 0
    """Step after which the main process alone is asked to stop; 0 = never."""


@dataclass(frozen=True)
class SftOutcome:
    """What came of it."""

    lines: list[dict[str, float]]
    first: int
    """Steps that an earlier session had done."""
    result: SftResult | None
    """None after a stop that was asked for."""
    weights: dict[str, Tensor]
    """Whole ones, on the last process too."""


def run_sft(job: SftJob, ranks: Ranks) -> SftOutcome:
    """Train a copy of the job's policy; called by all processes. Held-out scenes are looked at four at a time."""
    store, policy, journal = SceneStore.open(job.store), copy.deepcopy(job.policy), Lines(job.stop_after)
    result = None
    with suppress(RunStoppedError), patch.object(sft_step, "HELDOUT_SCENES", 4):
        result = train_sft(
            policy, store.split("train"), store.split("heldout"), job.settings, job.folder,
            accelerator=build_accelerator("cpu"), features=FeatureCache(), journal=journal, ranks=ranks,
            strategy=job.strategy,
        )  # fmt: skip
    weights = {} if job.strategy == "fsdp2" else {name: value.clone() for name, value in policy.state_dict().items()}
    return SftOutcome(journal.lines, journal.first, result, weights)


def run_all(jobs: list[SftJob], ranks: Ranks) -> list[SftOutcome]:
    """One after the other."""
    return [run_sft(job, ranks) for job in jobs]


def at(job: SftJob, folder: Path, **changes: Any) -> SftJob:
    """The job in another folder."""
    return replace(job, folder=folder, **changes)
