"""How a run's recipe differs from the shipped one that it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlhf_drive.config import dump_recipe, inspect_recipe, shipped_recipes

__all__ = ["Changes", "recipe_changes"]

IGNORED = ("name", "description", "output_dir")
"""Keys that say nothing about what a run does."""
ABSENT = "(absent)"


@dataclass(frozen=True)
class Changes:
    """The nearest shipped recipe, and what is different."""

    recipe: str
    """Its name."""
    keys: Mapping[str, tuple[Any, Any]]
    """Value there and value in the run, by full key, in the order of the recipe."""


def recipe_changes(data: Mapping[str, Any]) -> Changes:
    """Differences to the shipped recipe of the run's name, else to the one of its job with the fewest."""
    shipped = shipped_recipes()
    name = str(data.get("name", ""))
    if name in shipped:
        return _against(name, data)
    found = [_against(other, data) for other in shipped]
    same_job = [changes for changes in found if "job" not in changes.keys]
    return min(same_job or found, key=lambda changes: len(changes.keys))


def _against(name: str, data: Mapping[str, Any]) -> Changes:
    import yaml

    # Without checking: a recipe such as `real_scenes` lacks a path until somebody gives it.
    shipped, _ = inspect_recipe(name)
    before, now = _flat(yaml.safe_load(dump_recipe(shipped))), _flat(data)
    keys = [key for key in [*before, *(key for key in now if key not in before)] if not key.startswith(IGNORED)]
    differing = {key: (before.get(key, ABSENT), now.get(key, ABSENT)) for key in keys}
    return Changes(name, {key: pair for key, pair in differing.items() if pair[0] != pair[1]})


def _flat(data: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Values by full key; lists are values."""
    found: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping) and value:
            found |= _flat(value, f"{above}{key}.")
        else:
            found[f"{above}{key}"] = value
    return found
