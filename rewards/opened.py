"""Rewards that are opened once, with their options, and then called: they check a URL, load a function, keep a cache.

An opened reward is a function of its options that returns the reward itself::

    @opened_reward("remote")
    def remote(*, url: str, timeout_s: float = 5.0) -> BoundReward:
        client = ...  # a bad URL is refused here, when the recipe is read
        def score(inputs: RewardInputs) -> NDArray[np.float64]: ...
        return score
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from rewards.registry import REWARDS, BoundReward, RewardFunction, _same_definition, describe_options
from rlhf_drive.errors import ConfigError, RlhfDriveError

__all__ = ["OpenedReward", "opened_reward"]

F = TypeVar("F", bound=Callable[..., BoundReward])


@dataclass(frozen=True)
class OpenedReward(RewardFunction):
    """A reward whose `function` takes the options alone and returns the reward."""

    def bind(
        self, options: Mapping[str, object], *, where: str = "reward", key: str = "options", kind: str = "reward"
    ) -> Callable[..., Any]:
        """The reward, opened with `options`; see :meth:`rewards.registry.RewardFunction.bind`.

        Raises:
            ConfigError: An option is wrong, or the reward cannot be opened with them.
        """
        opened = super().bind(options, where=where, key=key, kind=kind)
        try:
            reward: object = opened()
        except RlhfDriveError as error:
            raise ConfigError(f"{where}.{key}: reward {self.name!r}: {error}") from error
        except Exception as error:  # a plug-in's own code
            problem = f"cannot be opened: {type(error).__name__}: {error}"
            raise ConfigError(f"{where}.{key}: reward {self.name!r} {problem}") from error
        if not callable(reward):
            raise ConfigError(f"{where}.{key}: reward {self.name!r} opened a {type(reward).__name__}, not a function.")
        return reward


def opened_reward(
    name: str, *, needs: Sequence[str] = (), two_frame: bool = False, auxiliary: bool = False
) -> Callable[[F], F]:
    """Register the decorated function, which takes options and returns a reward, as the reward `name`.

    The scores' column is called `name` too, or what the returned reward has as its attribute `column`. Defining the
    function again replaces it.

    Args:
        name: What recipes write.
        needs: As in :func:`rewards.registry.reward`.
        two_frame: Likewise.
        auxiliary: Likewise.

    Raises:
        ConfigError: Another function has that name.
        PluginError: A parameter is not a keyword-only option.
    """

    def register(function: F) -> F:
        options = describe_options(f"Reward {name!r}", function, skip=0)
        entry = OpenedReward(name, cast(Any, function), options, tuple(needs), two_frame, auxiliary)
        known = REWARDS.get(name) if name in REWARDS else None
        REWARDS.add(name, entry, replace=known is not None and _same_definition(known.function, function))
        function.__reward__ = entry  # type: ignore[attr-defined]
        return function

    return register
