"""The folder of a run: who owns it, which stages are done, and how long it took."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_drive.config import Recipe, dump_recipe, load_recipe
from rlhf_drive.disk import check_writable, write_text, writing
from rlhf_drive.errors import ConfigError, RlhfDriveError, RunStoppedError, StorageError
from rlhf_drive.training.ranks import Ranks
from rlhf_drive.training.run_lock import run_lock
from rlhf_drive.training.together import on_main

__all__ = ["RunFolder", "RunIdentity"]

RECIPE = "recipe.yaml"
STAGES = "stages.json"


@dataclass(frozen=True)
class RunIdentity:
    """Whose checkpoints these are."""

    id: str
    """Random, made with the run folder."""
    recipe: str
    """The first digits of the recipe's SHA-256."""


class RunFolder:
    """`recipe.yaml`, `stages.json` and whatever the stages write; never shared with another run.

    Where several processes train, all of them make one and call the same methods; the main one writes.
    """

    def __init__(self, path: Path, ranks: Ranks | None = None) -> None:
        """Read the state of a run folder. All processes must call it."""
        self.path, self.ranks = path, ranks or Ranks()
        self._stages: dict[str, Any] = {}
        self._recipe = ""
        self._read()

    @classmethod
    def create(cls, recipe: Recipe, ranks: Ranks | None = None) -> RunFolder:
        """A new folder `output_dir/name`, with a number if that is taken; nothing is overwritten.

        Raises:
            ConfigError: It cannot be made.
            StorageError: It is made, and nothing can be written to it.
        """
        return cls(on_main(ranks or Ranks(), lambda: _made(recipe)), ranks)

    @classmethod
    def resume(cls, recipe: Recipe, path: Path, ranks: Ranks | None = None) -> RunFolder:
        """The folder of an unfinished run of the same recipe.

        Raises:
            ConfigError: It is not a run folder, or of another recipe; the differing lines are named.
            StorageError: Nothing can be written to it.
        """
        on_main(ranks or Ranks(), lambda: _check_resumable(recipe, path))
        return cls(path, ranks)

    @contextmanager
    def locked(self) -> Iterator[bool]:
        """Within the block nobody else works in the folder. What was done until it was free is read again.

        Returns:
            False where the folder's file system knows no locks, so that two runs could meet in it.

        Raises:
            ConfigError: Another process works in it; the message names it.
        """
        lock = run_lock(self.path)
        held = on_main(self.ranks, lock.__enter__)
        try:
            self._read()
            self._note_end("")
            yield held
        except RunStoppedError:
            self._note_end("stopped")
            raise
        except RlhfDriveError as error:
            self._note_end(f"failed: {str(error).splitlines()[0]}")
            raise
        finally:
            if self.ranks.main:
                lock.__exit__(None, None, None)

    def _note_end(self, how: str) -> None:
        """Remember how the run broke off, for whoever looks at it later; nothing while it goes on."""
        if self.ranks.main and self._stages.get("ended", "") != how:
            self._stages["ended"] = how
            with suppress(StorageError):  # what ended the run matters more
                _write_stages(self.path, self._stages)

    @property
    def identity(self) -> RunIdentity:
        """Whose run this is, for its checkpoints."""
        return RunIdentity(self._stages["id"], self._recipe)

    def is_done(self, stage: str) -> bool:
        """Whether a stage has finished."""
        return stage in self._stages["done"]

    def done(self, stage: str) -> Mapping[str, Any]:
        """What a finished stage noted; empty if it has not run here."""
        return dict(self._stages["done"].get(stage, {}))

    def mark_done(self, stage: str, note: Mapping[str, Any], seconds: float) -> None:
        """Remember that a stage has finished."""
        self._stages["done"][stage] = dict(note)
        self.note_seconds(seconds)

    def note_seconds(self, seconds: float) -> None:
        """Remember the run's time so far."""
        self._stages["seconds"] = seconds
        on_main(self.ranks, lambda: _write_stages(self.path, self._stages))

    def seconds_before(self) -> float:
        """Time that earlier sessions of this run took, as far as noted."""
        return float(self._stages["seconds"])

    def _read(self) -> None:
        self._stages, self._recipe = on_main(self.ranks, lambda: _state_of(self.path))


def _made(recipe: Recipe) -> Path:
    base = Path(recipe.output_dir) / recipe.name
    for number in range(1, 10_000):
        path = base if number == 1 else base.with_name(f"{recipe.name}-{number}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise ConfigError(f"The run folder {path} cannot be made: {error}. Set output_dir=…") from None
        with writing("A new run's recipe", path):
            write_text(path / RECIPE, dump_recipe(recipe))
        return path
    raise ConfigError(f"{base} and 9,999 numbered folders beside it are taken; set output_dir=…")


def _check_resumable(recipe: Recipe, path: Path) -> None:
    try:
        written = (path / RECIPE).read_text()
    except OSError:
        raise ConfigError(f"{path} is no run folder: it has no {RECIPE}. Start a run without --resume.") from None
    now = dump_recipe(recipe)
    if written != now and not _says_the_same(path / RECIPE, recipe):
        differing = [
            f"{a.strip()} there, {b.strip()} here"
            for a, b in zip(written.splitlines(), now.splitlines(), strict=False)
            if a != b
        ]
        raise ConfigError(
            f"{path} was started with another recipe ({'; '.join(differing[:3]) or 'more or fewer keys'}). Resume "
            "with the recipe and overrides it was started with."
        )
    check_writable("A run that goes on", path)


def _says_the_same(path: Path, recipe: Recipe) -> bool:
    """Whether a recipe that somebody has edited means what `recipe` does: comments and spelling do not count."""
    try:
        return load_recipe(path) == recipe
    except ConfigError:
        return False


def _state_of(path: Path) -> tuple[dict[str, Any], str]:
    """Stages and the recipe's digest. A folder without an identity, new or of an older version, gets one."""
    stages: dict[str, Any] = {"id": "", "seconds": 0.0, "done": {}}
    try:
        if (path / STAGES).exists():
            stages |= json.loads((path / STAGES).read_text())
        recipe = hashlib.sha256((path / RECIPE).read_bytes()).hexdigest()[:16] if (path / RECIPE).exists() else ""
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{path / STAGES} cannot be read ({error}). Remove it to let finished stages be done again from their last "
            "checkpoints."
        ) from None
    if not stages["id"]:
        stages["id"] = secrets.token_hex(8)
        _write_stages(path, stages)
    return stages, recipe


def _write_stages(path: Path, stages: Mapping[str, Any]) -> None:
    with writing("What is done of the run", path / STAGES):
        write_text(path / STAGES, json.dumps(stages, indent=2) + "\n")
