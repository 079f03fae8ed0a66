"""Advantages by hand, with invalid rows and groups that teach nothing."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_drive.errors import ConfigError, DataError
from rlhf_drive.objectives import ScaleRewards, group_advantages

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
