"""Rules of objectives and advantages that recipes and the objectives themselves are checked by. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

from rlhf_drive.errors import did_you_mean
from rlhf_drive.registry import is_plugin

__all__ = [
    "ADVANTAGES",
    "CLIPPED",
    "LOSS_TYPES",
    "ObjectiveNumbers",
    "combination_problems",
    "correction_refusal",
    "name_problem",
]

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
"""Loss types whose policy term is the clipped surrogate; they differ in the aggregation only."""
LOSS_TYPES = (*CLIPPED, "cispo", "sapo", "gmpo", "wll")
"""Objectives that have a name."""
ADVANTAGES = ("group_mean", "rloo", "gdpo")
"""Advantage estimators that have a name."""


class ObjectiveNumbers(Protocol):
    """What the rules look at: `ObjectiveSettings`, or the `rl` section of a recipe."""

    @property
    def loss_type(self) -> str:
        """As in a recipe."""

    @property
    def importance_sampling_level(self) -> str:
        """As in a recipe."""

    @property
    def epsilon(self) -> float:
        """As in a recipe."""

    @property
    def epsilon_high(self) -> float:
        """As in a recipe."""

    @property
    def delta(self) -> float:
        """As in a recipe."""

    @property
    def importance_sampling_cap(self) -> float:
        """As in a recipe."""

    @property
    def sapo_temperature_pos(self) -> float:
        """As in a recipe."""

    @property
    def sapo_temperature_neg(self) -> float:
        """As in a recipe."""

    @property
    def beta(self) -> float:
        """As in a recipe."""

    @property
    def kl_in(self) -> str:
        """As in a recipe."""

    @property
    def use_bias_correction_kl(self) -> bool:
        """As in a recipe."""

    @property
    def entropy_coef(self) -> float:
        """As in a recipe."""


def name_problem(key: str, value: str, known: tuple[str, ...]) -> Iterator[str]:
    """A name that is neither known nor a path to a user's function."""
    if value.endswith(".py"):
        yield f"rl.{key} = {value!r} names a file; name the function in it too, {value}:function."
    elif not is_plugin(value) and value not in known:
        yield f"rl.{key} = {value!r} does not exist. {did_you_mean(value, known)}"


def combination_problems(settings: ObjectiveNumbers) -> Iterator[str]:
    """What is wrong with an objective's numbers and their combination, a sentence each."""
    loss_type, level = settings.loss_type, settings.importance_sampling_level
    if loss_type.lower() == "gspo":
        yield "rl.loss_type = 'gspo' is loss_type 'grpo' with importance_sampling_level 'sequence'. Set these two."
    else:
        yield from name_problem("loss_type", loss_type, LOSS_TYPES)
    for key, meaning in (
        ("beta", "it weighs the KL penalty to the reference policy"),
        ("entropy_coef", "it weighs the entropy, which is raised"),
        ("delta", "it bounds the ratio where the advantage is negative; 0 means no bound"),
    ):
        value = getattr(settings, key)
        if not (value >= 0 and math.isfinite(value)):
            yield f"rl.{key} = {value} must be 0 or positive; {meaning}."
    for key in ("sapo_temperature_pos", "sapo_temperature_neg"):
        value = getattr(settings, key)
        if not (value > 0 and math.isfinite(value)):
            yield f"rl.{key} = {value} must be positive; a higher one fades the gradient faster away from ratio 1."
    yield from _bound_problems(settings)
    if loss_type == "gmpo" and level != "sequence":
        yield (
            "rl.loss_type = 'gmpo' is a geometric mean over the sequence, but "
            f"rl.importance_sampling_level = {level!r}. Set it to 'sequence'."
        )
    cap = settings.importance_sampling_cap
    if not (cap == 0 or cap >= 1):
        yield (
            f"rl.importance_sampling_cap = {cap} must be at least 1, the weight of what the update's own weights have "
            "sampled; or 0, with which nothing is weighed. 2.0 is usual."
        )
    if settings.use_bias_correction_kl and settings.beta > 0 and settings.kl_in == "reward":
        yield (
            "rl.use_bias_correction_kl corrects the gradient of a KL in the loss, but rl.kl_in = 'reward'. "
            "Set it to false."
        )


def correction_refusal(loss_type: str) -> str | None:
    """Why samples of older weights cannot be weighed (`importance_sampling_cap` above 0); None if they can.

    To be asked only where such samples occur: a cap without them is no mistake.

    Args:
        loss_type: As in a recipe.

    Example:
        >>> correction_refusal("grpo") is None
        True
    """
    if loss_type == "wll":
        return (
            "rl.loss_type = 'wll' compares the plans of a group as they were drawn and has no old policy to weigh them "
            "for. Set the cap to 0, which learns from older samples as they are, or use another loss_type."
        )
    if is_plugin(loss_type):
        return (
            f"rl.loss_type = {loss_type!r} is a function of your own, whose terms are not weighed for it. Set the cap "
            "to 0 and multiply them with rlhf_drive.objectives.importance_correction(inputs, level, cap) in it."
        )
    return None


def _bound_problems(settings: ObjectiveNumbers) -> Iterator[str]:
    """Problems of the trust region."""
    low, high, delta = settings.epsilon, settings.epsilon_high, settings.delta
    if not 0 < low < 1:
        yield f"rl.epsilon = {low} must lie between 0 and 1; the ratio is clipped at 1 - epsilon."
    if not (high > 0 and math.isfinite(high)):
        yield f"rl.epsilon_high = {high} must be positive; the ratio is clipped at 1 + epsilon_high."
    elif settings.loss_type == "cispo" and high < 1:
        yield (
            f"rl.epsilon_high = {high} is the cap of the ratio itself with rl.loss_type = 'cispo', not the 1 + "
            "epsilon_high of other objectives: below 1 it would cap every ratio. 5.0 is usual."
        )
    if delta > 0 and settings.loss_type not in CLIPPED:
        yield f"rl.delta = {delta} has no effect with rl.loss_type = {settings.loss_type!r}. Set it to 0."
    elif delta > 0 and delta <= 1 + high:
        yield f"rl.delta = {delta} must lie above 1 + rl.epsilon_high = {1 + high:g}, where the clip begins."
