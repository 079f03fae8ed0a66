"""The part of validation that must look beyond the recipe: rewards and situation kinds. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rlhf_drive.config import Recipe, inspect_recipe, raise_problems
from rlhf_drive.errors import RlhfDriveError, did_you_mean

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
    """Problems of the rewards and situation kinds that a recipe names: they must exist, and options must fit."""
    return [*_reward_problems(recipe), *_kind_problems(recipe)]


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


def _kind_problems(recipe: Recipe) -> Iterator[str]:
    if not recipe.scenes or recipe.scenes.source != "generate" or not recipe.scenes.kinds:
        return
    from rlhf_drive.scenes.generator import SITUATION_KINDS

    for i, kind in enumerate(recipe.scenes.kinds):
        if kind not in SITUATION_KINDS:
            yield f"scenes.kinds[{i}]: unknown situation kind {kind!r}. {did_you_mean(kind, SITUATION_KINDS)}"
