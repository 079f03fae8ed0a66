"""Watching RL for reward hacking: monitors on every batch, and EPDMS on held-out scenes every few steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from rewards.hack_detector import Alert, HackDetector
from rewards.monitors import batch_monitors
from rewards.service import RewardService
from rewards.two_frame import score_frames
from rlhf_drive.scenes import Scene
from rlhf_drive.training.collect import Experience, Sampling, previous_plans
from rollout import RolloutService

__all__ = ["Watch", "spread_out"]


def spread_out(scenes: Sequence[Scene], count: int) -> list[Scene]:
    """At most `count` scenes, evenly spaced over the list, so that no recording dominates."""
    return [scenes[i] for i in np.unique(np.linspace(0, len(scenes) - 1, min(count, len(scenes))).astype(int))]


class Watch:
    """Looks at each step's experience; what it sees changes nothing in training."""

    def __init__(
        self,
        heldout: Sequence[Scene] = (),
        service: RewardService | None = None,
        sampling: Sampling | None = None,
        *,
        every: int = 0,
    ) -> None:
        """Watch.

        Args:
            heldout: Scenes that are driven every so often, never learned from.
            service: Scores EPDMS.
            sampling: How the run samples; held-out scenes get one plan each, with the plan of the frame before.
            every: Steps between two looks at them; 0 = never.
        """
        self._heldout, self._service, self._every = list(heldout), service, every
        self._sampling = replace(sampling, num_generations=1, previous_plan="sampled") if sampling else None
        self._detector = HackDetector()

    def look(
        self, step: int, scenes: Sequence[Scene], experience: Experience, rollouts: RolloutService
    ) -> tuple[dict[str, float], list[Alert]]:
        """Monitors of a step, and the warnings they give rise to.

        Args:
            step: Steps done, counted from 1.
            scenes: The step's scenes.
            experience: What was sampled and scored.
            rollouts: Samples held-out scenes.

        Returns:
            Metrics `monitor/…` and, where held-out scenes were driven, `heldout/invalid_frac`, `heldout/epdms` and
            `heldout/ec`, the latter two where any scene has them; and alerts.
        """
        scores = experience.scores
        metrics = batch_monitors(scenes, experience.rollout.trajectories, scores)
        heldout: dict[str, float] = {}
        if self._every and self._heldout and step % self._every == 0:
            heldout = self._drive_heldout(rollouts, step)
        reward = float(scores.total[scores.valid].mean()) if scores.valid.any() else float("nan")
        alerts = self._detector.update(step, metrics, reward=reward)
        if "heldout/epdms" in heldout:
            alerts += self._detector.update_heldout(step, heldout["heldout/epdms"])
        return metrics | heldout, alerts

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as plain JSON data."""
        return self._detector.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state`."""
        self._detector.restore(state)

    def _drive_heldout(self, rollouts: RolloutService, step: int) -> dict[str, float]:
        """Share without a score, and mean EPDMS and EC, of one plan for each held-out scene.

        Scenes that lack what EPDMS needs, such as NAVSIM v1.1's, show as a share of 1: nothing is watched there.
        """
        assert self._service is not None
        assert self._sampling is not None
        previous = previous_plans(rollouts, self._heldout, self._sampling, step=step)
        plans = rollouts.sample(self._heldout, 1, self._sampling.decoding, step=step).trajectories
        scores = score_frames(self._service, self._heldout, plans, previous)
        epdms, ec = (scores.component(name)[scores.valid] for name in ("epdms", "ec"))
        found = {"heldout/epdms": epdms, "heldout/ec": ec[np.isfinite(ec)]}
        means = {name: float(values.mean()) for name, values in found.items() if len(values)}
        return {"heldout/invalid_frac": float(1.0 - scores.valid.mean())} | means
