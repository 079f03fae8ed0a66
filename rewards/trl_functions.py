"""TRL's reward functions as rewards here, unchanged: ``f(prompts, completions, **columns) -> list[float | None]``.

In a recipe::

    terms:
      - {name: pdms, weight: 0.8, options: {}}
      - {name: trl, weight: 0.2, options: {function: "my_rewards.py:smoothness"}}

The function gets what it names, or everything if it takes ``**kwargs``; docs/rewards.md lists it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rewards.carriers import EPDMS_COMPONENTS, PDMS_COMPONENTS, RewardInputs
from rewards.isolation import OutputError
from rewards.opened import opened_reward
from rewards.partly_scored import RowResult, gather_rows
from rewards.plan_text import command_word, format_plan, scene_prompt
from rewards.registry import BoundReward
from rlhf_drive.errors import ConfigError
from rlhf_drive.registry import load_function

__all__ = ["TRL_COLUMNS", "trl", "trl_reward"]

TRL_COLUMNS = ("scene", "kind", "poses", "command", "speed_mps")
"""Columns beside the components: the scene's token and situation kind, the plan ``[8, 3]`` as lists, the command as a
word, and the speed now."""
_TRAINER = ("trainer_state", "log_extra", "log_metric")
_OFFERED = frozenset(("prompts", "completions", *TRL_COLUMNS, *PDMS_COMPONENTS, *EPDMS_COMPONENTS, *_TRAINER))


@opened_reward("trl")
def trl(*, function: str, conversational: bool = False) -> BoundReward:
    """A reward function written for TRL.

    Args:
        function: `package.module:function` or `path/to/file.py:function`; a coroutine function is fine.
        conversational: Whether prompts and completions come as lists of messages (`role`, `content`) rather than text.

    Raises:
        PluginError: The function cannot be loaded.
        ConfigError: It needs something that is not there, such as token ids.
    """
    return trl_reward(load_function(function, where="function"), conversational=conversational)


def trl_reward(function: Callable[..., Any], *, conversational: bool = False) -> BoundReward:
    """`function`, written for TRL, as a reward here.

    None or a number that is not finite leaves the row unscored, with that as its reason. The function is called once
    with the rows of a call; if it raises, it is called again with fewer, so a row must not depend on the others. What a
    coroutine function makes is to be awaited, as the reward service does, always in the same event loop.

    Args:
        function: TRL's form, sync or async.
        conversational: As in :func:`trl`.

    Raises:
        ConfigError: A parameter without default is nothing that TRL's functions get here.

    Example:
        >>> def short(completions, **kwargs):
        ...     return [1.0 if len(text) < 200 else 0.0 for text in completions]
        >>> smoothness = trl_reward(short)
    """
    name = _name(function)
    takes, required = _keywords(function, name)

    def score(inputs: RewardInputs) -> Any:
        offered = _arguments(inputs, conversational)
        if lacking := required - set(offered):
            raise OutputError(f"TRL function {name!r} needs {', '.join(sorted(lacking))}, which this scorer lacks")
        result = function(**{key: value for key, value in offered.items() if takes is None or key in takes})
        if inspect.isawaitable(result):
            return awaited(result, len(inputs.trajectories))
        return gather_rows(_rows(name, result, len(inputs.trajectories)))

    async def awaited(result: Awaitable[Any], count: int) -> NDArray[np.float64]:
        return gather_rows(_rows(name, await result, count))

    score.__name__ = name
    if name.isidentifier() and name not in _OFFERED:
        score.column = name  # type: ignore[attr-defined]
    return score


def _arguments(inputs: RewardInputs, conversational: bool) -> dict[str, Any]:
    """Everything a function may take, by keyword; a list of N for each column."""
    scenes = [inputs.scenes[index] for index in inputs.trajectories.scene_index]
    prompts: Sequence[Any] = [scene_prompt(scene.observation) for scene in scenes]
    completions: Sequence[Any] = [format_plan(poses) for poses in inputs.trajectories.poses]
    if conversational:
        prompts = [[{"role": "user", "content": text}] for text in prompts]
        completions = [[{"role": "assistant", "content": text}] for text in completions]
    columns: dict[str, Any] = {
        "scene": [scene.token for scene in scenes],
        "kind": [scene.kind for scene in scenes],
        "poses": inputs.trajectories.poses.tolist(),
        "command": [command_word(scene.observation) for scene in scenes],
        "speed_mps": [scene.observation.speed_mps for scene in scenes],
    }
    components = {
        name: [value if math.isfinite(value) else None for value in values.tolist()]
        for name, values in inputs.components.items()
    }
    trainer = {"trainer_state": None, "log_extra": _log_nothing, "log_metric": _log_nothing}
    return {"prompts": prompts, "completions": completions} | columns | components | trainer


def _log_nothing(name: str, value: object) -> None:
    """Stands in for TRL's loggers: scores are logged by the service."""


def _keywords(function: Callable[..., Any], name: str) -> tuple[frozenset[str] | None, frozenset[str]]:
    """Keywords that `function` takes (None if it takes any), and those without which it cannot be called."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"TRL function {name!r} has no signature that can be read: {error}.") from error
    kinds = inspect.Parameter
    any_keyword = any(p.kind is kinds.VAR_KEYWORD for p in parameters)
    named = [p for p in parameters if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)]
    required = frozenset(p.name for p in named if p.default is kinds.empty)
    nameless = {p.name for p in parameters if p.kind is kinds.POSITIONAL_ONLY and p.default is kinds.empty}
    if lacking := sorted((required - _OFFERED) | nameless):
        raise ConfigError(
            f"TRL function {name!r} needs {', '.join(lacking)}, which is not there (a plan has no token ids). "
            f"It may take, by keyword: {', '.join(sorted(_OFFERED))}. Give the others a default."
        )
    return None if any_keyword else frozenset(p.name for p in named), required


def _name(function: Callable[..., Any]) -> str:
    """The name TRL would log it under."""
    while isinstance(function, partial):
        function = function.func
    return str(getattr(function, "__name__", type(function).__name__))


def _rows(name: str, result: object, count: int) -> list[RowResult]:
    """What the function returned, row by row."""
    if isinstance(result, str | bytes | Mapping) or not hasattr(result, "__iter__"):
        raise OutputError(f"TRL function {name!r} returned {type(result).__name__}, not a list of numbers")
    values = list(result)
    if len(values) != count:
        raise OutputError(f"TRL function {name!r} returned {len(values)} values for {count} rows")
    return [_row(name, value) for value in values]


def _row(name: str, value: Any) -> RowResult:
    if value is None:
        return "unavailable", f"TRL function {name!r} returned None: not scored"
    if not isinstance(value, Real) and getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()  # a tensor or array of no dimension
    if not isinstance(value, Real):
        return "wrong_output", f"TRL function {name!r} returned {value!r:.60}, not a number"
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        return "not_finite", f"TRL function {name!r} returned {number}"
    return number
