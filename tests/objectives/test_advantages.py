"""Advantages by hand, with invalid rows and groups that teach nothing."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_drive.errors import ConfigError, DataError, PluginError
from rlhf_drive.objectives import (
    AdvantageInputs,
    Advantages,
    AdvantageSettings,
    ScaleRewards,
    group_advantages,
    make_advantages,
)

NAN = float("nan")
REWARDS = torch.tensor([1.0, 0.0, 0.5, NAN, 0.3, 0.3, 0.3, 0.3, NAN, 0.9, NAN, NAN], dtype=torch.float64)
VALID = REWARDS.isfinite()


@pytest.mark.parametrize(
    ("scale_rewards", "first_group"),
    [
        # Mean 0.5 of the three valid rows; unbiased std of (1, 0, .5) is 0.5.
        ("none", [0.5, -0.5, 0.0, 0.0]),
        ("group", [0.5 / 0.5001, -0.5 / 0.5001, 0.0, 0.0]),
        # Valid rewards 1, 0, .5, .3 x4, .9 have mean .45; squared deviations .3025 + .2025 + .0025 + 4 * .0225 + .2025
        # add up to .8, over 8 - 1.
        ("batch", [0.5 / (math.sqrt(0.8 / 7) + 1e-4), -0.5 / (math.sqrt(0.8 / 7) + 1e-4), 0.0, 0.0]),
    ],
)
def test_by_hand(scale_rewards: ScaleRewards, first_group: list[float]) -> None:
    out = group_advantages(REWARDS, VALID, 4, scale_rewards=scale_rewards, tolerance=0.0)
    # Second group: no spread. Third: one valid row, nothing to compare it with.
    expected = torch.tensor(first_group + [0.0] * 8, dtype=torch.float64)
    torch.testing.assert_close(out.values, expected, rtol=0, atol=1e-12)
    assert out.degenerate.tolist() == [False, True, True]
    assert out.spread.tolist() == [1.0, 0.0, 0.0]


def test_an_invalid_row_changes_nothing_for_the_others() -> None:
    kept = group_advantages(REWARDS[:3], VALID[:3], 3, scale_rewards="group", tolerance=0.0).values
    with_invalid = group_advantages(REWARDS[:4], VALID[:4], 4, scale_rewards="group", tolerance=0.0).values
    torch.testing.assert_close(with_invalid[:3], kept, rtol=0, atol=0)
    # Even a finite number in an invalid row is not looked at.
    noisy = REWARDS[:4].nan_to_num(nan=100.0)
    other = group_advantages(noisy, VALID[:4], 4, scale_rewards="group", tolerance=0.0)
    torch.testing.assert_close(other.values, with_invalid, rtol=0, atol=0)
    assert other.spread.item() == 1.0


def test_spread_of_penalties_is_over_valid_rows_only() -> None:
    rewards = torch.tensor([-1.0, -0.5, NAN])
    out = group_advantages(rewards, rewards.isfinite(), 3, scale_rewards="none", tolerance=0.0)
    assert out.spread.tolist() == [0.5]
    assert out.values.tolist() == [-0.25, 0.25, 0.0]


@pytest.mark.parametrize(("tolerance", "degenerate"), [(0.0, False), (0.049, False), (0.051, True)])
def test_spread_tolerance(tolerance: float, degenerate: bool) -> None:
    rewards = torch.tensor([0.90, 0.92, 0.95])
    out = group_advantages(rewards, rewards > 0, 3, scale_rewards="group", tolerance=tolerance)
    assert out.degenerate.tolist() == [degenerate]
    assert (out.values.abs().max().item() == 0.0) == degenerate


def test_equal_rewards_are_degenerate_in_spite_of_rounding() -> None:
    rewards = torch.full((3,), 0.1)
    out = group_advantages(rewards, rewards > 0, 3, scale_rewards="group", tolerance=0.0)
    assert out.degenerate.tolist() == [True]
    assert out.values.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("valid_rows", [0, 1])
def test_too_few_valid_rows_in_the_whole_batch(valid_rows: int) -> None:
    rewards = torch.tensor([0.7] * valid_rows + [NAN] * (4 - valid_rows))
    out = group_advantages(rewards, rewards > 0, 2, scale_rewards="batch", tolerance=0.0)
    assert out.values.tolist() == [0.0] * 4
    assert out.degenerate.tolist() == [True, True]
    assert out.spread.tolist() == [0.0, 0.0]


def test_wrong_settings_and_data_are_named() -> None:
    ok = torch.ones(4)
    with pytest.raises(ConfigError, match=r"rl\.scale_rewards = 'groups'.*'group'"):
        group_advantages(ok, ok > 0, 2, scale_rewards="groups", tolerance=0.0)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="num_generations = 1"):
        group_advantages(ok, ok > 0, 1, scale_rewards="none", tolerance=0.0)
    with pytest.raises(ConfigError, match="spread_tolerance = nan"):
        group_advantages(ok, ok > 0, 2, scale_rewards="none", tolerance=NAN)
    with pytest.raises(DataError, match=r"\[S \* 3\]"):
        group_advantages(ok, ok > 0, 3, scale_rewards="none", tolerance=0.0)
    with pytest.raises(DataError, match=r"Rows \[3\] are marked valid"):
        group_advantages(REWARDS[:4], torch.ones(4, dtype=torch.bool), 4, scale_rewards="none", tolerance=0.0)


def _advantages(rewards: torch.Tensor, valid: torch.Tensor, size: int, **settings: Any) -> Advantages:
    return make_advantages(AdvantageSettings(**settings))(AdvantageInputs(rewards, valid, size))


def test_leave_one_out_by_hand() -> None:
    # Row 0: 1 - (0 + .5) / 2; row 1: 0 - (1 + .5) / 2; row 2: .5 - (1 + 0) / 2. The invalid row is in no mean.
    out = _advantages(REWARDS, VALID, 4, advantages="rloo")
    expected = torch.tensor([0.75, -0.75, 0.0, 0.0] + [0.0] * 8, dtype=torch.float64)
    torch.testing.assert_close(out.values, expected, rtol=0, atol=1e-12)
    # Three valid rows: n / (n - 1) times the plain one, whatever the scale.
    for scale in ("none", "group"):
        plain = _advantages(REWARDS, VALID, 4, scale_rewards=scale).values
        found = _advantages(REWARDS, VALID, 4, scale_rewards=scale, advantages="rloo").values
        torch.testing.assert_close(found, plain * 1.5, rtol=0, atol=1e-12)


@pytest.mark.parametrize("advantages", ["group_mean", "rloo", "gdpo"])
def test_reward_scale_is_a_factor(advantages: str) -> None:
    estimators = [make_advantages(AdvantageSettings(advantages, reward_scale=scale)) for scale in (1.0, 3.0)]
    inputs = AdvantageInputs(REWARDS, VALID, 4, REWARDS[:, None])
    one, three = (estimator(inputs).values for estimator in estimators)
    torch.testing.assert_close(three, 3 * one, rtol=0, atol=1e-12)
    assert one.abs().max() > 0.4


def test_decoupled_terms_by_hand() -> None:
    """Two groups of two, two terms. Unbiased std of a pair is |difference| / sqrt(2), so each term gives +-1/sqrt(2).

    z: group 0: w1 - w2 signs (+, -) and (-, +) cancel at equal weights; with weights 1 and 3 they leave -2/sqrt(2).
    Group 1: both terms agree: 4/sqrt(2).
    """
    terms = torch.tensor([[1.0, 0.0], [0.0, 100.0], [0.2, 7.0], [0.1, 5.0]], dtype=torch.float64)
    rewards, valid = terms.sum(1), torch.ones(4, dtype=torch.bool)
    weights = torch.tensor([1.0, 3.0], dtype=torch.float64)
    out = make_advantages(AdvantageSettings("gdpo"))(AdvantageInputs(rewards, valid, 2, terms, weights))

    def half(difference: float) -> float:
        return difference / 2 / (difference / math.sqrt(2) + 1e-4)

    z = torch.tensor([half(1.0) - 3 * half(100.0), 0.0, half(0.1) + 3 * half(2.0), 0.0], dtype=torch.float64)
    z[1], z[3] = -z[0], -z[2]
    torch.testing.assert_close(out.values, z / (z.std() + 1e-4), rtol=0, atol=1e-12)
    # A group mean of the sum would have seen the second term only in group 0, and called its first row the worse one.
    assert out.values[0] < 0 < out.values[2]
    equal = make_advantages(AdvantageSettings("gdpo"))(AdvantageInputs(rewards, valid, 2, terms))
    assert abs(equal.values[0].item()) < 1e-3


def test_decoupled_groups_are_degenerate_by_term() -> None:
    terms = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.4, 0.4], [0.4, 0.4]], dtype=torch.float64)
    inputs = AdvantageInputs(terms.sum(1), torch.ones(4, dtype=torch.bool), 2, terms)
    for one in (0, 1):  # a single term that differs is enough, whichever it is
        single = torch.full((2, 2), 0.5, dtype=torch.float64)
        single[0, one] = 1.0
        found = make_advantages(AdvantageSettings("gdpo"))(AdvantageInputs(single.sum(1), torch.ones(2) > 0, 2, single))
        assert found.degenerate.tolist() == [False]
    # Both groups have equal totals; the first one's terms differ.
    assert make_advantages(AdvantageSettings("gdpo"))(inputs).degenerate.tolist() == [False, True]
    assert make_advantages(AdvantageSettings())(inputs).degenerate.tolist() == [True, True]
    assert make_advantages(AdvantageSettings("gdpo", spread_tolerance=1.0))(inputs).degenerate.tolist() == [True, True]
    with pytest.raises(ConfigError, match="no terms were given"):
        make_advantages(AdvantageSettings("gdpo"))(replace(inputs, terms=None))


def test_invalid_rows_have_no_decoupled_advantage_at_all() -> None:
    """Not even what rounding leaves of the batch's mean."""
    terms = torch.rand(12, 3, generator=torch.Generator().manual_seed(0)) * 7
    valid = torch.tensor([True, True, True, False] * 3)
    values = make_advantages(AdvantageSettings("gdpo"))(AdvantageInputs(terms.sum(1), valid, 4, terms)).values
    assert values[valid].mean().item() != 0.0
    assert values[~valid].tolist() == [0.0] * 3


