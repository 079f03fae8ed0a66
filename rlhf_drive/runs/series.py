"""Metrics as series: by phase, over steps, smoothed, averaged over seeds, and as a line of characters."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf_drive.errors import DataError

__all__ = ["Series", "find_metrics", "kind_of", "mean_over_seeds", "metric_names", "series_of", "smoothed", "sparkline"]

Array = NDArray[np.float64]

BLOCKS = "▁▂▃▄▅▆▇█"
PLAIN_BLOCKS = "_.-~=+*#"
"""For a terminal or file that knows ASCII only."""


@dataclass(frozen=True)
class Series:
    """One metric of one phase."""

    steps: NDArray[np.int64]
    """``[n]`` rising."""
    values: Array
    """``[n]``; NaN where the metric was not finite."""


def kind_of(phase: str) -> str:
    """`rl` for the phase of any seed, else the phase.

    Example:
        >>> kind_of("rl-seed12")
        'rl'
    """
    return re.sub(r"-seed\d+$", "", phase)


def series_of(lines: Iterable[Mapping[str, Any]], metric: str) -> dict[str, Series]:
    """The metric by phase, in the order the phases began; steps that lack it are left out, null is NaN."""
    found: dict[str, dict[int, float]] = {}
    for line in lines:
        if metric in line:
            value = line[metric]
            found.setdefault(line["phase"], {})[line["step"]] = math.nan if value is None else float(value)
    return {phase: _series(values) for phase, values in found.items()}


def _series(values: Mapping[int, float]) -> Series:
    steps = sorted(values)
    return Series(np.array(steps, dtype=np.int64), np.array([values[step] for step in steps], dtype=np.float64))


def metric_names(lines: Iterable[Mapping[str, Any]]) -> list[str]:
    """Every metric of the lines, sorted."""
    return sorted({name for line in lines for name in line} - {"phase", "step"})


def find_metrics(wanted: Sequence[str], known: Iterable[str]) -> list[str]:
    """The metrics that are asked for; an area such as ``reward/`` or ``reward/*`` stands for all of its metrics.

    Raises:
        DataError: There is none of that name; near ones are offered.

    Example:
        >>> find_metrics(["kl/", "reward/total"], ["reward/total", "kl/ref_k1", "kl/ref_k3"])
        ['kl/ref_k1', 'kl/ref_k3', 'reward/total']
    """
    names, found = sorted(known), []
    for name in wanted:
        area = name.removesuffix("*")
        matches = [name] if name in names else [n for n in names if area.endswith("/") and n.startswith(area)]
        if not matches:
            close = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or [
                n for n in names if name.strip("*/").rpartition("/")[2] in n
            ]
            areas = ", ".join(sorted({n.partition("/")[0] for n in names}))
            hint = f"Did you mean {' or '.join(close[:3])}? " if close else ""
            raise DataError(f"There is no metric {name!r} in these runs. {hint}Areas: {areas}.")
        found += [match for match in matches if match not in found]
    return found


def smoothed(values: Array, window: int) -> Array:
    """Mean of the latest `window` values that are numbers, at each place; NaN where there is none.

    Example:
        >>> smoothed(np.array([1.0, 3.0, np.nan, 5.0]), 2).tolist()
        [1.0, 2.0, 3.0, 5.0]
    """
    there = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(there, values, 0.0))])
    count = np.concatenate([[0], np.cumsum(there)])
    end = np.arange(1, len(values) + 1)
    start = np.maximum(0, end - window)
    number = count[end] - count[start]
    return np.where(number > 0, (total[end] - total[start]) / np.maximum(number, 1), np.nan)


def mean_over_seeds(seeds: Sequence[Series]) -> Series:
    """Mean at the steps that all seeds have, of the values that are numbers."""
    steps = seeds[0].steps
    for other in seeds[1:]:
        steps = np.intersect1d(steps, other.steps)
    rows = np.array([seed.values[np.searchsorted(seed.steps, steps)] for seed in seeds]).reshape(len(seeds), -1)
    there = np.isfinite(rows)
    number = there.sum(axis=0)
    total = np.where(there, rows, 0.0).sum(axis=0)
    return Series(steps, np.where(number > 0, total / np.maximum(number, 1), np.nan))


def sparkline(values: Array, width: int = 24, *, blocks: str = BLOCKS) -> str:
    """The course of a series as at most `width` characters, each the mean of its share; a gap where there is no number.

    Example:
        >>> sparkline(np.array([0.0, 1.0, 2.0, 3.0]), blocks="0123")
        '0123'
    """
    if not len(values) or not np.isfinite(values).any():
        return ""
    parts = np.array_split(values, min(width, len(values)))
    means = np.array([part[np.isfinite(part)].mean() if np.isfinite(part).any() else np.nan for part in parts])
    low, high = float(np.nanmin(means)), float(np.nanmax(means))
    if high <= low:
        return "".join(" " if np.isnan(mean) else blocks[len(blocks) // 2] for mean in means)
    places = (means - low) / (high - low) * (len(blocks) - 1)
    return "".join(" " if np.isnan(place) else blocks[round(float(place))] for place in places)
