"""Run folders as they are found: recipe, stages, checkpoints, and whether the run is still going."""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf_drive.errors import DataError
from rlhf_drive.runs.lines import METRICS_FILE, last_lines

__all__ = ["Run", "State", "checkpoints", "find_runs", "last_activity", "open_run", "planned_stages", "state_of"]

RECIPE_FILE, STAGES_FILE, LOCK_FILE = "recipe.yaml", "stages.json", ".lock"

State = Literal["running", "finished", "failed", "stopped", "killed"]
"""`finished`: all stages of the job are done. `running`: a process holds the folder's lock. `failed`: it ended with an
error. Else it `stopped`, where it said so or a checkpoint holds its last step, or was `killed`."""


@dataclass(frozen=True)
class Run:
    """A run folder."""

    path: Path
    """Where it lies."""
    recipe: Mapping[str, Any]
    """Its recipe, as plain data; not checked, since an older version may have written it."""
    done: Mapping[str, Mapping[str, Any]]
    """What each finished stage noted."""
    seconds: float
    """Time the run took, as far as noted."""
    ended: str
    """How it broke off, as far as it could say: `stopped`, ``failed: message``, or empty."""
    identity: str
    """Random name that no other run has; empty where an older version made the folder."""

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.path.resolve().name

    @property
    def job(self) -> str:
        """What the recipe does."""
        return str(self.recipe.get("job", ""))

    def setting(self, key: str, otherwise: Any = None) -> Any:
        """Value of the recipe by its full key, such as ``rl.max_steps``."""
        value: Any = self.recipe
        for part in key.split("."):
            if not isinstance(value, Mapping) or part not in value:
                return otherwise
            value = value[part]
        return value


def open_run(path: Path) -> Run:
    """The run in a folder.

    Raises:
        DataError: There is no such folder, it holds no run, or what it holds cannot be read.
    """
    if not path.is_dir():
        near = ", ".join(sorted(run.name for run in find_runs(path.parent))[:8]) if path.parent.is_dir() else ""
        hint = f"{path.parent} holds the runs {near}." if near else "`rlhf-drive runs list FOLDER` shows runs."
        raise DataError(f"There is no folder {path}. {hint}")
    if not (path / RECIPE_FILE).is_file():
        inside = ", ".join(str(run.path) for run in find_runs(path)[:5])
        hint = f"It holds runs: {inside}." if inside else "Give a folder such as runs/quickstart."
        raise DataError(f"{path} is no run folder: it has no {RECIPE_FILE}. {hint}")
    return _read(path)


def find_runs(folder: Path) -> list[Run]:
    """Runs in a folder and in its folders, the one with the latest activity first; the folder may be a run itself.

    Raises:
        DataError: The folder is not there, or a run in it cannot be read.
    """
    if not folder.is_dir():
        raise DataError(
            f"There is no folder {folder}. Runs are in `runs`, unless the recipe's output_dir says another."
        )
    patterns = (RECIPE_FILE, f"*/{RECIPE_FILE}", f"*/*/{RECIPE_FILE}")
    found = {path.parent for pattern in patterns for path in folder.glob(pattern)}
    return sorted((_read(path) for path in found), key=lambda run: (-last_activity(run), run.name))


def _read(path: Path) -> Run:
    import yaml

    try:
        recipe = yaml.safe_load((path / RECIPE_FILE).read_text("utf-8"))
        stages = json.loads((path / STAGES_FILE).read_text("utf-8")) if (path / STAGES_FILE).is_file() else {}
        done, seconds = dict(stages.get("done", {})), float(stages.get("seconds", 0.0))
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise DataError(f"The run folder {path} cannot be read: {error}.") from error
    if not isinstance(recipe, dict):
        raise DataError(f"{path / RECIPE_FILE} holds no recipe.")
    return Run(path, recipe, done, seconds, str(stages.get("ended", "")), str(stages.get("id", "")))


def planned_stages(run: Run) -> list[str]:
    """Stages that the run's job consists of, in their order; `scenes` alone is no stage that is noted."""
    seeds = [f"rl-seed{seed}" for seed in run.setting("rl.seeds", ())]
    return {"pipeline": ["sft", *seeds, "compare"], "sft": ["sft"], "rl": seeds, "compare": ["compare"]}.get(
        run.job, []
    )


def state_of(run: Run) -> State:
    """Whether the run goes on, ended, or broke off; see :data:`State`."""
    if _is_locked(run.path / LOCK_FILE):
        return "running"
    planned = planned_stages(run)
    if set(planned) <= set(run.done) and (planned or run.seconds > 0):
        return "finished"
    if run.ended:
        return "failed" if run.ended.startswith("failed") else "stopped"
    lines = last_lines(run.path / METRICS_FILE, 1)
    if not lines:
        return "killed"
    phase, step = lines[-1]["phase"], lines[-1]["step"]
    return "stopped" if phase in run.done or step in checkpoints(run).get(phase, ()) else "killed"


def checkpoints(run: Run) -> dict[str, list[int]]:
    """Steps of the checkpoints to resume from, by stage."""
    found: dict[str, list[int]] = {}
    for path in sorted(run.path.glob("*/checkpoints/step-*")):
        if path.is_dir() and (match := re.fullmatch(r"step-(\d+)", path.name)):
            found.setdefault(path.parent.parent.name, []).append(int(match[1]))
    return {stage: sorted(steps) for stage, steps in found.items()}


def last_activity(run: Run) -> float:
    """When the run last wrote metrics or finished a stage (s since the epoch)."""
    names = (METRICS_FILE, STAGES_FILE, RECIPE_FILE)
    return max((run.path / name).stat().st_mtime for name in names if (run.path / name).is_file())


def _is_locked(path: Path) -> bool:
    """Whether a process holds the run's lock. A dead process of this machine holds none, and is not asked."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        if _is_dead(os.pread(descriptor, 4096, 0)):
            return False
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks: nobody knows
        return False
    finally:
        os.close(descriptor)
    return False


def _is_dead(holder: bytes) -> bool:
    """Whether the process named in a lock file is one of this machine that has ended."""
    try:
        found = json.loads(holder)
        pid, host = int(found["pid"]), found["host"]
    except (ValueError, KeyError, TypeError):
        return False
    if host != socket.gethostname():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
