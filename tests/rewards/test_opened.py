"""Rewards that are opened with their options: when that happens, and what becomes of what they refuse."""

from __future__ import annotations

import numpy as np
import pytest

from rewards import REWARDS, RewardInputs, RewardSpec, build_reward, opened_reward
from rewards.registry import BoundReward
from rlhf_drive.errors import ConfigError, PluginError
from rlhf_drive.scenes import Trajectories


@pytest.fixture(autouse=True)
def _registered_names_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(REWARDS, "_entries", dict(REWARDS._entries))


def test_it_opens_once_when_the_reward_is_built() -> None:
    opened = []

    @opened_reward("thermometer", needs=("ep",), auxiliary=True)
    def thermometer(*, scale: float, offset: int = 1) -> BoundReward:
        opened.append((scale, offset))
        return lambda inputs: inputs.components["ep"] * scale + offset

    spec = RewardSpec("thermometer", 1.0, {"scale": 3})
    reward = build_reward([RewardSpec("pdms"), spec])
    inputs = RewardInputs([], Trajectories(np.zeros((2, 8, 3)), np.zeros(2)), {"ep": np.array([0.5, 1.0])})
    assert [reward.terms[1].function(inputs).tolist() for _ in range(2)] == [[2.5, 4.0]] * 2
    assert opened == [(3.0, 1)]
    with pytest.raises(ConfigError, match="may only accompany"):
        build_reward([spec])
    with pytest.raises(ConfigError, match=r"options.scale must be float; got 'x'"):
        build_reward([RewardSpec("pdms"), RewardSpec("thermometer", 1.0, {"scale": "x"})])
    assert len(opened) == 2


def test_what_it_refuses_is_named_with_its_place() -> None:
    @opened_reward("locked")
    def locked(*, key: str) -> BoundReward:
        if key == "brass":
            raise ConfigError(f"{key} does not fit.")
        return {"none": None}[key]  # type: ignore[return-value]

    for key, problem in (
        ("brass", ": brass does not fit."),
        ("iron", " cannot be opened: KeyError: 'iron'"),
        ("none", " opened a NoneType, not a function."),
    ):
        with pytest.raises(ConfigError) as caught:
            build_reward([RewardSpec("pdms"), RewardSpec("locked", 1.0, {"key": key})])
        assert str(caught.value) == f"reward.terms[1].options: reward 'locked'{problem}"


def test_name_is_taken_unless_it_is_the_same_function_again() -> None:
    def define(value: float) -> None:
        @opened_reward("again")
        def again() -> BoundReward:
            return lambda inputs: np.full(1, value)

    define(1.0)
    define(2.0)
    inputs = RewardInputs([], Trajectories(np.zeros((1, 8, 3)), np.zeros(1)), {})
    reward = build_reward([RewardSpec("pdms"), RewardSpec("again")])
    assert reward.terms[1].function(inputs).tolist() == [2.0]
    with pytest.raises(ConfigError, match="'pdms' is taken"):

        @opened_reward("pdms")
        def pdms() -> BoundReward: ...


def test_parameter_that_is_no_option_is_refused() -> None:
    with pytest.raises(PluginError, match="'inputs' must be keyword-only"):

        @opened_reward("wrong")
        def wrong(inputs: RewardInputs) -> BoundReward: ...
