"""A reward made of gates and weighted terms: ``total = prod_j g_j * sum_i w_i x_i / sum_i w_i``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial, reduce
from operator import mul
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

import rewards.builtin
from rewards.carriers import RewardInputs
from rewards.registry import REWARDS, BoundReward, RewardFunction, describe_options, resolve_reward
from rewards.scorer import SCORERS, Scorer
from rlhf_drive.errors import ConfigError, PluginError, RlhfDriveError
from rlhf_drive.registry import is_plugin, load_function

__all__ = ["Reward", "RewardConfig", "RewardSpec", "RewardTerm", "build_reward"]

T = TypeVar("T")


@dataclass(frozen=True)
class RewardSpec:
    """One gate or term as a recipe states it."""

    name: str
    """A registered name, `package.module:function` or `path/to/file.py:function`."""
    weight: float = 1.0
    """Share in the weighted mean, at least 0; a term of weight 0 is scored and reported only. Gates have none."""
    options: Mapping[str, object] = field(default_factory=dict)
    """Values of the function's keyword-only parameters."""


@dataclass(frozen=True)
class RewardConfig:
    """A whole reward as data: what a worker in another process needs to build the same one."""

    terms: tuple[RewardSpec, ...]
    """At least one."""
    gates: tuple[RewardSpec, ...] = ()
    """Factors of the weighted mean."""
    scorer: str = "pdms"
    """A registered scorer, or `package.module:function` or `path/to/file.py:function` of one that is not."""
    scorer_options: Mapping[str, object] = field(default_factory=dict)
    """Its options, such as ``{"human_filter": "on"}``."""

    def build(self) -> Reward:
        """The reward; see :func:`build_reward`."""
        return build_reward(
            self.terms, gates=self.gates, scorer=self.scorer, scorer_options=self.scorer_options, where="reward"
        )


@dataclass(frozen=True)
class RewardTerm:
    """One gate or term, ready to be computed."""

    name: str
    """Column of the scores that holds it."""
    weight: float
    """Share in the weighted mean; 1 for a gate."""
    function: BoundReward
    """The function with its options."""
    is_component: bool
    """Whether the scorer yields this column itself."""
    two_frame: bool
    """Whether it needs the plans of the previous frame."""


@dataclass(frozen=True)
class Reward:
    """What a policy is rewarded for. Made by :func:`build_reward`."""

    scorer: Scorer
    """The simulator score whose components the gates and terms use."""
    gates: tuple[RewardTerm, ...]
    """Factors; may be empty."""
    terms: tuple[RewardTerm, ...]
    """At least one; the weights are not all 0."""
    config: RewardConfig
    """What it was built from, with absolute paths; picklable."""

    @property
    def user_terms(self) -> tuple[RewardTerm, ...]:
        """Gates and terms beyond the scorer's own components, each column once."""
        found = {term.name: term for term in (*self.gates, *self.terms) if not term.is_component}
        return tuple(found.values())

    @property
    def names(self) -> tuple[str, ...]:
        """Columns of the scores: the scorer's components, then every other gate and term."""
        return self.scorer.columns + tuple(term.name for term in self.user_terms)

    @property
    def two_frame(self) -> bool:
        """Whether the plans of the previous frame are needed."""
        return any(term.two_frame for term in (*self.gates, *self.terms))

    def total(self, columns: Mapping[str, NDArray[np.float64]]) -> NDArray[np.float64]:
        """Product of the gates times the weighted mean of the terms.

        Args:
            columns: ``[N]`` values by column name.

        Returns:
            ``[N]``; NaN where a gate or term is NaN, even a term of weight 0.
        """
        weighted = sum(term.weight * columns[term.name] for term in self.terms)
        mean = weighted / sum(term.weight for term in self.terms)
        return np.asarray(reduce(mul, (columns[gate.name] for gate in self.gates), mean), dtype=np.float64)


