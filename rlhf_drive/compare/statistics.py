"""Paired comparison of two policies on the same scenes, with cluster-bootstrap intervals.

Every policy drives every scene, so the comparison is paired: the interval is that of the mean of per-scene differences
``d_s = a_s - b_s``, from which the difficulty of a scene cancels. Scenes of one cluster (overlapping recordings, one
generator seed) are not independent; the bootstrap therefore resamples whole clusters (Davison and Hinkley 1997,
section 3.8) and reads the interval off the percentiles of the resampled means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlhf_drive.errors import DataError

__all__ = [
    "FEW_CLUSTERS",
    "TIE",
    "Difference",
    "Interval",
    "PooledDifference",
    "mean_interval",
    "paired_difference",
    "pooled_difference",
]

TIE = 1e-6
"""Two scores (0..1) closer than this are a tie."""
FEW_CLUSTERS = 10
"""Below this many clusters a percentile interval is too narrow to call a difference."""
_MAX_DRAWS = 4_000_000
"""Cluster indices drawn at once (32 MB)."""


@dataclass(frozen=True)
class Interval:
    """A mean and its percentile-bootstrap interval."""

    mean: float
    """Mean over the scenes; NaN if there are none."""
    low: float
    """Lower bound; NaN with fewer than two clusters, where no spread can be seen."""
    high: float
    """Upper bound; NaN likewise."""
    n: int
    """Scenes with a finite value."""
    clusters: int
    """Independent clusters among them."""


@dataclass(frozen=True)
class Difference:
    """Mean of ``a - b`` over scenes scored for both."""

    mean: float
    """Mean difference, in the unit of the scores; NaN if no scene is scored for both."""
    low: float
    """Lower bound of the interval; NaN with fewer than two clusters."""
    high: float
    """Upper bound of the interval; NaN likewise."""
    win_rate: float
    """Share of scenes where a is better by more than `TIE`."""
    tie_rate: float
    """Share of scenes where the two are equal within `TIE`; losses are the rest."""
    n: int
    """Scenes with a finite score for both."""
    clusters: int
    """Independent clusters among them."""


@dataclass(frozen=True)
class PooledDifference:
    """Several training seeds of one policy against one other policy."""

    pooled: Difference
    """Seeds averaged per scene first. The interval covers the choice of scenes; training seeds vary in `seeds`."""
    seeds: tuple[Difference, ...]
    """Each seed alone, in the order given."""


def _cluster_sums(
    values: NDArray[np.float64], clusters: Sequence[str] | NDArray[np.generic]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Sum ``[U]`` of finite values and their count ``[U]`` in every cluster that holds one."""
    finite = np.isfinite(values)
    _, index = np.unique(np.asarray(clusters)[finite], return_inverse=True)
    counts = np.bincount(index).astype(np.int64)
    sums = np.bincount(index, weights=values[finite], minlength=len(counts)).astype(np.float64)
    return sums, counts


def _bootstrap_means(
    sums_U: NDArray[np.float64], counts_U: NDArray[np.int64], samples: int, seed: int
) -> NDArray[np.float64]:
    """``[samples]`` scene means over U clusters drawn with replacement: sum of their sums / sum of their counts."""
    rng = np.random.default_rng(seed)
    total, block = len(sums_U), max(1, _MAX_DRAWS // len(sums_U))
    means = np.empty(samples)
    for start in range(0, samples, block):
        draws = rng.integers(total, size=(min(block, samples - start), total))
        means[start : start + len(draws)] = sums_U[draws].sum(axis=1) / counts_U[draws].sum(axis=1)
    return means


def mean_interval(
    values: ArrayLike, clusters: Sequence[str], *, samples: int = 10_000, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Mean of per-scene values and its cluster-bootstrap interval.

    Args:
        values: ``[S]``; NaN where a scene could not be scored (left out, see ``n``).
        clusters: ``[S]`` cluster name of every scene.
        samples: Bootstrap resamples.
        confidence: Coverage aimed at, for example 0.95: percentiles 2.5 and 97.5.
        seed: Of the resampling; equal seeds give equal intervals.

    Raises:
        DataError: `values` and `clusters` differ in length.

    Example:
        >>> mean_interval([1.0, 3.0, 2.0, 2.0], ["a", "b", "c", "d"]).mean
        2.0
    """
    array = np.asarray(values, dtype=np.float64)
    if array.shape != (len(clusters),):
        raise DataError(f"{len(clusters)} scene clusters need values [{len(clusters)}]; got shape {array.shape}.")
    sums, counts = _cluster_sums(array, clusters)
    n, total = int(counts.sum()), len(sums)
    mean = float(sums.sum() / n) if n else float("nan")
    if total < 2:
        return Interval(mean, float("nan"), float("nan"), n, total)
    tail = 50.0 * (1.0 - confidence)
    low, high = np.percentile(_bootstrap_means(sums, counts, samples, seed), [tail, 100.0 - tail])
    return Interval(mean, float(low), float(high), n, total)


def paired_difference(
    a: ArrayLike,
    b: ArrayLike,
    clusters: Sequence[str],
    *,
    samples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Difference:
    """Mean per-scene difference ``a - b``, its cluster-bootstrap interval, and how often a wins.

    Args:
        a: ``[S]`` scores of the first policy, or ``[R, S]`` of R training seeds, which are averaged per scene first.
        b: ``[S]`` scores of the second policy on the same scenes.
        clusters: ``[S]`` cluster name of every scene.
        samples: Bootstrap resamples.
        confidence: Coverage aimed at.
        seed: Of the resampling.

    Raises:
        DataError: The shapes do not agree.

    Example:
        >>> paired_difference([0.9, 0.8], [0.4, 0.8], ["x", "y"]).win_rate
        0.5
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape[-1:] != second.shape or second.ndim != 1 or first.ndim not in (1, 2):
        raise DataError(f"Paired scores must be a [S] or [R, S] and b [S]; got {first.shape} and {second.shape}.")
    delta = np.atleast_2d(first).mean(axis=0) - second
    interval = mean_interval(delta, clusters, samples=samples, confidence=confidence, seed=seed)
    known = delta[np.isfinite(delta)]
    return Difference(
        mean=interval.mean,
        low=interval.low,
        high=interval.high,
        win_rate=float((known > TIE).mean()) if len(known) else float("nan"),
        tie_rate=float((np.abs(known) <= TIE).mean()) if len(known) else float("nan"),
        n=interval.n,
        clusters=interval.clusters,
    )


def pooled_difference(
    a: ArrayLike,
    b: ArrayLike,
    clusters: Sequence[str],
    *,
    samples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> PooledDifference:
    """R training seeds ``a [R, S]`` against ``b [S]``: averaged per scene and then paired, and each seed alone.

    All intervals resample the same clusters, so that seeds differ by their training and not by the draw. A scene that
    one seed failed on is left out of the pooled difference. Arguments as in :func:`paired_difference`.

    Example:
        >>> result = pooled_difference([[1.0, 1.0], [0.0, 1.0]], [0.0, 0.5], ["x", "y"])
        >>> result.pooled.mean, [seed.mean for seed in result.seeds]
        (0.5, [0.75, 0.25])
    """
    runs = np.asarray(a, dtype=np.float64)
    if runs.ndim != 2:
        raise DataError(f"Scores of several training seeds must be [R, S]; got shape {runs.shape}.")

    def difference(scores: NDArray[np.float64]) -> Difference:
        return paired_difference(scores, b, clusters, samples=samples, confidence=confidence, seed=seed)

    return PooledDifference(difference(runs), tuple(difference(run) for run in runs))
