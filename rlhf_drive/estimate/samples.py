"""A few scenes like those of a recipe: its own where they lie ready, else generated ones."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from rlhf_drive.config import Recipe
from rlhf_drive.errors import DataError
from rlhf_drive.scenes import Scene
from rlhf_drive.scenes.generator import generate_scenes
from rlhf_drive.scenes.importers.recorded import Refused, import_recording, recording_paths
from rlhf_drive.scenes.store import SceneStore
from rlhf_drive.training.judge import judge

__all__ = ["sample_scenes"]

Starts = Literal["recommended", "moving", "all"]


def sample_scenes(recipe: Recipe, count: int) -> list[Scene]:
    """`count` scenes with all that scoring needs: of the recipe's store or recordings if they are there.

    Raises:
        DataError: Too few scenes can be scored.
    """
    section = recipe.scenes
    if section.store and (Path(section.store) / "scenes.json").is_file():
        train = SceneStore.open(section.store).split("train")
        return [train[i] for i in range(0, len(train), max(1, len(train) // count))][:count]
    if section.source == "recorded" and section.path and Path(section.path).is_dir():
        found = _recorded(Path(section.path), section.starts, count)
        if len(found) == count:
            return found
    scenes: list[Scene] = []
    for raw in generate_scenes(4 * count, seed=section.seed, kinds=section.kinds or None):
        judged = judge(raw, min_human_pdms=0.0)
        if not isinstance(judged, Refused):
            scenes.append(judged.scene)
        if len(scenes) == count:
            return scenes
    raise DataError(f"Only {len(scenes)} of {4 * count} generated scenes can be scored; {count} are needed.")


def _recorded(folder: Path, starts: Starts, count: int) -> list[Scene]:
    """One scene of each of the first recordings."""
    scenes: list[Scene] = []
    for path in recording_paths(folder)[: 2 * count]:
        raw = next((item for item in import_recording(path, starts) if isinstance(item, Scene)), None)
        judged = judge(raw, min_human_pdms=0.0) if raw is not None else None
        if judged is not None and not isinstance(judged, Refused):
            scenes.append(judged.scene)
        if len(scenes) == count:
            break
    return scenes
