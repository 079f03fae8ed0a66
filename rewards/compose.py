"""A reward made of weighted terms: ``total = sum_i w_i x_i / sum_i w_i``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

import rewards.builtin
from rewards.carriers import PDMS_COMPONENTS
from rewards.registry import BoundReward, RewardFunction, resolve_reward
from rlhf_drive.errors import ConfigError, RlhfDriveError

__all__ = ["Reward", "RewardSpec", "RewardTerm", "build_reward"]


@dataclass(frozen=True)
class RewardSpec:
    """One term as a recipe states it."""

    name: str
    """A registered name, `package.module:function` or `path/to/file.py:function`."""
    weight: float = 1.0
    """Share in the weighted mean, at least 0; a term of weight 0 is scored and reported only."""
    options: Mapping[str, object] = field(default_factory=dict)
    """Values of the function's keyword-only parameters."""


@dataclass(frozen=True)
class RewardTerm:
    """One term, ready to be computed."""

    name: str
    """Column of the scores that holds it."""
    weight: float
    """Share in the weighted mean."""
    function: BoundReward
    """The function with its options."""

    @property
    def is_component(self) -> bool:
        """Whether the scorer yields this column itself."""
        return self.name in PDMS_COMPONENTS


@dataclass(frozen=True)
class Reward:
    """What a policy is rewarded for: the weighted mean of terms. Made by :func:`build_reward`."""

    terms: tuple[RewardTerm, ...]
    """At least one; the weights are not all 0."""

    @property
    def user_terms(self) -> tuple[RewardTerm, ...]:
        """Terms beyond the scorer's own components."""
        return tuple(term for term in self.terms if not term.is_component)

    @property
    def names(self) -> tuple[str, ...]:
        """Columns of the scores: the scorer's components, then every user term."""
        return PDMS_COMPONENTS + tuple(term.name for term in self.user_terms)

    def total(self, columns: Mapping[str, NDArray[np.float64]]) -> NDArray[np.float64]:
        """Weighted mean of the terms.

        Args:
            columns: ``[N]`` values by column name.

        Returns:
            ``[N]``; NaN where a term is NaN, even one of weight 0.
        """
        weighted = sum(term.weight * columns[term.name] for term in self.terms)
        return np.asarray(weighted / sum(term.weight for term in self.terms), dtype=np.float64)


def build_reward(specs: Sequence[RewardSpec], *, where: str = "reward.terms") -> Reward:
    """Check all terms of a recipe and make them one reward.

    Args:
        specs: The terms, at least one. A user function that is named twice (with other options) gets a column for each,
            the later ones called `name_2`, `name_3`, ….
        where: Key path of the list, for messages.

    Raises:
        ConfigError: A name, weight or option is wrong, a user function cannot be loaded or has the name of a built-in
            component, or no weight is above 0. One error lists everything that is wrong.

    Example:
        >>> build_reward([RewardSpec("pdms", 0.9), RewardSpec("comfort", 0.1)]).names
        ('nc', 'dac', 'ep', 'ttc', 'c', 'ddc', 'pdms')
    """
    problems: list[str] = []
    terms: list[RewardTerm] = []
    for index, spec in enumerate(specs):
        place = f"{where}[{index}]"
        weight_is_number = isinstance(spec.weight, (int, float)) and not isinstance(spec.weight, bool)
        if not weight_is_number or not math.isfinite(spec.weight) or spec.weight < 0:
            problems.append(f"{place}.weight must be a number of at least 0; got {spec.weight!r}.")
        try:
            entry = resolve_reward(spec.name, where=f"{place}.name")
            function = entry.bind(spec.options, where=place)
            terms.append(RewardTerm(_column(entry, spec, terms, place), spec.weight, function))
        except RlhfDriveError as error:
            problems.append(str(error))
    if not problems and sum(spec.weight for spec in specs) <= 0:
        problems.append(f"{where} needs at least one term with a weight above 0; got {len(specs)} terms without one.")
    if problems:
        raise ConfigError("\n".join(problems))
    return Reward(tuple(terms))


def _column(entry: RewardFunction, spec: RewardSpec, earlier: Sequence[RewardTerm], place: str) -> str:
    """Column name of a term: its function's name, numbered where a user function is named again."""
    taken = {term.name for term in earlier}
    if entry.name in PDMS_COMPONENTS:
        if not _is_builtin(entry):
            raise ConfigError(
                f"{place}.name: function {spec.name!r} is called like the component {entry.name!r}. Rename it."
            )
        if entry.name in taken:
            raise ConfigError(f"{place}.name: {spec.name!r} is a term already. Give it one weight.")
        return entry.name
    candidates = (entry.name if n == 1 else f"{entry.name}_{n}" for n in range(1, len(taken) + 2))
    return next(name for name in candidates if name not in taken)


def _is_builtin(entry: RewardFunction) -> bool:
    return getattr(entry.function, "__module__", None) == rewards.builtin.__name__
