"""Training checkpoints: atomic, retained by number, and enough to continue bit for bit."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_drive.errors import CheckpointError
from rlhf_drive.policies import Policy, load_policy, save_policy
from rlhf_drive.policies.adapter_files import save_adapter
from rlhf_drive.policies.checkpoints import check_same, replace_folder, sha256
from rlhf_drive.training.engine import EngineState, TrainingEngine

__all__ = ["CheckpointStore", "TrainingState", "publish_adapter", "publish_policy"]

TRAINER = "trainer.pt"
STATE = "state.json"


@dataclass(frozen=True)
class TrainingState:
    """What a checkpoint gives back besides the states of policy, optimizer and generator."""

    step: int
    """Steps done; training goes on with this step (0-based)."""
    values: Mapping[str, Any]
    """What else the job keeps, as plain JSON data."""
    tensors: Mapping[str, Tensor]
    """What else the job keeps, as tensors by name."""


def publish_policy(policy: Policy, folder: Path, *, info: Mapping[str, Any]) -> None:
    """Write a policy checkpoint folder atomically: readers see the old one or the new one."""
    _publish(save_policy, policy, folder, info)


def publish_adapter(policy: Policy, folder: Path, *, info: Mapping[str, Any]) -> None:
    """Write a policy's adapters alone, atomically."""
    _publish(save_adapter, policy, folder, info)


def _publish(save: Callable[..., None], policy: Policy, folder: Path, info: Mapping[str, Any]) -> None:
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save(policy, temporary, info=info)
    replace_folder(temporary, folder)


class CheckpointStore:
    """Folders `step-000020` in `folder`, the newest `keep` of them kept."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def save(
        self,
        step: int,
        engine: TrainingEngine,
        values: Mapping[str, Any] | None = None,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> Path:
        """Write everything of `step` beside its place, then move it there in one rename; drop the oldest.

        Args:
            step: Steps done.
            engine: Policy and optimizer; torch's own generator state is stored with them.
            values: Plain JSON data of the job.
            tensors: Tensors of the job, by name.
        """
        final = self.folder / f"step-{step:06d}"
        temporary = self.folder / f".{final.name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_policy(engine.policy, temporary, info={"step": step})
        optimizer, rng = engine.optimizer.state_dict(), torch.get_rng_state()
        blob = {"optimizer": optimizer, "rng": rng, "tensors": dict(tensors or {})}
        torch.save(blob, temporary / TRAINER)
        state = {"step": step, "sha256": sha256(temporary / TRAINER), "values": dict(values or {})}
        (temporary / STATE).write_text(json.dumps(state, indent=2) + "\n")
        replace_folder(temporary, final)
        self._tidy()
        return final

    def _tidy(self) -> None:
        """Drop all but the newest checkpoints, and what a killed run left half-written or half-removed."""
        for leftover in self.folder.glob(".step-*"):
            shutil.rmtree(leftover)
        for step in self.steps()[: -self.keep]:
            old = self.folder / f"step-{step:06d}"
            shutil.rmtree(old.replace(old.with_name(f".{old.name}.old")))

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are there, rising. Half-written ones have another name and do not count."""
        names = (re.fullmatch(r"step-(\d+)", path.name) for path in self.folder.glob("step-*") if path.is_dir())
        return sorted(int(match[1]) for match in names if match)

    def load(self, engine: TrainingEngine) -> TrainingState | None:
        """Restore the newest checkpoint into `engine` and torch's generator; None if there is none.

        Raises:
            CheckpointError: The newest checkpoint is damaged or belongs to another policy.
        """
        self._tidy()
        steps = self.steps()
        if not steps:
            return None
        folder = self.folder / f"step-{steps[-1]:06d}"
        state = self._read_state(folder)
        stored = load_policy(folder, device=engine.policy.device)
        check_same(stored, engine.policy, f"{folder} holds another policy", "Resume with its own recipe.")
        if not (folder / TRAINER).is_file() or sha256(folder / TRAINER) != state["sha256"]:
            raise CheckpointError(
                f"{folder / TRAINER} is missing or does not match its checksum: truncated or altered. {_remove(folder)}"
            )
        # weights_only: tensors and plain containers, never a class of somebody's choosing.
        blob = torch.load(folder / TRAINER, map_location="cpu", weights_only=True)
        engine.restore(EngineState(stored.state_dict(), blob["optimizer"]))
        torch.set_rng_state(blob["rng"])
        return TrainingState(int(state["step"]), state["values"], blob.get("tensors", {}))

    def _read_state(self, folder: Path) -> dict[str, Any]:
        path = folder / STATE
        try:
            state = json.loads(path.read_text())
            missing = {"step", "sha256", "values"} - set(state)
        except (OSError, json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}). {_remove(folder)}") from None
        if missing:
            raise CheckpointError(f"{path} lacks {', '.join(sorted(missing))}. {_remove(folder)}")
        return dict(state)


def _remove(folder: Path) -> str:
    """What to do about a damaged checkpoint."""
    return f"Remove {folder} to resume from the checkpoint before it."
