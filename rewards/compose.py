"""A reward made of gates and weighted terms: ``total = prod_j g_j * sum_i w_i x_i / sum_i w_i``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import mul
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import rewards.builtin
from rewards.registry import BoundReward, RewardFunction, describe_options, resolve_reward
from rewards.scorer import SCORERS, Scorer
from rlhf_drive.errors import ConfigError, RlhfDriveError
from rlhf_drive.registry import is_plugin, load_function

__all__ = ["Reward", "RewardConfig", "RewardSpec", "RewardTerm", "build_reward"]


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
            gets a column for each, the later ones called `name_2`, `name_3`, ….
        gates: Factors that multiply the mean.
        scorer: The simulator score: `pdms` (NAVSIM v1.1), `epdms` (v2.2), or another in `SCORERS`.
        scorer_options: Its options.
        where: Key path of the reward, for messages.

    Raises:
        ConfigError: A name, weight or option is wrong, a function cannot be loaded or has the name of a component, the
            scorer does not yield a component that is needed, no weight is above 0, or everything that is weighted is an
            auxiliary reward such as a judge. One error lists everything that is wrong.

    Example:
        >>> build_reward([RewardSpec("pdms", 0.9), RewardSpec("comfort", 0.1)]).names
        ('nc', 'dac', 'ep', 'ttc', 'c', 'ddc', 'pdms')
    """
    problems: list[str] = []
    made: Scorer | None = None
    try:
        made = _make_scorer(scorer, scorer_options or {}, where)
    except RlhfDriveError as error:
        problems.append(str(error))
    found: dict[str, list[RewardTerm]] = {"gates": [], "terms": []}
    weighty: list[bool] = []
    for key, specs in (("gates", gates), ("terms", terms)):
        for index, spec in enumerate(specs):
            place = f"{where}.{key}[{index}]"
            if not _is_weight(spec.weight):
                problems.append(f"{place}.weight must be a number of at least 0; got {spec.weight!r}.")
            try:
                entry = resolve_reward(spec.name, where=f"{place}.name")
                term = _term(entry, spec, [*found["gates"], *found["terms"]], found[key], made, place)
                found[key].append(term)
                weighty += [not entry.auxiliary] if key == "gates" or spec.weight else []
            except RlhfDriveError as error:
                problems.append(str(error))
    if not problems and sum(spec.weight for spec in terms) <= 0:
        problems.append(f"{where}.terms needs at least one term with a weight above 0; got {len(terms)} without one.")
    elif not problems and not any(weighty):
        problems.append(
            f"{where}.terms: {terms[0].name!r} may only accompany another reward: a judge alone is easily fooled. "
            "Add a term such as pdms with a weight above 0."
        )
    if problems or made is None:
        raise ConfigError("\n".join(problems))
    config = RewardConfig(
        tuple(_absolute(spec) for spec in terms), tuple(_absolute(spec) for spec in gates),
        _absolute_target(scorer), dict(scorer_options or {}),
    )  # fmt: skip
    return Reward(made, tuple(found["gates"]), tuple(found["terms"]), config)


def _make_scorer(name: str, options: Mapping[str, object], where: str) -> Scorer:
    place = f"{where}.scorer"
    factory: Callable[..., Any] = (
        load_function(name, where=place) if is_plugin(name) else SCORERS.get(name, where=place)
    )
    described = RewardFunction(name, factory, describe_options(f"Scorer {name!r}", factory, skip=0))
    made = described.bind(options, where=place, key="scorer_options", kind="scorer")()
    if not isinstance(made, Scorer):
        raise ConfigError(f"{place}: {name!r} returned {type(made).__name__}, not a rewards.scorer.Scorer.")
    return made


def _is_weight(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _term(
    entry: RewardFunction,
    spec: RewardSpec,
    earlier: Sequence[RewardTerm],
    of_its_kind: Sequence[RewardTerm],
    scorer: Scorer | None,
    place: str,
) -> RewardTerm:
    """One gate or term; its column is its function's name, numbered where a user function is named again."""
    function = entry.bind(spec.options, where=place)
    columns = scorer.columns if scorer else ()
    builtin = entry.name in rewards.builtin.COMPONENT_TEXTS
    if builtin and not _is_builtin(entry):
        raise ConfigError(
            f"{place}.name: function {spec.name!r} is called like the component {entry.name!r}. Rename it."
        )
    if scorer and (lacking := [name for name in entry.needs if name not in columns]):
        raise ConfigError(
            f"{place}.name: reward {spec.name!r} needs {', '.join(lacking)}, which scorer {scorer.info.name!r} does "
            f"not yield (it yields {', '.join(columns)}). Choose another scorer or term."
        )
    if builtin and any(term.name == entry.name for term in of_its_kind):
        raise ConfigError(f"{place}.name: {spec.name!r} is there already. Name it once.")
    taken = {term.name for term in earlier}
    names = (entry.name if n == 1 else f"{entry.name}_{n}" for n in range(1, len(taken) + 2))
    name = entry.name if builtin else next(name for name in names if name not in taken)
    weight = float(spec.weight) if _is_weight(spec.weight) else float("nan")
    return RewardTerm(name, weight, function, builtin, entry.two_frame)


def _is_builtin(entry: RewardFunction) -> bool:
    return getattr(entry.function, "__module__", None) == rewards.builtin.__name__


def _absolute(spec: RewardSpec) -> RewardSpec:
    return replace(spec, name=_absolute_target(spec.name))


def _absolute_target(name: str) -> str:
    """A plug-in's file with its full path, so that a worker with another working directory finds it."""
    source, _, attribute = name.rpartition(":")
    return f"{Path(source).expanduser().resolve()}:{attribute}" if source.endswith(".py") else name
