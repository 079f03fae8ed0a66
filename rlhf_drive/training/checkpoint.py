"""Training checkpoints: atomic, retained by number, owned by one run, and enough to continue bit for bit."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_drive.disk import (
    check_writable,
    free_space,
    open_durably,
    remove_folder,
    replace_folder,
    restore_folder,
    resume_command,
    writing,
)
from rlhf_drive.errors import CheckpointError, StorageError
from rlhf_drive.policies import Policy, load_policy, save_policy
from rlhf_drive.policies.adapter_files import save_adapter
from rlhf_drive.policies.checkpoints import check_same, sha256
from rlhf_drive.training.engine import EngineState, TrainingEngine
from rlhf_drive.training.generators import generator_states, restore_generators
from rlhf_drive.training.run_folder import RunIdentity
from rlhf_drive.training.together import on_all, on_main

__all__ = ["CheckpointStore", "TrainingState", "publish_adapter", "publish_policy"]

TRAINER = "trainer.pt"
STATE = "state.json"
OURS = re.compile(r"step-(\d{6,})|\.step-(\d{6,})\.(tmp|old|drop)")
"""Names of this module's folders: whole ones, and what is being written, replaced or removed."""


@dataclass(frozen=True)
class TrainingState:
    """What a checkpoint gives back besides the states of policy, optimizer and generators."""

    step: int
    """Steps done; training goes on with this step (0-based)."""
    values: Mapping[str, Any]
    """What else the job keeps, as plain JSON data."""
    tensors: Mapping[str, Tensor]
    """What else the job keeps, as tensors by name."""
    notices: tuple[str, ...] = ()
    """What the person who resumes must know, such as where bit-exactness ends; a sentence each."""


def publish_policy(policy: Policy, folder: Path, *, info: Mapping[str, Any]) -> None:
    """Write a policy checkpoint folder atomically: readers see the old one or the new one.

    Raises:
        StorageError: It cannot be written; the old one is still there.
    """
    _publish(save_policy, policy, folder, info)


def publish_adapter(policy: Policy, folder: Path, *, info: Mapping[str, Any]) -> None:
    """Write a policy's adapters alone, atomically.

    Raises:
        StorageError: They cannot be written; the old ones are still there.
    """
    _publish(save_adapter, policy, folder, info)


def _publish(save: Callable[..., None], policy: Policy, folder: Path, info: Mapping[str, Any]) -> None:
    _write_folder(folder, "The policy", lambda temporary: save(policy, temporary, info=info))


def _write_folder(final: Path, what: str, fill: Callable[[Path], None]) -> None:
    """Let `fill` write a folder beside its place, then move it there; after an error nothing is left of it."""
    temporary = final.with_name(f".{final.name}.tmp")
    with writing(what, final):
        try:
            if temporary.exists():
                shutil.rmtree(temporary)
            temporary.mkdir(parents=True)
            fill(temporary)
            replace_folder(temporary, final)
        except Exception:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


