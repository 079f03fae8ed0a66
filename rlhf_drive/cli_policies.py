"""Which policies a command line means: run folders, checkpoint folders, or NAME=FOLDER."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlhf_drive.config_schema import POLICY_FILE
from rlhf_drive.errors import ConfigError

__all__ = ["compare_overrides", "find_policies"]

RUN_FILE = "recipe.yaml"
"""A folder with this file is a run folder."""


def find_policies(items: Sequence[str]) -> dict[str, Path]:
    """Checkpoint folders by the name that a report shows.

    A run folder stands for every policy it trained (`sft`, `rl-seed0`, …); where several folders are given, their
    names come first (`quickstart-sft`). A checkpoint folder is called like itself, or as ``NAME=FOLDER`` says.

    Raises:
        ConfigError: A folder does not exist or holds no policy, or two policies would have one name.
    """
    found: dict[str, Path] = {}
    for item in items:
        name, equals, rest = item.partition("=")
        folder = Path(rest if equals else item)
        for key, path in _policies_of(folder, name if equals else "", alone=len(items) == 1).items():
            if key in found:
                raise ConfigError(f"Two policies are called {key!r}: {found[key]} and {path}. Write NAME={path}.")
            found[key] = path
    return found


def _policies_of(folder: Path, name: str, *, alone: bool) -> dict[str, Path]:
    """Policies in one folder by name."""
    if not folder.is_dir():
        raise ConfigError(f"There is no folder {folder}. Give a run folder or a checkpoint folder.")
    if (folder / POLICY_FILE).exists():
        own = folder.resolve()
        return {name or (own.parent.name if own.name == "policy" else own.name): folder}
    if (folder / RUN_FILE).exists():
        paths = sorted(path.parent for path in folder.glob(f"*/policy/{POLICY_FILE}"))
        if paths:
            prefix = name or ("" if alone else folder.resolve().name)
            stages = sorted(paths, key=lambda path: (path.parent.name != "sft", path.parent.name))
            return {f"{prefix}-{path.parent.name}".removeprefix("-"): path for path in stages}
    raise ConfigError(f"{folder} holds no trained policy. Give the folder of a finished run, or of a checkpoint.")


def compare_overrides(policies: Mapping[str, Path], scenes: Path, out: Path) -> list[str]:
    """Overrides of the recipe `compare` for the given policies, store and output folder."""
    named = {name: str(path) for name, path in policies.items()}
    absolute = out.resolve()
    return [
        f"scenes.store={json.dumps(str(scenes))}",
        f"compare.policies={json.dumps(named)}",
        f"output_dir={json.dumps(str(absolute.parent))}",
        f"name={json.dumps(absolute.name)}",
    ]
