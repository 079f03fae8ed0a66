from __future__ import annotations

import math

import numpy as np
import pytest

from rlhf_drive.compare.statistics import mean_interval, paired_difference, pooled_difference
from rlhf_drive.errors import DataError


def own_clusters(count: int) -> list[str]:
    return [f"c{i}" for i in range(count)]


def test_the_interval_matches_the_normal_one_for_many_scenes() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.normal(0.7, 0.2, 2000), rng.normal(0.6, 0.2, 2000)
    result = paired_difference(a, b, own_clusters(2000), samples=4000, seed=1)
    # The mean of n independent differences has standard error sd / sqrt(n); 95 % lies within 1.96 of them.
    half = 1.96 * (a - b).std() / math.sqrt(2000)
    assert result.mean == pytest.approx((a - b).mean(), abs=1e-12)
    assert result.low == pytest.approx(result.mean - half, abs=0.05 * half)
    assert result.high == pytest.approx(result.mean + half, abs=0.05 * half)


def test_confidence_sets_the_width() -> None:
    values = np.random.default_rng(0).normal(size=2000)
    wide = mean_interval(values, own_clusters(2000), samples=4000, confidence=0.95)
    narrow = mean_interval(values, own_clusters(2000), samples=4000, confidence=0.68)
    # Normal quantiles: 1.960 for 95 %, 0.994 for 68 %.
    assert (wide.high - wide.low) / (narrow.high - narrow.low) == pytest.approx(1.960 / 0.994, rel=0.05)


def test_coverage_is_near_nominal() -> None:
    rng = np.random.default_rng(11)
    hits = 0
    for trial in range(300):
        difference = rng.normal(0.05, 0.3, 60)
        result = paired_difference(difference, np.zeros(60), own_clusters(60), samples=800, confidence=0.9, seed=trial)
        hits += result.low <= 0.05 <= result.high
    # 300 trials of probability 0.9 give 270 with a standard deviation of 5.2; the percentile interval of 60 is a little
    # narrow (by sqrt(59/60) and the missing t quantile: about 0.89).
    assert 249 <= hits <= 286


def test_pairing_narrows_the_interval() -> None:
    rng = np.random.default_rng(5)
    difficulty = rng.uniform(0.2, 1.0, 300)
    a, b = difficulty + rng.normal(0, 0.02, 300), difficulty + rng.normal(0, 0.02, 300)
    paired = paired_difference(a, b, own_clusters(300), samples=2000)
    shuffled = paired_difference(a, rng.permutation(b), own_clusters(300), samples=2000)
    # Paired: sd = 0.02 sqrt(2) = 0.028. Unpaired: difficulty adds sqrt(2 / 12) 0.8 = 0.327. Ratio about 11.6.
    assert 8 < (shuffled.high - shuffled.low) / (paired.high - paired.low) < 16


def test_clusters_that_agree_widen_the_interval() -> None:
    rng = np.random.default_rng(7)
    difference = np.repeat(rng.normal(0, 1, 40), 10)
    together = [f"c{i // 10}" for i in range(400)]
    clustered = mean_interval(difference, together, samples=3000)
    independent = mean_interval(difference, own_clusters(400), samples=3000)
    # Ten equal values per cluster carry the information of one: the standard error grows by sqrt(10).
    ratio = (clustered.high - clustered.low) / (independent.high - independent.low)
    assert ratio == pytest.approx(math.sqrt(10), rel=0.12)
    assert (clustered.n, clustered.clusters) == (400, 40)


def test_clusters_of_unequal_size_count_by_their_scenes() -> None:
    # Cluster x has three scenes of 1, cluster y one of 5. Resamples: xx -> 1, yy -> 5, xy -> (3 + 5) / 4 = 2.
    result = mean_interval([1, 1, 1, 5], ["x", "x", "x", "y"], samples=4000, confidence=0.4)
    assert result.mean == 2.0
    # 30 % and 70 % quantiles of {1: 1/4, 2: 1/2, 5: 1/4} are both 2.
    assert (result.low, result.high) == (2.0, 2.0)
    assert mean_interval([1, 1, 1, 5], ["x", "x", "x", "y"], samples=4000, confidence=0.9).high == 5.0


def test_equal_seeds_give_equal_intervals() -> None:
    values = np.random.default_rng(2).normal(size=50)
    first, again, other = (mean_interval(values, own_clusters(50), samples=500, seed=s) for s in (4, 4, 5))
    assert first == again
    assert (first.low, first.high) != (other.low, other.high)
    assert first.mean == other.mean


def test_the_interval_does_not_depend_on_the_order_of_scenes() -> None:
    rng = np.random.default_rng(8)
    values, names = rng.normal(size=60), own_clusters(60)
    order = rng.permutation(60)
    shuffled = mean_interval(values[order], [names[i] for i in order], samples=500)
    assert shuffled.low == pytest.approx(mean_interval(values, names, samples=500).low, abs=1e-12)


def test_wins_and_ties_are_counted_with_a_tolerance() -> None:
    result = paired_difference([0.5, 0.9, 0.2, 0.7 + 1e-9], [0.5, 0.1, 0.8, 0.7], own_clusters(4), samples=50)
    assert (result.win_rate, result.tie_rate) == (0.25, 0.5)


def test_a_scene_that_one_policy_failed_on_is_left_out() -> None:
    result = paired_difference([1.0, np.nan, 0.5], [0.0, 0.0, 0.5], own_clusters(3), samples=50)
    assert (result.mean, result.win_rate, result.n, result.clusters) == (0.5, 0.5, 2, 2)


def test_one_cluster_gives_a_mean_but_no_interval() -> None:
    result = paired_difference([1.0, 0.0], [0.0, 0.0], ["x", "x"])
    assert result.mean == 0.5
    assert math.isnan(result.low)
    assert math.isnan(result.high)


def test_no_scene_gives_nan_and_no_error() -> None:
    result = paired_difference([np.nan], [0.0], ["x"])
    assert result.n == 0
    assert math.isnan(result.mean)
    assert math.isnan(result.win_rate)


def test_seeds_are_averaged_per_scene_before_pairing() -> None:
    runs = np.array([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    result = pooled_difference(runs, [0.25, 1.0, 0.25], own_clusters(3), samples=200)
    # Averages 0.5, 1, 0 against 0.25, 1, 0.25: differences 0.25, 0, -0.25.
    assert result.pooled.mean == pytest.approx(0.0, abs=1e-15)
    assert (result.pooled.win_rate, result.pooled.tie_rate) == (pytest.approx(1 / 3), pytest.approx(1 / 3))
    assert [seed.mean for seed in result.seeds] == pytest.approx([1 / 6, -1 / 6])


def test_many_resamples_in_blocks_equal_one_interval() -> None:
    values = np.random.default_rng(9).normal(size=3000)
    # 3000 clusters x 3000 resamples are drawn in three blocks.
    result = mean_interval(values, own_clusters(3000), samples=3000)
    half = 1.96 * values.std() / math.sqrt(3000)
    assert result.high - result.low == pytest.approx(2 * half, rel=0.06)


@pytest.mark.parametrize(("a", "b"), [([1.0, 2.0], [1.0]), ([[[1.0]]], [1.0]), (1.0, [1.0])])
def test_shapes_that_do_not_pair_are_refused(a: object, b: object) -> None:
    with pytest.raises(DataError, match="Paired scores must be"):
        paired_difference(a, b, ["x"])


def test_a_missing_cluster_is_refused() -> None:
    with pytest.raises(DataError, match="1 scene clusters"):
        mean_interval([1.0, 2.0], ["x"])
