"""Weighted terms: the mean, the columns, and everything that can be wrong in a recipe's list."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rewards import PDMS_COMPONENTS, RewardSpec, build_reward
from rlhf_drive.errors import ConfigError

SOURCE = """
import numpy as np

def gentle(inputs, *, limit: float = 2.0):
    return np.full(len(inputs.trajectories), limit)

def ep(inputs):
    return np.zeros(len(inputs.trajectories))
"""


@pytest.fixture
def user_file(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(SOURCE)
    return str(tmp_path / "mine.py")


def test_total_is_the_weighted_mean() -> None:
    reward = build_reward([RewardSpec("pdms", 3.0), RewardSpec("comfort", 1)])
    total = reward.total({"pdms": np.array([0.8, 0.0]), "c": np.array([0.0, 1.0])})
    assert total.tolist() == pytest.approx([0.6, 0.25], abs=1e-15)  # (3*0.8 + 0)/4, (0 + 1)/4


def test_scaling_all_weights_changes_nothing() -> None:
    columns = {"pdms": np.array([0.3, 0.9]), "ep": np.array([0.7, 0.1])}
    small, large = (build_reward([RewardSpec("pdms", w), RewardSpec("ep", 2 * w)]).total(columns) for w in (0.25, 64.0))
    np.testing.assert_array_equal(small, large)  # powers of two: exact


def test_one_term_is_returned_to_the_bit() -> None:
    values = np.random.default_rng(0).random(100)
    np.testing.assert_array_equal(build_reward([RewardSpec("pdms")]).total({"pdms": values}), values)


def test_term_of_weight_zero_is_reported_only(user_file: str) -> None:
    reward = build_reward([RewardSpec("pdms", 1.0), RewardSpec(f"{user_file}:gentle", 0.0)])
    assert reward.names == (*PDMS_COMPONENTS, "gentle")
    assert reward.total({"pdms": np.array([0.5]), "gentle": np.array([9.0])}).tolist() == [0.5]


def test_columns_are_the_components_then_user_terms_in_order(user_file: str) -> None:
    specs = [RewardSpec(f"{user_file}:gentle", 1.0, {"limit": v}) for v in (1.0, 5.0, 7.0)]
    reward = build_reward([specs[0], RewardSpec("ego_progress"), *specs[1:]])
    assert reward.names == (*PDMS_COMPONENTS, "gentle", "gentle_2", "gentle_3")
    assert [term.name for term in reward.terms] == ["gentle", "ep", "gentle_2", "gentle_3"]


def test_everything_wrong_is_listed_in_one_error(user_file: str) -> None:
    specs = [
        RewardSpec("pdsm"),
        RewardSpec("pdms", -1.0),
        RewardSpec(f"{user_file}:gentle", 1.0, {"limt": 2.0}),
        RewardSpec(f"{user_file}:missing"),
        RewardSpec("comfort", float("inf"), {"limit": 2.0}),
    ]
    with pytest.raises(ConfigError) as caught:
        build_reward(specs)
    lines = str(caught.value).splitlines()
    assert len(lines) == 6
    assert lines[0].startswith("Unknown reward 'pdsm' in reward.terms[0].name. Did you mean 'pdms'?")
    assert lines[1] == "reward.terms[1].weight must be a number of at least 0; got -1.0."
    assert lines[2].startswith("reward.terms[2].options: reward 'gentle' has no option 'limt'. Did you mean 'limit'?")
    assert "has no function 'missing' (from reward.terms[3].name)" in lines[3]
    assert lines[4] == "reward.terms[4].weight must be a number of at least 0; got inf."
    assert lines[5].startswith("reward.terms[4].options: reward 'c' has no option 'limit'")


@pytest.mark.parametrize("weight", [True, "1", None, float("nan")])
def test_weight_that_is_no_number(weight: object) -> None:
    with pytest.raises(ConfigError, match=r"terms\[0\]\.weight must be a number"):
        build_reward([RewardSpec("pdms", weight)])  # type: ignore[arg-type]


@pytest.mark.parametrize("specs", [[], [RewardSpec("pdms", 0.0), RewardSpec("ep", 0)]])
def test_some_weight_must_be_above_zero(specs: list[RewardSpec]) -> None:
    with pytest.raises(ConfigError, match="at least one term with a weight above 0"):
        build_reward(specs)


def test_component_is_a_term_once() -> None:
    with pytest.raises(ConfigError, match=r"terms\[1\]\.name: 'comfort' is among the terms already"):
        build_reward([RewardSpec("c"), RewardSpec("comfort")])


def test_user_function_called_like_a_component_is_refused(user_file: str) -> None:
    with pytest.raises(ConfigError, match="called like the component 'ep'"):
        build_reward([RewardSpec(f"{user_file}:ep")])
