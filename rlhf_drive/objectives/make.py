"""From settings to an objective: every value checked, every problem said at once."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

from rlhf_drive.errors import ConfigError, did_you_mean
from rlhf_drive.objectives.base import Objective
from rlhf_drive.objectives.importance import IMPORTANCE_SAMPLING_LEVELS
from rlhf_drive.objectives.kl import KL_ESTIMATORS, KL_PLACES
from rlhf_drive.objectives.objective import AGGREGATION_OF, CLIPPED, PolicyObjective
from rlhf_drive.objectives.settings import ObjectiveSettings
from rlhf_drive.registry import is_plugin, load_function

__all__ = ["LOSS_TYPES", "load_part", "make_objective", "objective_problems"]

LOSS_TYPES: tuple[str, ...] = tuple(AGGREGATION_OF)
"""Objectives that have a name."""


def make_objective(settings: ObjectiveSettings) -> Objective:
    """The objective that `settings` describe.

    A `loss_type` such as ``my_losses.py:gentle`` is a function of one's own,
    ``gentle(inputs: LossInputs, denominators: Denominators) -> LossOutputs``. It replaces the policy term: it divides
    by the counts in `denominators`, honours `LossInputs.rows`, `mask` and `weight`, and returns a scalar loss and
    metrics that add up over micro-batches. The KL and entropy terms of `settings` are added to it as to any other.

    Raises:
        ConfigError: If any value is wrong; the message lists all that are.
        PluginError: If the named function cannot be loaded.

    Example:
        >>> gspo = make_objective(ObjectiveSettings(epsilon=3e-3, epsilon_high=4e-3))
    """
    problems = list(objective_problems(settings))
    if problems:
        raise ConfigError("\n".join(problems))
    if not is_plugin(settings.loss_type):
        return PolicyObjective(settings)
    own = load_part(settings.loss_type, "rl.loss_type", "inputs, denominators")
    return PolicyObjective(settings, own)


def load_part(target: str, where: str, parameters: str) -> Callable[..., Any]:
    """A user's function, checked to take the given positional parameters.

    Raises:
        ConfigError: It takes others.
        PluginError: It cannot be loaded.
    """
    function = load_function(target, where=where)
    try:
        signature = inspect.signature(function)
    except ValueError:  # written in C, without a signature to look at
        return function
    try:
        signature.bind(*parameters.split(", "))
    except TypeError as error:
        raise ConfigError(
            f"{where} = {target!r} takes {signature}, but is called with ({parameters}): {error}. "
            "Change its parameters."
        ) from error
    return function


def objective_problems(settings: ObjectiveSettings) -> Iterator[str]:
    """What is wrong with `settings`, a sentence each; nothing is loaded."""
    loss_type, level = settings.loss_type, settings.importance_sampling_level
    names = {
        "importance_sampling_level": IMPORTANCE_SAMPLING_LEVELS,
        "kl_estimator": KL_ESTIMATORS,
        "kl_in": KL_PLACES,
        **({} if is_plugin(loss_type) else {"loss_type": LOSS_TYPES}),
    }
    for key, known in names.items():
        value = getattr(settings, key)
        if value not in known:
            yield f"rl.{key} = {value!r} does not exist. {did_you_mean(value, known)}"
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
    if settings.use_bias_correction_kl and settings.beta > 0 and settings.kl_in == "reward":
        yield (
            "rl.use_bias_correction_kl corrects the gradient of a KL in the loss, but rl.kl_in = 'reward'. "
            "Set it to false."
        )


def _bound_problems(settings: ObjectiveSettings) -> Iterator[str]:
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
