"""Counts: what failed where and how, and how long it took."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from rewards.carriers import Failure, ScorerInfo, Scores
from rewards.reward_stats import RewardStats, StatsCounter, reward_failures


def scores_with(failures: dict[int, Failure], rows: int = 6) -> Scores:
    valid = np.array([row not in failures for row in range(rows)])
    return Scores(("pdms",), np.ones((rows, 1)), np.ones(rows), valid, ScorerInfo("pdms", "test"), failures)


MIXED = scores_with(
    {
        0: Failure("judge", "timeout", "late"),
        2: Failure("judge", "timeout", "late too"),
        3: Failure("judge", "raised", "no"),
        5: Failure("plan", "invalid_plan", "nan"),
    }
)


def test_failures_by_source_and_kind() -> None:
    assert reward_failures(MIXED) == {"judge/raised": 1, "judge/timeout": 2, "plan/invalid_plan": 1}
    assert list(reward_failures(MIXED)) == sorted(reward_failures(MIXED))
    assert reward_failures(scores_with({})) == {}


def test_counter_adds_up() -> None:
    counter = StatsCounter()
    counter.add(MIXED)
    counter.add(scores_with({1: Failure("scorer", "raised", "x")}, rows=4))
    stats = counter.snapshot()
    assert (stats.rows, stats.failures) == (10, 5)
    assert stats.failures_by_kind == {"timeout": 2, "raised": 2, "invalid_plan": 1}
    assert stats.failures_by_source == {"judge": 3, "plan": 1, "scorer": 1}


@pytest.fixture
def _eager_switching() -> Iterator[None]:
    """Threads take turns after a microsecond, so that what is not locked goes wrong."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_eager_switching")
def test_no_count_is_lost_between_threads() -> None:
    counter = StatsCounter()

    def work() -> None:
        for _ in range(200):
            counter.add(MIXED)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (counter.snapshot().rows, counter.snapshot().failures_by_kind["timeout"]) == (8 * 200 * 6, 8 * 200 * 2)


def test_time_that_scorings_share_counts_once() -> None:
    counter = StatsCounter()

    def work() -> None:
        with counter.running():
            time.sleep(0.2)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    time.sleep(0.1)  # nothing is under way
    assert 0.2 <= counter.snapshot().seconds < 0.75  # and not 0.8


def test_time_runs_on_while_another_scoring_begins_and_ends() -> None:
    counter = StatsCounter()
    with counter.running():
        time.sleep(0.1)
        with counter.running():
            time.sleep(0.01)
        time.sleep(0.1)
    assert counter.snapshot().seconds >= 0.21


def test_time_under_way_shows_and_a_failure_ends_it() -> None:
    counter = StatsCounter()

    def work() -> None:
        with counter.running():
            time.sleep(0.02)
            assert counter.snapshot().seconds >= 0.02
            raise KeyError

    with pytest.raises(KeyError):
        work()
    seconds = counter.snapshot().seconds
    time.sleep(0.02)
    assert counter.snapshot().seconds == seconds


def test_stats_of_services_beside_each_other() -> None:
    one = RewardStats(10, 2, {"raised": 2}, {"judge": 2}, 3, 100, 4.0, 1, 1, 1)
    two = RewardStats(20, 3, {"raised": 1, "timeout": 2}, {"scorer": 3}, 4, 50, 5.0, 2, 0, 1)
    assert one + two == RewardStats(
        rows=30,
        failures=5,
        failures_by_kind={"raised": 3, "timeout": 2},
        failures_by_source={"judge": 2, "scorer": 3},
        prepared=7,
        cached_bytes=150,
        seconds=5.0,
        timeouts=3,
        abandoned=1,
        restarts=2,
    )
    assert (one + two).rows_per_s == 6.0
    assert RewardStats().rows_per_s == 0.0
