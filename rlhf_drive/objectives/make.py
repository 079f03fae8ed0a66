"""From settings to an objective: every value checked, every problem said at once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

from rlhf_drive.errors import ConfigError, did_you_mean
from rlhf_drive.objective_rules import combination_problems
from rlhf_drive.objectives.base import Objective
from rlhf_drive.objectives.importance import IMPORTANCE_SAMPLING_LEVELS
from rlhf_drive.objectives.kl import KL_ESTIMATORS, KL_PLACES
from rlhf_drive.objectives.objective import PolicyObjective
from rlhf_drive.objectives.settings import ObjectiveSettings
from rlhf_drive.registry import is_plugin, load_function

__all__ = ["load_part", "make_objective", "objective_problems"]


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
    names = {
        "importance_sampling_level": IMPORTANCE_SAMPLING_LEVELS,
        "kl_estimator": KL_ESTIMATORS,
        "kl_in": KL_PLACES,
    }
    for key, known in names.items():
        value = getattr(settings, key)
        if value not in known:
            yield f"rl.{key} = {value!r} does not exist. {did_you_mean(value, known)}"
    yield from combination_problems(settings)