def test_statistics_of_the_groups() -> None:
    # Groups: (1, 0, .5), flat .3, one valid row .9, all best, all worst, none valid.
    rewards = torch.tensor([1.0, 0.0, 0.5, 0.3, 0.3, 0.3, NAN, 0.9, NAN, 1.0, 1.0, 1.0, 0.0, NAN, 0.0, NAN, NAN, NAN])
    out = _advantages(rewards, rewards.isfinite(), 3)
    assert out.best.nan_to_num(nan=-1.0).tolist() == pytest.approx([1.0, 0.3, 0.9, 1.0, 0.0, -1.0])
    assert out.worst.nan_to_num(nan=-1.0).tolist() == pytest.approx([0.0, 0.3, 0.9, 1.0, 0.0, -1.0])
    assert out.metrics() == pytest.approx(
        {
            "groups/degenerate_frac": 5 / 6,
            "groups/spread": 1 / 6,
            "groups/all_best_frac": 1 / 6,
            "groups/all_worst_frac": 1 / 6,
        }
    )
    nothing = torch.full((4,), NAN)
    assert _advantages(nothing, nothing.isfinite(), 2).metrics()["groups/degenerate_frac"] == 1.0


def test_a_function_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "import torch\n"
        "def above_half(inputs):\n"
        "    return inputs.rewards - 0.5\n"
        "def short(inputs):\n"
        "    return inputs.rewards[:2]\n"
        "def broken(inputs):\n"
        "    return inputs.rewards / 0\n"
        "def greedy(inputs, settings):\n"
        "    return inputs.rewards\n"
    )
    out = _advantages(REWARDS, VALID, 4, advantages=f"{file}:above_half", reward_scale=2.0)
    expected = torch.where(VALID, 2 * (REWARDS - 0.5), 0.0)
    torch.testing.assert_close(out.values, expected, rtol=0, atol=1e-12)
    # Not relative to the group: the flat group teaches, and so does the lone valid row.
    assert out.degenerate.tolist() == [False, False, False]
    half = torch.full((4,), 0.5)
    assert _advantages(half, half > 0, 2, advantages=f"{file}:above_half").degenerate.tolist() == [True, True]
    with pytest.raises(PluginError, match=r"shape \[N\]; got \[2\]"):
        _advantages(REWARDS, VALID, 4, advantages=f"{file}:short")
    with pytest.raises(PluginError, match=r"valid rows \[0, 1, 2, 4, 5\]"):
        _advantages(REWARDS, VALID, 4, advantages=f"{file}:broken")
    with pytest.raises(ConfigError, match=r"rl\.advantages.*called with \(inputs\)"):
        make_advantages(AdvantageSettings(f"{file}:greedy"))


def test_wrong_settings_are_listed_together() -> None:
    with pytest.raises(ConfigError) as caught:
        make_advantages(AdvantageSettings("rlo", "groups", 0.0, -1.0))
    named = [line.split()[0] for line in str(caught.value).splitlines()]
    assert named == ["rl.advantages", "rl.scale_rewards", "rl.spread_tolerance", "rl.reward_scale"]
    with pytest.raises(DataError, match=r"terms \[N, C\]; got \[12\]"):
        AdvantageInputs(REWARDS, VALID, 4, REWARDS)
    with pytest.raises(DataError, match=r"term_weights \[2\] do not fit"):
        AdvantageInputs(REWARDS, VALID, 4, REWARDS[:, None], torch.ones(2))
