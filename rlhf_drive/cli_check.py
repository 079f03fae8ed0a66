"""The part of validation that must look beyond the recipe: rewards, situation kinds, packages, functions of one's own.

Imports torch only where a recipe names an objective or advantages of one's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec

from rlhf_drive.config import Recipe, inspect_recipe, raise_problems
from rlhf_drive.errors import RlhfDriveError, did_you_mean
from rlhf_drive.registry import is_plugin

__all__ = ["check_recipe", "load_checked"]


def load_checked(name_or_path: str, overrides: Sequence[str]) -> Recipe:
    """The recipe, validated as far as that is possible before work starts.

    Raises:
        ConfigError: With every problem, by full key path.
    """
    recipe, problems = inspect_recipe(name_or_path, overrides)
    raise_problems(name_or_path, problems + check_recipe(recipe))
    return recipe


def check_recipe(recipe: Recipe) -> list[str]:
    """Problems of what a recipe names: rewards, situation kinds and functions must exist, and options must fit."""
    return [*_reward_problems(recipe), *_rl_problems(recipe), *_kind_problems(recipe)]


def _reward_problems(recipe: Recipe) -> list[str]:
    if not recipe.reward:
        return []
    from rewards.from_recipe import reward_config

    try:
        reward = reward_config(recipe.reward).build()
    except RlhfDriveError as error:
        return str(error).splitlines()
    if reward.two_frame and recipe.rollout and recipe.rollout.previous_plan == "none":
        return ["rollout.previous_plan: the reward needs the plan of the frame before. Set it to sampled or human"]
    return []


def _rl_problems(recipe: Recipe) -> Iterator[str]:
    """Functions of one's own that cannot be loaded, and a package that is not there: found before hours of SFT."""
    if not recipe.rl:
        return
    if recipe.rl.lora_rank and find_spec("peft") is None:
        yield 'rl.lora_rank: LoRA needs the package peft. Install it: pip install "rlhf-drive[lora]"'
    for key, parameters in (("loss_type", "inputs, denominators"), ("advantages", "inputs")):
        target = getattr(recipe.rl, key)
        if is_plugin(target):
            from rlhf_drive.objectives.make import load_part

            try:
                load_part(target, f"rl.{key}", parameters)
            except RlhfDriveError as error:
                yield str(error)


def _kind_problems(recipe: Recipe) -> Iterator[str]:
    if not recipe.scenes or recipe.scenes.source != "generate" or not recipe.scenes.kinds:
        return
    from rlhf_drive.scenes.generator import SITUATION_KINDS

    for i, kind in enumerate(recipe.scenes.kinds):
        if kind not in SITUATION_KINDS:
            yield f"scenes.kinds[{i}]: unknown situation kind {kind!r}. {did_you_mean(kind, SITUATION_KINDS)}"
