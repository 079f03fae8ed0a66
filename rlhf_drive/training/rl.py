"""The RL loop: one step reads from top to bottom."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rewards.carriers import Scores
from rewards.reward_stats import reward_failures
from rlhf_drive.errors import RewardError, TrainingError
from rlhf_drive.likelihood import flatten_steps, trace_logp
from rlhf_drive.policies import Decoding
from rlhf_drive.policies.feature_cache import FeatureCache
from rlhf_drive.policies.lora import lora_settings, merged
from rlhf_drive.scenes import Scene
from rlhf_drive.training.checkpoint import CheckpointStore, publish_adapter, publish_policy
from rlhf_drive.training.collect import Experience, Sampling, check_previous_frames
from rlhf_drive.training.engine import TrainingEngine
from rlhf_drive.training.generators import seed_generators
from rlhf_drive.training.group_pictures import draw_groups
from rlhf_drive.training.journal import Journal
from rlhf_drive.training.last_good import LastGoodStep
from rlhf_drive.training.profile import part, profiled
from rlhf_drive.training.ranks import RankLostError
from rlhf_drive.training.refill import Filled
from rlhf_drive.training.run_folder import RunIdentity
from rlhf_drive.training.service_meter import ServiceMeter, staleness_metrics
from rlhf_drive.training.step_collector import Services, StepCollector, Visiting
from rlhf_drive.training.stopping import StopSignals, stopped_by
from rlhf_drive.training.together import on_main
from rlhf_drive.training.trainer import RlTrainer
from rlhf_drive.training.visiting import SceneVisits
from rlhf_drive.training.watch import Watch
from rollout import Rollout

__all__ = ["LoopSettings", "check_likelihood", "reward_metrics", "train_rl"]

LOGPROB_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25}
"""Difference between a sampler's and a recomputed log-probability that rounding explains (nats), by precision of the
policy: in float32 it is about 1e-5."""
FLIPPED_SHARE = 0.01
"""Share of draws that may differ by more: where the router logits of two experts tie to the last bits, a batch of
another shape can choose the other one. A wrong likelihood differs on most draws."""


@torch.no_grad()
def check_likelihood(
    engine: TrainingEngine, services: Services, scenes: Sequence[Scene], decoding: Decoding, features: FeatureCache
) -> float:
    """Start-up self-test: recomputed log-probabilities equal the sampler's. Returns the largest difference in nats.

    Raises:
        TrainingError: They differ, so ratios would not be ratios.
    """
    policy = engine.policy

    def sample() -> Rollout:
        return services.rollouts.sample(scenes, 2, decoding, step=-1).to(torch.device("cpu"))

    trace = (on_main(services.ranks, sample) if services.central else sample()).to(policy.device).trace
    logp, mask = engine.forward(lambda policy: trace_logp(policy, policy.encode(features.batch(policy, scenes)), trace))
    tolerance = LOGPROB_TOLERANCE[policy.precision]
    difference = (logp - flatten_steps(trace.logp)).abs()[mask]
    share, largest = float((difference > tolerance).float().mean()), float(difference.max())
    if not (share <= FLIPPED_SHARE and math.isfinite(largest)):
        raise TrainingError(
            f"Recomputed log-probabilities differ from the sampler's by up to {largest:.2e} nats, on {share:.0%} of "
            f"draws by more than {tolerance:.0e}: importance ratios would be wrong from the first update on. "
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
class LoopSettings:
    """Plain arguments of the loop around the trainer."""

    seed: int
    """Of the run: chooses scenes, and seeds torch's generator for a user's reward that draws from it."""
    save_steps: int
    """Steps between two checkpoints."""
    keep_checkpoints: int
    """Latest checkpoints kept."""
    max_invalid_fraction: float
    """Share of a step's rows without a score beyond which the run stops."""
    max_staleness: int = 0
    """Updates by which the weights that sampled may be behind; 0 = sampling and training take turns."""
    picture_steps: int = 0
    """Steps between two pictures of sampled groups; 0 = none."""
    picture_scenes: int = 4
    """Scenes in a picture."""
    profile_steps: tuple[int, ...] = ()
    """Steps, counted from 1, that are profiled."""
    run: RunIdentity | None = None
    """Whose checkpoints these are; None outside a run folder."""


