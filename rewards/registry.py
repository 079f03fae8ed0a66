"""Reward functions by name: the `@reward` decorator, their typed options, and resolving what a recipe names.

A reward is a function of the rollouts whose keyword-only parameters are its options::

    @reward("smooth_speed")
    def smooth_speed(inputs: RewardInputs, *, tolerance_mps: float = 1.0) -> NDArray[np.float64]:
        ...  # [N], row n from plan n and its scene alone
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from rewards.carriers import RewardInputs
from rlhf_drive.errors import ConfigError, PluginError, UnknownNameError, did_you_mean
from rlhf_drive.registry import Registry, is_plugin, load_function

__all__ = [
    "ENTRY_POINTS",
    "REWARDS",
    "BoundReward",
    "RewardFunction",
    "RewardOption",
    "describe_options",
    "offered_rewards",
    "resolve_reward",
    "reward",
]

ENTRY_POINTS = "rlhf_drive.rewards"
"""Entry-point group through which installed packages offer rewards."""

BoundReward = Callable[[RewardInputs], NDArray[np.float64]]
"""A reward with its options filled in: inputs of N plans in, ``[N]`` out. What it returns may have to be awaited."""
F = TypeVar("F", bound=Callable[..., Any])
_KINDS: dict[str, type] = {"int": int, "float": float, "bool": bool, "str": str}


@dataclass(frozen=True)
class RewardOption:
    """One keyword-only parameter of a reward function."""

    name: str
    """As the recipe writes it."""
    kind: type
    """`int`, `float`, `bool` or `str`."""
    required: bool
    """Whether the function gives no default."""

    def accepts(self, value: object) -> bool:
        """Whether `value` is of this kind; a float also takes an integer, nothing else is converted."""
        if self.kind is float:
            return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)
        return type(value) is self.kind

    def word(self, value: object) -> object:
        """`value`, or "on" and "off" for a truth value where text is meant: YAML reads these words so."""
        return ("off", "on")[value] if self.kind is str and isinstance(value, bool) else value


@dataclass(frozen=True)
class RewardFunction:
    """A reward function with its name and the options it takes."""

    name: str
    """Its name among the components of a score."""
    function: Callable[..., NDArray[np.float64]]
    """The function itself."""
    options: tuple[RewardOption, ...]
    """Its options in order."""
    needs: tuple[str, ...] = ()
    """Components that the scorer must yield for it."""
    two_frame: bool = False
    """Whether it needs the plans of the previous frame."""
    auxiliary: bool = False
    """Whether it may only accompany another reward (a judge that can be fooled)."""

    def bind(
        self, options: Mapping[str, object], *, where: str = "reward", key: str = "options", kind: str = "reward"
    ) -> Callable[..., Any]:
        """The function with `options` filled in.

        Args:
            options: Values by option name. True and false stand for the words "on" and "off", as YAML reads those.
            where: Key path of the term, for messages (`reward.terms[2]`).
            key: Key of the options below it.
            kind: What the function is, for messages.

        Raises:
            ConfigError: An option is unknown, missing or of another type; the message lists all such options.
        """
        known = {option.name: option for option in self.options}
        place = f"{where}.{key}"
        problems = [
            f"{place}: {kind} {self.name!r} has no option {name!r}. {did_you_mean(str(name), known)}"
            for name in options
            if name not in known
        ]
        words = {name: known[name].word(value) for name, value in options.items() if name in known}
        for option in self.options:
            if option.name in words and not option.accepts(value := words[option.name]):
                problems.append(f"{place}.{option.name} must be {option.kind.__name__}; got {value!r}.")
            elif option.name not in words and option.required:
                problems.append(f"{place}.{option.name} ({option.kind.__name__}) is missing; it has no default.")
        if problems:
            raise ConfigError("\n".join(problems))
        return partial(self.function, **{name: known[name].kind(value) for name, value in words.items()})


REWARDS: Registry[RewardFunction] = Registry("reward")
"""All rewards that have a name."""


def reward(
    name: str, *, needs: Sequence[str] = (), two_frame: bool = False, auxiliary: bool = False
) -> Callable[[F], F]:
    """Register the decorated function as the reward `name`; the function itself stays as it is. ``async def`` is fine.

    Defining the function again (a notebook cell, an edited file) replaces it.

    Args:
        name: What recipes write.
        needs: Components that the function reads from its inputs; a recipe whose scorer lacks one is refused.
        two_frame: Whether it needs the plans of the previous frame.
        auxiliary: Whether it may only accompany another reward.

    Raises:
        ConfigError: Another function has that name.
        PluginError: The function is not of the form ``f(inputs, *, option: float = 1.0)``.

    Example:
        >>> @reward("gentle")
        ... def gentle(inputs: RewardInputs, *, limit: float = 2.0) -> NDArray[np.float64]:
        ...     return np.ones(len(inputs.trajectories))
    """

    def register(function: F) -> F:
        entry = replace(_describe(name, function), needs=tuple(needs), two_frame=two_frame, auxiliary=auxiliary)
        known = REWARDS.get(name) if name in REWARDS else None
        REWARDS.add(name, entry, replace=known is not None and _same_definition(known.function, function))
        function.__reward__ = entry  # type: ignore[attr-defined]
        return function

    return register


def resolve_reward(name: str, *, where: str = "reward") -> RewardFunction:
    """The reward that a recipe means by `name`.

    Args:
        name: A registered name, one that an installed package offers as entry point `rlhf_drive.rewards`,
            `package.module:function` or `path/to/file.py:function`. A function that is named by its place or offered
            as entry point need not be decorated.
        where: Key path of the name, for messages.

    Raises:
        UnknownNameError: No reward is registered or offered under that name; the message offers the closest.
        PluginError: The function cannot be loaded or does not have the form of a reward, or two packages offer that
            name; the message names the packages.
    """
    if is_plugin(name):
        return _entry_of(name.rpartition(":")[2], load_function(name, where=where))
    if name in REWARDS:
        return REWARDS.get(name)
    if points := _offers(name):
        return _offered(points, where)
    raise UnknownNameError(
        f"Unknown reward {name!r} in {where}. {did_you_mean(name, {*REWARDS.names(), *offered_rewards()})}"
    )


def offered_rewards() -> dict[str, str]:
    """Rewards that installed packages offer as entry points of group `rlhf_drive.rewards`: target by name.

    Nothing is imported. A registered name comes first, so a package cannot replace a built-in reward.
    """
    return {point.name: point.value for point in entry_points(group=ENTRY_POINTS)}


def _offers(name: str) -> list[EntryPoint]:
    """Entry points of that name, one for each target."""
    return list({point.value: point for point in entry_points(group=ENTRY_POINTS, name=name)}.values())


def _offered(points: list[EntryPoint], where: str) -> RewardFunction:
    """The reward behind the entry points of one name, of which there must be one."""
    name = points[0].name
    if len(points) > 1:
        packages = " and ".join(sorted(f"{_package(point)} ({point.value})" for point in points))
        raise PluginError(
            f"{where}: reward {name!r} is offered by {packages}. Name the function by its place, as "
            "package.module:function."
        )
    try:
        target = points[0].value.partition("[")[0].strip()  # without the names of extras
        return _entry_of(name, load_function(target, where=where))
    except PluginError as error:
        raise PluginError(f"{where}: reward {name!r} of {_package(points[0])}: {error}") from error


def _package(point: EntryPoint) -> str:
    """The package that offers an entry point, with its version."""
    return f"package {point.dist.name} {point.dist.version}" if point.dist else "a package without metadata"


def _entry_of(name: str, function: Callable[..., Any]) -> RewardFunction:
    """What the decorator noted about `function`, or what its signature says."""
    entry = getattr(function, "__reward__", None)
    return entry if isinstance(entry, RewardFunction) else _describe(name, function)


def _same_definition(old: object, new: object) -> bool:
    """Whether two functions are one definition, executed twice."""

    def place(function: object) -> tuple[str | None, str | None, str | None]:
        code = getattr(function, "__code__", None)
        return getattr(function, "__qualname__", None), getattr(function, "__module__", None), code and code.co_filename

    (old_name, old_module, old_file), (new_name, new_module, new_file) = place(old), place(new)
    return old_name is not None and old_name == new_name and (old_module == new_module or old_file == new_file)


def _describe(name: str, function: Callable[..., NDArray[np.float64]]) -> RewardFunction:
    """Read the options of `function` from its signature."""
    form = "Write it as f(inputs, *, option: float = 1.0)"
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError) as error:
        raise PluginError(f"Reward {name!r} has no signature that can be read: {error}. {form}.") from error
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if not parameters or parameters[0].kind not in positional:
        raise PluginError(f"Reward {name!r} must take the reward inputs as its first argument. {form}.")
    for parameter in parameters[1:]:
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            raise PluginError(f"Reward {name!r}: parameter {parameter.name!r} must be keyword-only. {form}.")
    return RewardFunction(name, function, describe_options(f"Reward {name!r}", function, skip=1))


def describe_options(who: str, function: Callable[..., Any], *, skip: int) -> tuple[RewardOption, ...]:
    """The keyword-only parameters of `function` as options.

    Args:
        who: What the function is, for messages (``Reward 'gentle'``).
        function: Any function.
        skip: Leading parameters that are not options.

    Raises:
        PluginError: A parameter after those is not keyword-only, or has no type that a recipe can state.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())[skip:]
    except (TypeError, ValueError) as error:
        raise PluginError(f"{who} has no signature that can be read: {error}.") from error
    for parameter in parameters:
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            raise PluginError(
                f"{who}: parameter {parameter.name!r} must be keyword-only. Write (…, *, option: int = 1)"
            )
    return tuple(_option(who, parameter) for parameter in parameters)


def _option(who: str, parameter: inspect.Parameter) -> RewardOption:
    """Type and default of one keyword-only parameter; without an annotation the default's type counts."""
    required = parameter.default is inspect.Parameter.empty
    annotation = parameter.annotation
    if annotation is inspect.Parameter.empty and not required:
        annotation = type(parameter.default)
    kind = _KINDS.get(annotation if isinstance(annotation, str) else getattr(annotation, "__name__", ""))
    if kind is None:
        raise PluginError(
            f"{who}: option {parameter.name!r} must be annotated as one of {', '.join(_KINDS)}. "
            "Options come from a recipe and are checked against their type."
        )
    option = RewardOption(parameter.name, kind, required)
    if not required and not option.accepts(parameter.default):
        raise PluginError(f"{who}: the default of option {parameter.name!r} is not {kind.__name__}.")
    return option