def build_reward(
    terms: Sequence[RewardSpec],
    *,
    gates: Sequence[RewardSpec] = (),
    scorer: str = "pdms",
    scorer_options: Mapping[str, object] | None = None,
    where: str = "reward",
) -> Reward:
    """Check a recipe's reward and make it ready.

    Args:
        terms: The terms of the weighted mean, at least one. A user function that is named twice (with other options)
            gets a column for each, the later ones called `name_2`, `name_3`, …. A column of the scorer is a term by its
            name.
        gates: Factors that multiply the mean. What is a gate may be a term as well; it is computed once.
        scorer: The simulator score: `pdms` (NAVSIM v1.1), `epdms` (v2.2), another in `SCORERS`, or
            `package.module:function` or `path/to/file.py:function` that returns one.
        scorer_options: Its options.
        where: Key path of the reward, for messages.

    Raises:
        ConfigError: A name, weight or option is wrong, a function cannot be loaded or has the name of a component, the
            scorer does not yield a component that is needed, no weight is above 0, or every term with a weight above 0
            is an auxiliary reward such as a judge. One error lists everything that is wrong.

    Example:
        >>> build_reward([RewardSpec("pdms", 0.9), RewardSpec("comfort", 0.1)]).names
        ('nc', 'dac', 'ep', 'ttc', 'c', 'ddc', 'pdms')
    """
    problems: list[str] = []
    made = _collect(problems, lambda: _make_scorer(scorer, scorer_options or {}, where))
    named: dict[str, list[_Named]] = {"gates": [], "terms": []}
    for key, specs in (("gates", gates), ("terms", terms)):
        for index, spec in enumerate(specs):
            place = f"{where}.{key}[{index}]"
            problems += _weight_problem(spec, key, place)
            found = _collect(problems, partial(_name_term, spec, key, named, made, place))
            named[key] += [found] if found is not None else []
    problems = problems or _nothing_to_learn(named["terms"], where)
    if problems or made is None:
        raise ConfigError("\n".join(problems))
    config = RewardConfig(
        tuple(_absolute(spec) for spec in terms),
        tuple(_absolute(spec) for spec in gates),
        _absolute_target(scorer),
        dict(scorer_options or {}),
    )
    ready = {key: tuple(item.term for item in items) for key, items in named.items()}
    return Reward(made, ready["gates"], ready["terms"], config)


@dataclass(frozen=True)
class _Named:
    """A gate or term with what it was made from."""

    term: RewardTerm
    spec: RewardSpec
    entry: RewardFunction


def _collect(problems: list[str], make: Callable[[], T]) -> T | None:
    """What `make` makes; or None, and one more problem."""
    try:
        return make()
    except RlhfDriveError as error:
        problems.append(str(error))
        return None


def _weight_problem(spec: RewardSpec, key: str, place: str) -> list[str]:
    """What is wrong with the weight of a gate or term."""
    if not _is_weight(spec.weight):
        return [f"{place}.weight must be a number of at least 0; got {spec.weight!r}."]
    if key == "gates" and spec.weight != 1:
        return [f"{place}.weight: a gate has no weight; got {spec.weight!r}. Leave it out, or make it a term."]
    return []


