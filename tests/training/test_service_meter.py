"""What services did between two looks: shares of the time that passed, counts since they were started."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

import rlhf_drive.training.service_meter as service_meter
from rewards.reward_stats import RewardStats
from rlhf_drive.training.service_meter import ServiceMeter
from rlhf_drive.training.step_collector import Services
from rollout import RolloutStats


def test_idle_shares_are_those_of_the_time_since_the_last_look(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(service_meter.time, "perf_counter", lambda: now)
    rollouts: Any = SimpleNamespace(stats=RolloutStats(workers=2, busy_s=7.0, push_s=1.0))
    rewards: Any = SimpleNamespace(stats=RewardStats(seconds=3.0, rows=30))
    meter = ServiceMeter(Services(rollouts, rewards))
    waiting: Any = SimpleNamespace(waited_s=1.0, ready=2)

    now = 104.0  # four seconds: two workers were busy for three of eight, scoring for one
    rollouts.stats = replace(rollouts.stats, busy_s=10.0, push_s=1.25, queued=5, restarts=1, retries=2)
    rewards.stats = replace(rewards.stats, seconds=4.0, timeouts=4, restarts=3)
    assert meter.metrics(waiting, asynchronous=True) == {
        "rollout/restarts": 1.0, "rollout/retries": 2.0, "time/push_s": 0.25, "service/timeouts": 4.0,
        "service/restarts": 3.0, "time/reward_rows_per_s": 7.5, "async/trainer_idle_frac": 0.25,
        "async/sampler_idle_frac": 1 - 3 / 8, "async/scorer_idle_frac": 0.75, "async/queued_chunks": 5.0,
        "async/ready_steps": 2.0,
    }  # fmt: skip

    now = 105.0  # a chunk that took three seconds is done: more than passed
    rollouts.stats = replace(rollouts.stats, busy_s=13.0)
    found = meter.metrics(waiting, asynchronous=True)
    assert (found["async/sampler_idle_frac"], found["async/scorer_idle_frac"], found["time/push_s"]) == (0.0, 1.0, 0.0)


def test_a_worker_that_is_never_idle_is_not_said_to_be_where_a_chunk_takes_several_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, idle = 0.0, list[float]()
    monkeypatch.setattr(service_meter.time, "perf_counter", lambda: now)
    rollouts: Any = SimpleNamespace(stats=RolloutStats(workers=1))
    meter = ServiceMeter(Services(rollouts, None))
    for step in range(1, 10):  # a step takes a second, a chunk three, and one follows the other
        now = float(step)
        rollouts.stats = replace(rollouts.stats, busy_s=3.0 * (step // 3))
        idle.append(meter.metrics(SimpleNamespace(waited_s=0.0, ready=0), asynchronous=True)["async/sampler_idle_frac"])  # type: ignore[arg-type]
    assert idle == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]  # nothing is known of the first chunk before its end


def test_without_overlap_only_counts_are_told() -> None:
    rollouts: Any = SimpleNamespace(stats=RolloutStats())
    found = ServiceMeter(Services(rollouts, None)).metrics(SimpleNamespace(), asynchronous=False)  # type: ignore[arg-type]
    assert sorted(found) == ["rollout/restarts", "rollout/retries", "time/push_s"]
