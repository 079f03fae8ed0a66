"""The RL loop: one step reads from top to bottom."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
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
from rlhf_drive.policies.lora import lora_settings, merged
from rlhf_drive.scenes import Scene
from rlhf_drive.training.checkpoint import CheckpointStore, publish_adapter, publish_policy
from rlhf_drive.training.collect import Experience, Sampling, check_previous_frames, collect
from rlhf_drive.training.journal import Journal
from rlhf_drive.training.refill import Filled, extra_groups, fill, join_experiences, select_groups
from rlhf_drive.training.trainer import RlTrainer
from rlhf_drive.training.visiting import SceneVisits
from rlhf_drive.training.watch import Watch
from rollout import RolloutService

__all__ = ["Visiting", "check_likelihood", "reward_metrics", "train_rl"]

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


@dataclass(frozen=True)
class Visiting:
    """Which scenes an RL step learns from."""

    mode: str
    """`uniform` or `informative`."""
    refill: float
    """Groups sampled at most in place of those that teach nothing, as a share of the step's scenes; 0 = none."""


def train_rl(
    trainer: RlTrainer,
    rollouts: RolloutService,
    rewards: RewardService,
    scenes: Sequence[Scene],
    folder: Path,
    *,
    sampling: Sampling,
    visiting: Visiting,
    max_invalid_fraction: float,
    seed: int,
    save_steps: int,
    keep_checkpoints: int,
    journal: Journal,
    watch: Watch | None = None,
) -> None:
    """Sample, score, learn, for `max_steps` steps; the policy ends in `folder/policy`.

    Continues from the newest checkpoint in `folder/checkpoints`; on CPU the metrics and weights are then those of an
    uninterrupted run, bit for bit, because scenes and samples are functions of (seed, step) and of what the checkpoint
    holds.

    Raises:
        RewardError: More than `max_invalid_fraction` of a step's rows could not be scored.
        DataError: Plans of the frame before are asked for, and scenes do not know that frame.
        TrainingError: The likelihood self-test failed, loss or gradients are not finite, or a limit was passed.
    """
    policy, settings = trainer.policy, trainer.settings
    check_previous_frames(scenes, sampling)
    policy.remember_training(scenes)
    checkpoints = CheckpointStore(folder / "checkpoints", keep_checkpoints)
    torch.manual_seed(seed)  # for a user's reward that draws from torch; checkpoints carry the generator on
    state = checkpoints.load(trainer.engine)
    first = state.step if state else 0
    watch, visits = watch or Watch(), SceneVisits(visiting.mode, len(scenes), seed)
    if state:
        watch.restore(state.values.get("watch", {}))
        visits.restore(state.values.get("visits", {}))
        trainer.restore(state.tensors, state.values.get("guard", {}))
    journal.resume(first)
    rollouts.push_weights(policy, first)
    check_likelihood(policy, rollouts, scenes[:4], sampling.decoding, trainer.source.features)
    for step in range(first, settings.max_steps):
        started = time.perf_counter()
        rollouts.push_weights(policy, step)
        filled = _filled(trainer, visits, rollouts, rewards, scenes, sampling, visiting, max_invalid_fraction, step)
        visits.saw(step, filled.visited, filled.informative.tolist())
        batch, experience = [scenes[i] for i in filled.scenes], filled.experience
        metrics = {
            # What was sampled first: nobody selected those scenes for what they teach.
            **reward_metrics(filled.first.scores, sampling.num_generations),
            **trainer.step(step, batch, experience.rollout, experience.scores),
            "service/timeouts": float(rewards.stats.timeouts),
            "service/restarts": float(rewards.stats.restarts),
            "time/reward_rows_per_s": rewards.stats.rows_per_s,
            "time/rollout_s": experience.sampling_s,
            "time/reward_s": experience.waiting_s,
        }
        if visiting.refill > 0:
            metrics |= filled.metrics
        if visiting.mode != "uniform":
            metrics |= visits.metrics(step)
        seen, alerts = watch.look(step + 1, [scenes[i] for i in filled.visited[: len(batch)]], filled.first, rollouts)
        metrics |= seen
        metrics["time/step_s"] = time.perf_counter() - started
        metrics["time/scenes_per_s"] = len(filled.visited) / metrics["time/step_s"]
        journal.log(step + 1, metrics)
        for alert in alerts:
            journal.warn(alert)
        if (step + 1) % save_steps == 0 or step + 1 == settings.max_steps:
            kept = trainer.state()
            values = {"watch": watch.state(), "visits": visits.state(), "guard": kept["guard"]}
            checkpoints.save(step + 1, trainer.engine, values, kept["tensors"])
    info = {"stage": "rl", "seed": seed, "steps": settings.max_steps, "ema_decay": settings.ema_decay}
    with trainer.ema.applied(policy) if trainer.ema else nullcontext():
        publish_policy(merged(policy), folder / "policy", info=info)
        if lora_settings(policy):
            publish_adapter(policy, folder / "adapter", info=info)


def _filled(
    trainer: RlTrainer,
    visits: SceneVisits,
    rollouts: RolloutService,
    rewards: RewardService,
    scenes: Sequence[Scene],
    sampling: Sampling,
    visiting: Visiting,
    max_invalid_fraction: float,
    step: int,
) -> Filled[Experience]:
    """The step's scored groups; those that teach nothing give way to fresh ones while the budget lasts."""

    parts: list[Scores] = []

    def sample(index: list[int]) -> Experience:
        experience = collect(rollouts, rewards, [scenes[i] for i in index], sampling, step=step)
        parts.append(experience.scores)
        # Over the whole step so far: a round may be a single scene.
        check_invalid(Scores.concatenate(parts), max_invalid_fraction)
        return experience

    return fill(
        lambda number, taken: visits.choose(step, number, taken),
        sample,
        lambda experience: trainer.informative(experience.scores, sampling.num_generations),
        join_experiences,
        select_groups,
        want=sampling.scenes_per_step,
        budget=extra_groups(visiting.refill, sampling.scenes_per_step),
    )