def _is_weight(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _nothing_to_learn(terms: Sequence[_Named], where: str) -> list[str]:
    """Why terms that are right one by one are no reward together."""
    weighted = [item for item in terms if item.term.weight > 0]
    if not weighted:
        return [f"{where}.terms needs at least one term with a weight above 0; got {len(terms)} without one."]
    if all(item.entry.auxiliary for item in weighted):
        return [
            f"{where}.terms: {weighted[0].spec.name!r} may only accompany another reward, because alone it is easily "
            "fooled, gates or not. Add a term such as pdms with a weight above 0."
        ]
    return []


def _make_scorer(name: str, options: Mapping[str, object], where: str) -> Scorer:
    """The scorer `name`, with its options."""
    place = f"{where}.scorer"
    factory: Callable[..., Any] = (
        load_function(name, where=place) if is_plugin(name) else SCORERS.get(name, where=place)
    )
    described = RewardFunction(name, factory, describe_options(f"Scorer {name!r}", factory, skip=0))
    bound = described.bind(options, where=where, key="scorer_options", kind="scorer")
    try:
        made = bound()
    except RlhfDriveError as error:
        raise ConfigError(f"{where}.scorer_options: {error}") from error
    except Exception as error:  # a plug-in's own code
        raise PluginError(f"{place}: {name!r} failed: {type(error).__name__}: {error}.") from error
    if not isinstance(made, Scorer):
        raise ConfigError(f"{place}: {name!r} returned {type(made).__name__}, not a rewards.scorer.Scorer.")
    if not made.columns or len(set(made.columns)) < len(made.columns) or not made.optional <= set(made.columns):
        raise ConfigError(
            f"{place}: {name!r} yields the columns {', '.join(made.columns) or '(none)'} with the optional ones "
            f"{', '.join(sorted(made.optional)) or '(none)'}. Name each column once, and optional ones among them."
        )
    return made


def _name_term(
    spec: RewardSpec, key: str, named: Mapping[str, Sequence[_Named]], scorer: Scorer | None, place: str
) -> _Named:
    """One gate or term with its column: the component's, or its function's name."""
    columns = scorer.columns if scorer else ()
    entry = _resolve(spec.name, columns, place)
    is_component = entry.function is _component_reader(entry.name) or _is_builtin_component(entry)
    _check_term(spec, entry, is_component, scorer, place)
    function = entry.bind(spec.options, where=place)
    weight = float(spec.weight) if _is_weight(spec.weight) else math.nan
    same = {of: next((item for item in items if _is_same(item, entry, spec)), None) for of, items in named.items()}
    if same[key] is not None:
        options = "" if is_component else " with the same options"
        raise ConfigError(f"{place}.name: {spec.name!r} is among the {key} already{options}. Name it once.")
    twin = next((item.term for item in same.values() if item is not None), None)
    if twin is not None:  # a gate that is a term as well is computed once
        return _Named(replace(twin, weight=weight), spec, entry)
    name = entry.name if is_component else _free_name(getattr(function, "column", entry.name), columns, named)
    return _Named(RewardTerm(name, weight, function, is_component, entry.two_frame), spec, entry)


def _resolve(name: str, columns: Sequence[str], place: str) -> RewardFunction:
    """The reward `name`; a column of the scorer needs no reward of that name."""
    if name in columns and name not in REWARDS:
        return RewardFunction(name, _component_reader(name), (), needs=(name,))
    return resolve_reward(name, where=f"{place}.name")


@cache
def _component_reader(name: str) -> BoundReward:
    """The reward that is a column of a scorer other than ours; the same function each time."""

    def component(inputs: RewardInputs) -> NDArray[np.float64]:
        return inputs.components[name]

    return component


def _is_builtin_component(entry: RewardFunction) -> bool:
    of_builtin = getattr(entry.function, "__module__", None) == rewards.builtin.__name__
    return of_builtin and entry.name in rewards.builtin.COMPONENT_TEXTS


def _check_term(spec: RewardSpec, entry: RewardFunction, is_component: bool, scorer: Scorer | None, place: str) -> None:
    """Refuse what would hide a component or lacks one."""
    columns = scorer.columns if scorer else ()
    if not is_component and entry.name in (*columns, *rewards.builtin.COMPONENT_TEXTS):
        raise ConfigError(
            f"{place}.name: function {spec.name!r} is called like the component {entry.name!r}. Rename it."
        )
    if scorer and (lacking := [name for name in entry.needs if name not in columns]):
        raise ConfigError(
            f"{place}.name: reward {spec.name!r} needs {', '.join(lacking)}, which scorer {scorer.info.name!r} does "
            f"not yield (it yields {', '.join(columns)}). Choose another scorer or term."
        )


def _is_same(earlier: _Named, entry: RewardFunction, spec: RewardSpec) -> bool:
    """Whether a gate or term is the same function with the same options as an earlier one."""
    return earlier.entry.function is entry.function and dict(earlier.spec.options) == dict(spec.options)


def _free_name(name: str, columns: Sequence[str], named: Mapping[str, Sequence[_Named]]) -> str:
    """`name`, or `name_2`, `name_3`, … if it is taken."""
    taken = {*columns, *(item.term.name for items in named.values() for item in items)}
    candidates = (name if n == 1 else f"{name}_{n}" for n in range(1, len(taken) + 2))
    return next(candidate for candidate in candidates if candidate not in taken)


def _absolute(spec: RewardSpec) -> RewardSpec:
    """The same for a worker with another working directory, its options as plain data."""
    options = {key: _absolute_target(value) if isinstance(value, str) else value for key, value in spec.options.items()}
    return replace(spec, name=_absolute_target(spec.name), options=options)


def _absolute_target(name: str) -> str:
    """A plug-in's file with its full path; other text as it is."""
    source, _, attribute = name.rpartition(":")
    path = Path(source).expanduser() if source.endswith(".py") else None
    return f"{path.resolve()}:{attribute}" if path is not None and path.is_file() else name
