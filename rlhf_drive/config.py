"""Recipes: read, overridden, validated as a whole before any work starts, and written back. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, cast

from rlhf_drive.config_build import build
from rlhf_drive.config_rules import find_conflicts, missing_keys
from rlhf_drive.config_schema import (
    ACTION_TOKENS,
    PROCESS_KEYS,
    CompareSection,
    LoggingSection,
    ParallelSection,
    PolicySection,
    ProcessSection,
    RaySection,
    Recipe,
    RewardSection,
    RewardTerm,
    RlSection,
    RolloutSection,
    ScenesSection,
    SftSection,
    TokenizerSection,
)
from rlhf_drive.errors import ConfigError, did_you_mean

__all__ = [
    "ACTION_TOKENS",
    "CompareSection",
    "LoggingSection",
    "ParallelSection",
    "PolicySection",
    "ProcessSection",
    "RaySection",
    "Recipe",
    "RewardSection",
    "RewardTerm",
    "RlSection",
    "RolloutSection",
    "ScenesSection",
    "SftSection",
    "TokenizerSection",
    "dump_recipe",
    "inspect_recipe",
    "load_recipe",
    "raise_problems",
    "read_recipe_text",
    "shipped_recipes",
]


def shipped_recipes() -> tuple[str, ...]:
    """Names of the recipes that come with the package, sorted."""
    files = resources.files("recipes").iterdir()
    return tuple(sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml")))


def read_recipe_text(name_or_path: str | Path) -> str:
    """Text of a shipped recipe (by name, from any directory) or of a `.yaml` file.

    Raises:
        ConfigError: There is no such recipe or file, or it is not UTF-8 text.
    """
    name = str(name_or_path)
    if not name.endswith((".yaml", ".yml")):
        if name not in shipped_recipes():
            raise ConfigError(f"Unknown recipe {name!r}. {did_you_mean(name, shipped_recipes())} A file ends in .yaml.")
        return resources.files("recipes").joinpath(f"{name}.yaml").read_text("utf-8")
    try:
        return Path(name).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The recipe file {name!r} cannot be read: {error}. Check the path.") from error


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe, with overrides applied, validated as a whole.

    Args:
        name_or_path: Name of a shipped recipe, or path of a `.yaml` file.
        overrides: ``key=value`` each, the key a full path (`rl.max_steps=20`, `reward.terms[0].weight=2`), the value
            YAML.

    Raises:
        ConfigError: With every problem that was found, one line each, by full key path.

    Example:
        >>> load_recipe("quickstart", ["rl.max_steps=7"]).rl.max_steps
        7
    """
    recipe, problems = inspect_recipe(name_or_path, overrides)
    raise_problems(str(name_or_path), problems)
    return recipe


def inspect_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> tuple[Recipe, list[str]]:
    """As :func:`load_recipe`, but problems are returned, so that a caller can add its own.

    Returns:
        The recipe, in which a value or section with a problem is None, and ``key.path: what is wrong`` lines.

    Raises:
        ConfigError: The recipe is not there or is no YAML, or an override cannot be read.
    """
    config = _read(read_recipe_text(name_or_path), str(name_or_path))
    for item in overrides:
        _override(config, item)
    data = _plain(config)
    problems: list[str] = []
    recipe = cast(Recipe, build(Recipe, data, "", problems))
    problems += [*missing_keys(data), *find_conflicts(recipe)]
    return recipe, problems


def raise_problems(name: str, problems: Sequence[str]) -> None:
    """Raise one ConfigError that lists all problems of recipe `name`, if there are any."""
    if problems:
        count = "a problem" if len(problems) == 1 else f"{len(problems)} problems"
        lines = "".join(f"\n  {problem.rstrip('.') if not problem.endswith('?') else problem}" for problem in problems)
        raise ConfigError(f"Recipe {name} has {count}:{lines}")


def dump_recipe(recipe: Recipe) -> str:
    """YAML text that :func:`load_recipe` reads back to an equal recipe; sections that are absent stay absent."""
    from omegaconf import OmegaConf

    data = {key: value for key, value in dataclasses.asdict(recipe).items() if value is not None}
    if recipe.process:  # keys of another process are refused
        own = ("name", *PROCESS_KEYS[recipe.process.name])
        data["process"] = {key: data["process"][key] for key in own}
    return OmegaConf.to_yaml(OmegaConf.create(data))


def _read(text: str, name: str) -> Any:
    """YAML text as an OmegaConf mapping; interpolation stays unresolved."""
    import yaml
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        data = OmegaConf.create(text)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"Recipe {name} is not valid YAML: {error}") from error
    if not isinstance(data, DictConfig):
        raise ConfigError(f"Recipe {name} must be a mapping of keys at the top; got a {type(data).__name__}.")
    return data


def _override(data: Any, item: str) -> None:
    """Apply one ``key=value``."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    key, equals, text = item.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"The override {item!r} must be written key=value, such as rl.max_steps=20.")
    try:
        value = OmegaConf.select(OmegaConf.create(f"value: {text}"), "value") if "${" not in text else text
        OmegaConf.update(data, key.strip(), value, merge=False, force_add=True)
    except (yaml.YAMLError, OmegaConfBaseException, AssertionError, LookupError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"The override {item!r} cannot be applied: {reason}. Check the key and the value.") from error


def _plain(config: Any) -> dict[str, object]:
    """Plain dicts and lists; `${…}` stays text and is refused later."""
    from omegaconf import OmegaConf

    data = OmegaConf.to_container(config, resolve=False, throw_on_missing=False)
    assert isinstance(data, dict)
    return {str(key): value for key, value in data.items()}
