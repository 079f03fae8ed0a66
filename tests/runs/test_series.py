"""Series are what the lines hold; means and smoothing are those of loops."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rlhf_drive.errors import DataError
from rlhf_drive.runs.series import Series, find_metrics, mean_over_seeds, series_of, smoothed, sparkline


def test_series_by_phase_leave_out_what_is_absent_and_keep_null_as_nan() -> None:
    lines = [
        {"phase": "sft", "step": 1, "a/x": 1.0},
        {"phase": "rl-seed0", "step": 1, "a/x": 2.0},
        {"phase": "rl-seed0", "step": 2, "a/y": 5.0},
        {"phase": "rl-seed0", "step": 3, "a/x": None},
    ]
    found = series_of(lines, "a/x")
    assert list(found) == ["sft", "rl-seed0"]
    assert found["rl-seed0"].steps.tolist() == [1, 3]
    assert found["rl-seed0"].values[0] == 2.0
    assert math.isnan(found["rl-seed0"].values[1])


@pytest.mark.parametrize("window", [1, 2, 5, 100])
def test_smoothing_equals_a_loop(window: int) -> None:
    values = np.random.default_rng(3).normal(size=40)
    values[[0, 7, 8, 9]] = np.nan
    for i, found in enumerate(smoothed(values, window)):
        part = values[max(0, i - window + 1) : i + 1]
        part = part[np.isfinite(part)]
        if len(part):
            assert found == pytest.approx(part.mean(), abs=1e-12)
        else:
            assert math.isnan(found)


def test_the_mean_over_seeds_is_taken_where_all_of_them_are() -> None:
    first = Series(np.array([1, 2, 3, 5]), np.array([1.0, 2.0, np.nan, 4.0]))
    second = Series(np.array([2, 3, 5, 6]), np.array([4.0, 7.0, 8.0, 9.0]))
    mean = mean_over_seeds([first, second])
    assert mean.steps.tolist() == [2, 3, 5]
    assert mean.values.tolist() == [3.0, 7.0, 6.0]


def test_a_course_is_drawn_from_low_to_high_with_gaps() -> None:
    assert sparkline(np.array([0.0, 7.0, np.nan, 3.0]), blocks="01234567") == "07 3"
    assert sparkline(np.array([1.0, 3.0, 5.0, 7.0, 0.0, 2.0]), 3, blocks="0123456") == "160"  # means 2, 6, 1
    assert sparkline(np.array([2.0, 2.0]), blocks="012") == "11"
    assert sparkline(np.array([np.nan])) == ""


def test_a_metric_that_is_not_there_is_refused_with_near_names() -> None:
    known = ["reward/total", "reward/nc", "kl/ref_k3"]
    assert find_metrics(["reward/*", "kl/ref_k3", "reward/nc"], known) == ["reward/nc", "reward/total", "kl/ref_k3"]
    with pytest.raises(DataError, match=r"no metric 'reward/totl' .*Did you mean reward/total.*Areas: kl, reward\."):
        find_metrics(["reward/totl"], known)
    with pytest.raises(DataError, match=r"no metric 'total' .*Did you mean reward/total"):
        find_metrics(["total"], known)
    with pytest.raises(DataError, match=r"no metric 'rewards/'"):
        find_metrics(["rewards/"], known)
