"""Many runs as a table: what each is, how far it is, and what it reached."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_drive.errors import DataError
from rlhf_drive.runs.folders import Run, last_activity, state_of
from rlhf_drive.runs.layout import aligned, duration, shortened
from rlhf_drive.runs.lines import METRICS_FILE, last_lines
from rlhf_drive.runs.series import kind_of

__all__ = ["Progress", "overview", "progress_of", "seconds_of"]

NAME_WIDTH = 20
LOOK_BACK = 40
"""Lines in which the last reward and epoch are looked for."""


@dataclass(frozen=True)
class Progress:
    """How far a run is."""

    where: str
    """Phase and step of how many, such as ``rl-seed0 12/90`` or ``sft epoch 3/40``; empty before the first step."""
    reward: float | None
    """The latest `reward/total`; None where there is none in the latest lines."""


def progress_of(run: Run) -> Progress:
    """From the latest lines of its metrics.

    Raises:
        DataError: They are damaged.
    """
    lines = last_lines(run.path / METRICS_FILE, LOOK_BACK)
    if not lines:
        return Progress("", None)
    phase = lines[-1]["phase"]
    here = [line for line in lines if line["phase"] == phase]
    return Progress(_where(run, phase, here), _latest(here, "reward/total"))


def _where(run: Run, phase: str, lines: Sequence[Mapping[str, Any]]) -> str:
    step, epoch = lines[-1]["step"], _latest(lines, "sft/epoch")
    if phase == "sft" and epoch is not None:
        return f"sft epoch {epoch:.0f}/{run.setting('sft.max_epochs', '?')}"
    total = run.setting("rl.max_steps") if kind_of(phase) == "rl" else None
    return f"{phase} {step}/{total}" if total else f"{phase} {step}"


def _latest(lines: Sequence[Mapping[str, Any]], metric: str) -> float | None:
    values = [line[metric] for line in lines if line.get(metric) is not None]
    return float(values[-1]) if values else None


def seconds_of(run: Run) -> float:
    """What the run noted, or, where it wrote more since it last did, from its start to its last line (s)."""
    return max(run.seconds, last_activity(run) - (run.path / "recipe.yaml").stat().st_mtime)


def overview(runs: Sequence[Run]) -> list[str]:
    """Lines of a table, a run each."""
    rows = [["run", "job", "state", "step", "reward", "took", "last written"]]
    for run in runs:
        try:
            progress, state = progress_of(run), str(state_of(run))
        except DataError:
            progress, state = Progress("", None), "damaged"
        reward = "" if progress.reward is None else f"{progress.reward:.3f}"
        ago = f"{duration(time.time() - last_activity(run))} ago"
        name = shortened(run.name, NAME_WIDTH)
        rows.append([name, run.job, state, progress.where, reward, duration(seconds_of(run)), ago])
    return aligned(rows, right=(4, 5))
