"""How busy sampling, scoring and training keep each other, from step to step."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rlhf_drive.training.lookahead import Lookahead
from rlhf_drive.training.step_collector import Services

__all__ = ["ServiceMeter", "staleness_metrics"]


def staleness_metrics(step: int, versions: Sequence[int]) -> dict[str, float]:
    """By how many updates the weights that sampled each group were behind those that learn from it.

    Args:
        step: 0-based, which is the version of the weights that learn.
        versions: S versions that sampled.
    """
    behind = [step - version for version in versions]
    return {
        "async/staleness_mean": sum(behind) / len(behind),
        "async/staleness_max": float(max(behind)),
        "async/stale_frac": sum(b > 0 for b in behind) / len(behind),
    }


class ServiceMeter:
    """Reads the services' counts once a step and tells what they did in between."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._since = time.perf_counter()
        self._sampled_s = services.rollouts.stats.busy_s
        self._scored_s = services.rewards.stats.seconds if services.rewards else 0.0
        self._pushed_s = services.rollouts.stats.push_s

    def metrics(self, lookahead: Lookahead[Any], *, asynchronous: bool) -> dict[str, float]:
        """Metrics of the time since the last call; counts are since the services were started.

        Args:
            lookahead: Who collects for the trainer.
            asynchronous: Whether idle shares and queues are of interest.
        """
        rollouts = self._services.rollouts.stats
        now = time.perf_counter()
        passed = now - self._since
        values = {
            "rollout/restarts": float(rollouts.restarts),
            "rollout/retries": float(rollouts.retries),
            "time/push_s": rollouts.push_s - self._pushed_s,
        }
        scored_s = 0.0
        if self._services.rewards is not None:
            rewards = self._services.rewards.stats
            scored_s = rewards.seconds
            values["service/timeouts"] = float(rewards.timeouts)
            values["service/restarts"] = float(rewards.restarts)
            values["time/reward_rows_per_s"] = rewards.rows_per_s
        if asynchronous:
            values["async/trainer_idle_frac"] = lookahead.waited_s / passed
            # Work is told when it is done: what cannot have been done since the last call is counted at the next one.
            sampled = min(rollouts.busy_s - self._sampled_s, rollouts.workers * passed)
            scored = min(scored_s - self._scored_s, passed)
            values["async/sampler_idle_frac"] = 1.0 - sampled / (rollouts.workers * passed)
            values["async/scorer_idle_frac"] = 1.0 - scored / passed
            self._sampled_s, self._scored_s = self._sampled_s + sampled, self._scored_s + scored
            values["async/queued_chunks"] = float(rollouts.queued)
            values["async/ready_steps"] = float(lookahead.ready)
        self._since, self._pushed_s = now, rollouts.push_s
        return values