def train_rl(
    trainer: RlTrainer,
    services: Services,
    scenes: Sequence[Scene],
    folder: Path,
    *,
    sampling: Sampling,
    visiting: Visiting,
    settings: LoopSettings,
    journal: Journal,
    watch: Watch | None = None,
) -> None:
    """Sample, score, learn, for `max_steps` steps; the policy ends in `folder/policy`. All processes call it.

    Continues from the newest checkpoint in `folder/checkpoints`; on CPU, in the synchronous mode and with as many
    processes, the metrics and weights are then those of an uninterrupted run, bit for bit, because scenes and samples
    are functions of (seed, step) and of what the checkpoint holds.

    Raises:
        RewardError: More than `max_invalid_fraction` of a step's rows could not be scored.
        DataError: Plans of the frame before are asked for, and scenes do not know that frame.
        TrainingError: The likelihood self-test failed, loss or gradients are not finite, or a limit was passed.
        RunStoppedError: A signal asked to stop; a checkpoint was written.
    """
    check_previous_frames(scenes, sampling)
    trainer.policy.remember_training(scenes)
    visits = SceneVisits(visiting.mode, len(scenes), settings.seed)
    loop = _Loop(trainer, services, scenes, folder, sampling, visiting, settings, journal, watch or Watch(), visits)
    first, last = loop.start(), trainer.settings.max_steps
    collector = StepCollector(
        services, scenes, sampling, visits, trainer.informative, refill=visiting.refill,
        max_invalid_fraction=settings.max_invalid_fraction, ahead=settings.max_staleness, last=last,
    )  # fmt: skip
    with StopSignals(services.ranks) as signals, collector:
        for step in range(first, last):
            loop.step(step, collector)
            stop = signals.requested
            if stop or (step + 1) % settings.save_steps == 0 or step + 1 == last:
                loop.save(step + 1)
                if stop:
                    raise stopped_by(stop, folder.name, step + 1, loop.checkpoints.resume_command)
    loop.publish()


