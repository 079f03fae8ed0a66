"""The folder of a run: who owns it, which stages are done, and how long it took."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_drive.config import Recipe, dump_recipe
from rlhf_drive.errors import ConfigError

__all__ = ["RunFolder"]

RECIPE = "recipe.yaml"
STAGES = "stages.json"


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)  # noqa: PTH105


class RunFolder:
    """`recipe.yaml`, `stages.json` and whatever the stages write; never shared with another run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stages: dict[str, Any] = {"seconds": 0.0, "done": {}}
        if (path / STAGES).exists():
            self._stages = json.loads((path / STAGES).read_text())

    @classmethod
    def create(cls, recipe: Recipe) -> RunFolder:
        """A new folder `output_dir/name`, with a number if that is taken; nothing is overwritten.

        Raises:
            ConfigError: It cannot be written.
        """
        base = Path(recipe.output_dir) / recipe.name
        for number in range(1, 10_000):
            path = base if number == 1 else base.with_name(f"{recipe.name}-{number}")
            try:
                path.mkdir(parents=True)
            except FileExistsError:
                continue
            except OSError as error:
                raise ConfigError(f"The run folder {path} cannot be made: {error}. Set output_dir=…") from None
            _write_atomically(path / RECIPE, dump_recipe(recipe))
            return cls(path)
        raise ConfigError(f"{base} and 9,999 numbered folders beside it are taken; set output_dir=…")

    @classmethod
    def resume(cls, recipe: Recipe, path: Path) -> RunFolder:
        """The folder of an unfinished run of the same recipe.

        Raises:
            ConfigError: It is not a run folder, or of another recipe; the differing lines are named.
        """
        try:
            written = (path / RECIPE).read_text()
        except OSError:
            raise ConfigError(f"{path} is no run folder: it has no {RECIPE}. Start a run without --resume.") from None
        now = dump_recipe(recipe)
        if written != now:
            differing = [
                f"{a.strip()} there, {b.strip()} here"
                for a, b in zip(written.splitlines(), now.splitlines(), strict=False)
                if a != b
            ]
            raise ConfigError(
                f"{path} was started with another recipe ({'; '.join(differing[:3]) or 'more or fewer keys'}). Resume "
                "with the recipe and overrides it was started with."
            )
        return cls(path)

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
        _write_atomically(self.path / STAGES, json.dumps(self._stages, indent=2) + "\n")

    def seconds_before(self) -> float:
        """Time that earlier sessions of this run took, as far as noted."""
        return float(self._stages["seconds"])