class CheckpointStore:
    """Folders `step-000020` in `folder`, the newest `keep` of them kept.

    Where several processes train, all of them call the same methods in the same order; the main one writes.
    """

    def __init__(self, folder: Path, keep: int, *, run: RunIdentity | None = None) -> None:
        """Name the place; nothing is read or written yet.

        Args:
            folder: `RUN/PHASE/checkpoints`; the phase's name is part of the checkpoints' identity.
            keep: Checkpoints that stay.
            run: Whose checkpoints they are; None for a caller that has no run folder.
        """
        self.folder, self.keep = folder, keep
        self.owner = None if run is None else {**asdict(run), "phase": folder.parent.name}

    @property
    def resume_command(self) -> str | None:
        """The command that goes on with the run that the folder lies in; None outside a run folder."""
        return resume_command(self.folder)

    def save(
        self,
        step: int,
        engine: TrainingEngine,
        values: Mapping[str, Any] | None = None,
        tensors: Mapping[str, Tensor] | None = None,
        *,
        generators: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write everything of `step` beside its place, then move it there in one rename; drop the oldest.

        Args:
            step: Steps done.
            engine: Policy and optimizer; all of them, whatever part of them each process holds.
            values: Plain JSON data of the job; those of the main process are written.
            tensors: Whole tensors of the job, by name; those of the main process are written.
            generators: :func:`generator_states` of an earlier moment, in place of this one's.

        Raises:
            StorageError: It cannot be written. Nothing is left of it, and older checkpoints are as they were.
            CheckpointError: The folder holds another run's checkpoints.
        """
        state = engine.state()
        everyone = engine.ranks.gather(dict(generators or generator_states()))
        final = self.folder / f"step-{step:06d}"

        def write() -> None:
            assert state is not None, "the main process is given the whole state"
            self._check_owner()
            blob = {"optimizer": state.optimizer, "generators": everyone, "tensors": dict(tensors or {})}
            _write_folder(
                final,
                f"The checkpoint of step {step}",
                lambda temporary: self._fill(temporary, step, engine.policy, state, blob, dict(values or {})),
            )
            with writing("The removal of an older checkpoint", self.folder):
                self._tidy()

        on_main(engine.ranks, write)
        return final

    def _fill(
        self,
        folder: Path,
        step: int,
        policy: Policy,
        engine: EngineState,
        blob: Mapping[str, Any],
        values: Mapping[str, Any],
    ) -> None:
        save_policy(policy, folder, info={"step": step}, weights=engine.weights)
        with open_durably(folder / TRAINER) as file:
            torch.save(blob, file)
        state = {
            "step": step,
            "run": self.owner,
            "processes": len(blob["generators"]),
            "sha256": sha256(folder / TRAINER),
            "values": values,
        }
        (folder / STATE).write_text(json.dumps(state, indent=2) + "\n")

    def _tidy(self) -> None:
        """Drop all but the newest checkpoints, and what a killed run left half-written or half-removed."""
        for path in self._own_folders():
            if path.name.endswith(".old"):
                restore_folder(path.with_name(path.name.removeprefix(".").removesuffix(".old")))
        for path in self._own_folders():
            if path.name.startswith("."):
                shutil.rmtree(path)
        for step in self.steps()[: -self.keep]:
            remove_folder(self.folder / f"step-{step:06d}")

    def _own_folders(self) -> list[Path]:
        """Folders that are this module's by name; other people's files are never touched."""
        if not self.folder.is_dir():
            return []
        return [path for path in sorted(self.folder.iterdir()) if OURS.fullmatch(path.name) and path.is_dir()]

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are there, rising. Half-written ones have another name and do not count."""
        return sorted(int(path.name[5:]) for path in self._own_folders() if not path.name.startswith("."))

    def load(self, engine: TrainingEngine) -> TrainingState | None:
        """Restore the newest checkpoint into `engine` and the generators; None if there is none.

        Another number of processes than wrote it can go on from it; :attr:`TrainingState.notices` then says what that
        means.

        Raises:
            CheckpointError: The newest checkpoint is damaged, of another policy, or of another run; nothing is changed.
            StorageError: The folder cannot be written to, or lacks the space for a checkpoint.
        """
        step = on_main(engine.ranks, lambda: self._prepare(engine.policy))
        if step is None:
            return None
        folder = self.folder / f"step-{step:06d}"
        own = generator_states()  # now: to rebuild a policy draws from them
        state, stored, blob = on_all(engine.ranks, lambda: self._read(folder, engine.policy))
        engine.restore(EngineState(stored.state_dict(), blob["optimizer"]))
        everyone: Sequence[Mapping[str, Any]] = blob["generators"]
        index = engine.ranks.index
        restore_generators(everyone[index] if index < len(everyone) else own)
        notices = self._notices(state, len(everyone), engine.ranks.count)
        return TrainingState(int(state["step"]), state["values"], blob.get("tensors", {}), notices)

    def _prepare(self, policy: Policy) -> int | None:
        """The newest step, in a folder that is ours, tidy, and has room for what comes."""
        self._check_owner()
        check_writable("Checkpoints", self.folder)
        with writing("The removal of unfinished checkpoints", self.folder):
            self._tidy()
        _check_space(policy, self.folder)
        steps = self.steps()
        return steps[-1] if steps else None

    def _check_owner(self) -> None:
        """Refuse a folder in which any checkpoint, whole or not, says that it is another run's or another phase's."""
        for path in self._own_folders():
            found = _owner_of(path)
            if found is None or (self.owner and all(found.get(key) == self.owner[key] for key in ("id", "phase"))):
                continue
            mine = self.owner or {"id": "without an id", "phase": self.folder.parent.name}
            raise CheckpointError(
                f"{path} is another run's: run {found.get('id')}, phase {found.get('phase')}; this is run "
                f"{mine['id']}, phase {mine['phase']}. Nothing was changed. Move {self.folder} away, or resume the run "
                "that it belongs to."
            )

    def _notices(self, state: Mapping[str, Any], processes: int, now: int) -> tuple[str, ...]:
        notices = []
        if processes != now:
            notices.append(
                f"The checkpoint of step {state['step']} was written by {processes} process(es), and {now} go on: "
                "numbers stay equal to rounding, but from here on they are not those of an unchanged run bit for bit."
            )
        written = state.get("run")
        if self.owner and written and written.get("recipe") != self.owner["recipe"]:
            notices.append(
                f"The recipe has been changed since the checkpoint of step {state['step']} was written: from here on "
                "the run follows the new one."
            )
        return tuple(notices)

    def _read(self, folder: Path, policy: Policy) -> tuple[dict[str, Any], Policy, dict[str, Any]]:
        """State, policy and optimizer of a checkpoint, on the CPU; each process reads them for itself."""
        state = self._read_state(folder)
        stored = load_policy(folder)
        check_same(stored, policy, f"{folder} holds another policy", "Resume with its own recipe.")
        if not (folder / TRAINER).is_file() or sha256(folder / TRAINER) != state["sha256"]:
            raise CheckpointError(
                f"{folder / TRAINER} is missing or does not match its checksum: truncated or altered. {_remove(folder)}"
            )
        # weights_only: tensors and plain containers, never a class of somebody's choosing.
        blob = torch.load(folder / TRAINER, map_location="cpu", weights_only=True)
        if "generators" not in blob:  # of an older version: torch's alone, of one process
            blob["generators"] = [{"torch": blob["rng"]}]
        return state, stored, blob

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


def _owner_of(folder: Path) -> dict[str, Any] | None:
    """Whose checkpoint it says it is; None where it says nothing."""
    try:
        state = json.loads((folder / STATE).read_text())
    except (OSError, ValueError):
        return None
    found = state.get("run") if isinstance(state, dict) else None
    return found if isinstance(found, dict) else None


def _check_space(policy: Policy, folder: Path) -> None:
    """Refuse to start where not even the weights and AdamW's two moments of each fit."""
    parameters = list(policy.parameters())
    need = sum(p.numel() * p.element_size() * (3 if p.requires_grad else 1) for p in parameters)
    with writing("A checkpoint", folder):
        free = shutil.disk_usage(folder).free
    if free < need:
        command = resume_command(folder)
        raise StorageError(
            f"A checkpoint takes {need / 1e6:,.1f} MB, and in {folder} {free_space(folder)}. Free space there, then "
            f"{f'go on with: {command}' if command else 'start again'}"
        )


def _remove(folder: Path) -> str:
    """What to do about a damaged checkpoint."""
    return f"Remove {folder} to resume from the checkpoint before it."