@dataclass
class _Loop:
    """A run in progress."""

    trainer: RlTrainer
    services: Services
    scenes: Sequence[Scene]
    folder: Path
    sampling: Sampling
    visiting: Visiting
    settings: LoopSettings
    journal: Journal
    watch: Watch
    visits: SceneVisits
    pushed: int = -1

    def start(self) -> int:
        """Go on from the newest checkpoint; the step to begin with."""
        trainer, settings = self.trainer, self.settings
        self.checkpoints = CheckpointStore(self.folder / "checkpoints", settings.keep_checkpoints, run=settings.run)
        seed_generators(settings.seed)  # checkpoints carry them on
        state = self.checkpoints.load(trainer.engine)
        if state:
            self.watch.restore(state.values.get("watch", {}))
            self.visits.restore(state.tensors)
            trainer.restore(state.tensors, state.values.get("guard", {}))
        first = state.step if state else 0
        self.journal.resume(first)
        for notice in state.notices if state and self.services.ranks.main else ():
            self.journal.note(notice)
        self._push_weights(first)
        features = trainer.source.features
        check_likelihood(trainer.engine, self.services, self.scenes[:4], self.sampling.decoding, features)
        self.meter = ServiceMeter(self.services)
        limits = trainer.settings.limits
        self.last_good = LastGoodStep(
            self.checkpoints, trainer.engine, hold_weights=limits.active and limits.on_limit == "stop"
        )
        return first

    def step(self, step: int, collector: StepCollector) -> None:
        """Sample, score, learn, log."""
        started, trainer, settings = time.perf_counter(), self.trainer, self.settings
        if self.last_good.hold_weights or not trainer.engine.divided:  # else averages would be gathered at every step
            self.last_good.note(step, *self._kept())
        try:
            filled, learned = self._learn(step, collector)
        except RankLostError:
            raise  # a checkpoint takes all processes
        except (RewardError, TrainingError) as error:
            raise type(error)(f"{error} {self.last_good.save()}".rstrip()) from error
        experience = filled.experience
        if not self.services.ranks.main:
            return
        metrics = {
            # What was sampled first: nobody selected those scenes for what they teach.
            **reward_metrics(filled.first.scores, self.sampling.num_generations),
            **learned,
            "time/rollout_s": experience.sampling_s,
            "time/reward_s": experience.waiting_s,
            **(filled.metrics if self.visiting.refill > 0 else {}),
            **(self.visits.metrics(step) if self.visiting.mode != "uniform" else {}),
            **(staleness_metrics(step, experience.rollout.versions) if settings.max_staleness else {}),
            **self.meter.metrics(collector.lookahead, asynchronous=settings.max_staleness > 0),
        }
        self._observe(step, filled, metrics, started)

    def _learn(self, step: int, collector: StepCollector) -> tuple[Filled[Experience], dict[str, float]]:
        """The step's groups, and the metrics of learning from them."""
        trainer = self.trainer
        profiles = self.settings.profile_steps if self.services.ranks.main else ()
        with profiled(self.folder / "profiles", step + 1, profiles):
            with part("push weights"):
                self._push_weights(step)
            with part("collect"):
                filled = collector.take(step)
            self.visits.saw(step, filled.visited, filled.informative.tolist())
            experience = filled.experience
            rollout = experience.rollout.to(trainer.policy.device)
            with part("update"):
                learned = trainer.step(step, [self.scenes[i] for i in filled.scenes], rollout, experience.scores)
        return filled, learned

    def _push_weights(self, version: int) -> None:
        """Let those who sample have the present weights, on every process; those of the start they have already."""
        if version == self.pushed:
            return
        self.pushed = version
        # The central service puts weights that are cut over processes together by itself, piece by piece.
        central, trainer = self.services.central, self.trainer
        policy = trainer.policy if central else trainer.engine.whole_policy()
        self.services.rollouts.push_weights(policy, version)

    def _observe(self, step: int, filled: Filled[Experience], metrics: dict[str, float], started: float) -> None:
        """What a person, or a monitor, sees of a step; it changes nothing in training."""
        settings, first = self.settings, filled.first
        seen = [self.scenes[i] for i in filled.visited[: self.sampling.scenes_per_step]]
        watched, alerts = self.watch.look(step + 1, seen, first, self.services.rollouts)
        seconds = time.perf_counter() - started
        times = {"time/step_s": seconds, "time/scenes_per_s": len(filled.visited) / seconds}
        self.journal.log(step + 1, metrics | watched | times)
        for alert in alerts:
            self.journal.warn(alert)
        if settings.picture_steps and (step + 1) % settings.picture_steps == 0:
            path = self.folder / "pictures" / f"step-{step + 1:06d}.png"
            draw_groups(seen, first.rollout, first.scores, path, step=step + 1, count=settings.picture_scenes)

    def save(self, step: int) -> Path:
        """Write a checkpoint of `step` steps."""
        return self.checkpoints.save(step, self.trainer.engine, *self._kept())

    def _kept(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a checkpoint holds beside weights, optimizer and generators: plain values, and tensors."""
        kept = self.trainer.state()
        return {"watch": self.watch.state(), "guard": kept["guard"]}, kept["tensors"] | self.visits.state()

    def publish(self) -> None:
        """Write the trained policy: averages where they are kept, adapters merged and alone."""
        trainer, settings = self.trainer, self.trainer.settings
        info = {
            "stage": "rl", "seed": self.settings.seed, "steps": settings.max_steps, "ema_decay": settings.ema_decay,
        }  # fmt: skip
        with trainer.ema.applied(trainer.policy) if trainer.ema else nullcontext():
            whole = trainer.engine.whole_policy()
            if self.services.ranks.main:
                publish_policy(merged(whole), self.folder / "policy", info=info)
                if lora_settings(whole):
                    publish_adapter(whole, self.folder / "adapter", info=info)
        self.services.ranks.wait()
