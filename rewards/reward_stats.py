"""Counts of what a reward service has done, and of what failed."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

from rewards.carriers import Scores

__all__ = ["RewardStats", "StatsCounter", "reward_failures"]


@dataclass(frozen=True)
class RewardStats:
    """What a service has done so far. ``a + b`` is what two services have done beside each other."""

    rows: int = 0
    """Plans scored or found invalid."""
    failures: int = 0
    """Plans without a valid score."""
    failures_by_kind: Mapping[str, int] = field(default_factory=dict)
    """The same by kind (`timeout`, `raised`, …)."""
    failures_by_source: Mapping[str, int] = field(default_factory=dict)
    """The same by what failed (`scene`, `plan`, `scorer`, or the column of a gate or term)."""
    prepared: int = 0
    """Scenes prepared, that is cache misses."""
    cached_bytes: int = 0
    """Memory of the prepared scenes that are kept."""
    seconds: float = 0.0
    """Time in which at least one scoring was under way (of two services, the longer one)."""
    timeouts: int = 0
    """Calls of users' rewards that ran out of time."""
    abandoned: int = 0
    """Threads left behind because their call did not end."""
    restarts: int = 0
    """Workers started in place of one that was left behind or died."""

    @property
    def rows_per_s(self) -> float:
        """Plans per second; 0 before the first call."""
        return self.rows / self.seconds if self.seconds > 0 else 0.0

    def __add__(self, other: RewardStats) -> RewardStats:
        values: dict[str, Any] = {}
        for item in fields(self):
            mine, theirs = getattr(self, item.name), getattr(other, item.name)
            if isinstance(mine, Mapping):
                values[item.name] = dict(Counter(mine) + Counter(theirs))
            else:
                values[item.name] = max(mine, theirs) if item.name == "seconds" else mine + theirs
        return RewardStats(**values)


def reward_failures(scores: Scores) -> dict[str, int]:
    """How many rows failed where and how: count by ``source/kind``, such as ``{"judge/timeout": 3}``, sorted."""
    counts = Counter(f"{failure.source}/{failure.kind}" for failure in scores.failures.values())
    return dict(sorted(counts.items()))


class StatsCounter:
    """Adds up scorings; threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._total = RewardStats()
        self._running = 0
        self._since = 0.0
        self._seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Time that passes within counts, once however many threads are within."""
        with self._lock:
            if self._running == 0:
                self._since = time.perf_counter()
            self._running += 1
        try:
            yield
        finally:
            with self._lock:
                self._running -= 1
                if self._running == 0:
                    self._seconds += time.perf_counter() - self._since

    def add(self, scores: Scores) -> None:
        """Count the rows of `scores`."""
        kinds = Counter[str](failure.kind for failure in scores.failures.values())
        sources = Counter[str](failure.source for failure in scores.failures.values())
        with self._lock:
            self._total += RewardStats(len(scores), len(scores.failures), dict(kinds), dict(sources))

    def snapshot(self) -> RewardStats:
        """All so far; what is counted elsewhere is 0."""
        with self._lock:
            under_way = time.perf_counter() - self._since if self._running else 0.0
            return replace(self._total, seconds=self._seconds + under_way)
