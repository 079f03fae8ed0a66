"""The RL loop: one step reads from top to bottom."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from rewards.carriers import Scores
from rewards.reward_stats import reward_failures
from rewards.service import RewardService, check_invalid
from rlhf_drive.errors import TrainingError
from rlhf_drive.likelihood import flatten_steps, trace_logp
from rlhf_drive.policies import Decoding, Policy
from rlhf_drive.policies.feature_cache import FeatureCache
from rlhf_drive.scenes import Scene
from rlhf_drive.training.checkpoint import CheckpointStore, publish_policy
from rlhf_drive.training.collect import Sampling, check_previous_frames, collect
from rlhf_drive.training.journal import Journal
from rlhf_drive.training.schedule import scene_order
from rlhf_drive.training.trainer import RlTrainer
from rlhf_drive.training.watch import Watch
from rollout import RolloutService

__all__ = ["check_likelihood", "reward_metrics", "train_rl"]

LOGPROB_TOLERANCE = 1e-3
"""Difference between a sampler's and a recomputed log-probability that rounding explains (nats): it is about 1e-5."""
FLIPPED_SHARE = 0.01
"""Share of draws that may differ by more: where the router logits of two experts tie to the last bits, a batch of
another shape can choose the other one. A wrong likelihood differs on most draws."""


@torch.no_grad()
def check_likelihood(
    policy: Policy, rollouts: RolloutService, scenes: Sequence[Scene], decoding: Decoding, features: FeatureCache
) -> float:
    """Start-up self-test: recomputed log-probabilities equal the sampler's. Returns the largest difference in nats.

    Raises:
        TrainingError: They differ, so ratios would not be ratios.
    """
    rollout = rollouts.sample(scenes, 2, decoding, step=-1)
    logp, mask = trace_logp(policy, policy.encode(features.batch(policy, scenes)), rollout.trace)
    difference = (logp - flatten_steps(rollout.trace.logp)).abs()[mask]
    share, largest = float((difference > LOGPROB_TOLERANCE).float().mean()), float(difference.max())
    if not (share <= FLIPPED_SHARE and math.isfinite(largest)):
        raise TrainingError(
            f"Recomputed log-probabilities differ from the sampler's by up to {largest:.2e} nats, on {share:.0%} of "
            f"draws by more than {LOGPROB_TOLERANCE:.0e}: importance ratios would be wrong from the first update on. "
            "Sampler and trainer must hold the same weights and decoding settings."
        )
    return largest


def reward_metrics(scores: Scores, num_generations: int) -> dict[str, float]:
    """Means over valid rows of the reward and its components, the group's best, and the invalid rows by cause."""
    metrics = {"reward/invalid_frac": float(1.0 - scores.valid.mean())}
    metrics |= {f"failures/{cause}": float(count) for cause, count in reward_failures(scores).items()}
    if not scores.valid.any():
        return metrics
    metrics["reward/total"] = float(scores.total[scores.valid].mean())
    groups = np.where(scores.valid, scores.total, -np.inf).reshape(-1, num_generations).max(axis=1)
    metrics["reward/best_of_group"] = float(groups[np.isfinite(groups)].mean())
    for c, name in enumerate(scores.names):
        column = scores.components[scores.valid, c]
        if np.isfinite(column).any():
            metrics[f"reward/{name}"] = float(np.nanmean(column))
    return metrics


def train_rl(
    trainer: RlTrainer,
    rollouts: RolloutService,
    rewards: RewardService,
    scenes: Sequence[Scene],
    folder: Path,
    *,
    sampling: Sampling,
    max_invalid_fraction: float,
    seed: int,
    save_steps: int,
    keep_checkpoints: int,
    journal: Journal,
    watch: Watch | None = None,
) -> None:
    """Sample, score, learn, for `max_steps` steps; the policy ends in `folder/policy`.

    Continues from the newest checkpoint in `folder/checkpoints`; on CPU the metrics and weights are then those of an
    uninterrupted run, bit for bit, because scenes and samples are functions of (seed, step).

    Raises:
        RewardError: More than `max_invalid_fraction` of a step's rows could not be scored.
        DataError: Plans of the frame before are asked for, and scenes do not know that frame.
        TrainingError: The likelihood self-test failed, or loss or gradients are not finite.
    """
    policy, settings = trainer.policy, trainer.settings
    check_previous_frames(scenes, sampling)
    policy.remember_training(scenes)
    checkpoints = CheckpointStore(folder / "checkpoints", keep_checkpoints)
    torch.manual_seed(seed)  # for a user's reward that draws from torch; checkpoints carry the generator on
    state = checkpoints.load(policy, trainer.optimizer)
    first = state.step if state else 0
    watch = watch or Watch()
    if state:
        watch.restore(state.values.get("watch", {}))
    journal.resume(first)
    rollouts.push_weights(policy, first)
    check_likelihood(policy, rollouts, scenes[:4], sampling.decoding, trainer.features)
    for step in range(first, settings.max_steps):
        started = time.perf_counter()
        batch = [scenes[i] for i in scene_order(seed, step, len(scenes), sampling.scenes_per_step)]
        rollouts.push_weights(policy, step)
        experience = collect(rollouts, rewards, batch, sampling, step=step)
        rollout, scores = experience.rollout, experience.scores
        check_invalid(scores, max_invalid_fraction)
        metrics = {
            **reward_metrics(scores, sampling.num_generations),
            **trainer.step(step, batch, rollout, scores),
            "service/timeouts": float(rewards.stats.timeouts),
            "service/restarts": float(rewards.stats.restarts),
            "time/reward_rows_per_s": rewards.stats.rows_per_s,
            "time/rollout_s": experience.sampling_s,
            "time/reward_s": experience.waiting_s,
        }
        seen, alerts = watch.look(step + 1, batch, experience, rollouts)
        metrics |= seen
        metrics["time/step_s"] = time.perf_counter() - started
        metrics["time/scenes_per_s"] = len(batch) / metrics["time/step_s"]
        journal.log(step + 1, metrics)
        for alert in alerts:
            journal.warn(alert)
        if (step + 1) % save_steps == 0 or step + 1 == settings.max_steps:
            checkpoints.save(step + 1, policy, trainer.optimizer, {"watch": watch.state()})
    publish_policy(policy, folder / "policy", info={"stage": "rl", "seed": seed, "steps": settings.max_steps})
