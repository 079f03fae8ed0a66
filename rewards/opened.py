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

from rewards.registry import REWARDS, BoundReward, RewardFunction, describe_options
from rlhf_drive.errors import ConfigError, PluginError

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
            reward = opened()
        except (ConfigError, PluginError) as error:
            raise ConfigError(f"{where}.{key}: reward {self.name!r}: {error}") from error
        return reward  # type: ignore[no-any-return]


def opened_reward(
    name: str, *, needs: Sequence[str] = (), two_frame: bool = False, auxiliary: bool = False
) -> Callable[[F], F]:
    """Register the decorated function, which takes options and returns a reward, as the reward `name`.

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
        REWARDS.add(name, entry)
        function.__reward__ = entry  # type: ignore[attr-defined]
        return function

    return register
