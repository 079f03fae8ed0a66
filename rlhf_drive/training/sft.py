"""Supervised fine-tuning on human plans, until the held-out loss stops falling."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from accelerate import Accelerator

from rlhf_drive.disk import restore_folder
from rlhf_drive.errors import TrainingError
from rlhf_drive.policies import Policy, load_policy
from rlhf_drive.policies.feature_cache import FeatureCache
from rlhf_drive.scenes import Scene
from rlhf_drive.training.checkpoint import CheckpointStore, publish_policy
from rlhf_drive.training.engine import TrainingEngine
from rlhf_drive.training.generators import kept_generators, seed_generators
from rlhf_drive.training.journal import Journal
from rlhf_drive.training.ranks import Ranks
from rlhf_drive.training.run_folder import RunIdentity
from rlhf_drive.training.schedule import learning_rate_scale, scene_order
from rlhf_drive.training.sft_settings import SftSettings
from rlhf_drive.training.sft_step import check_plans, heldout_loss, sft_step
from rlhf_drive.training.shards import cut_like
from rlhf_drive.training.stopping import StopSignals, stopped_by
from rlhf_drive.training.together import on_main

__all__ = ["SftResult", "SftSettings", "heldout_loss", "train_sft"]

FLAT = 0.01
"""A held-out loss that falls by a smaller share in the last fifth of the epochs has stopped falling."""
MIN_FALL = 1e-3
"""Nats per token by which the held-out loss must fall to count as falling."""


@dataclass(frozen=True)
class SftResult:
    """How training ended; the best weights lie in the policy folder."""

    heldout_loss: float
    """Best held-out loss, nats per token."""
    epoch: int
    """Epoch that reached it."""
    epochs: int
    """Epochs trained."""
    late_fall: float
    """Share by which the best held-out loss still fell during the last fifth of the epochs."""
    plateaued: bool
    """Whether it had stopped falling: no better for `patience` epochs, or `late_fall` below 1 %."""


@dataclass
class _Progress:
    """What a checkpoint keeps of the training beside weights and generators; alike on all processes."""

    best: float = math.inf
    """Best held-out loss so far."""
    best_epoch: int = -1
    """0-based epoch that reached it."""
    fell_epoch: int = -1
    """0-based epoch in which it last fell by `MIN_FALL`."""
    epoch_losses: list[float] = field(default_factory=list)
    """Training losses of this epoch's steps."""
    bests: list[float] = field(default_factory=list)
    """Best held-out loss after each epoch."""

    @property
    def epochs(self) -> int:
        """Epochs done."""
        return len(self.bests)

    def note(self, loss: float) -> bool:
        """Take an epoch's held-out loss; whether it is the best."""
        epoch, better = self.epochs, loss < self.best
        self.fell_epoch = epoch if loss < self.best - MIN_FALL else self.fell_epoch
        if better:
            self.best, self.best_epoch = loss, epoch
        self.bests.append(self.best)
        self.epoch_losses = []
        return better

    def stopped(self, patience: int) -> bool:
        """Whether it has not fallen for `patience` epochs."""
        return self.epochs - 1 - self.fell_epoch >= patience

    def result(self, patience: int) -> SftResult:
        """How training ended."""
        epochs = self.epochs
        late_fall = 1.0 - self.best / self.bests[max(int(0.8 * epochs) - 1, 0)]
        plateaued = self.stopped(patience) or late_fall < FLAT
        return SftResult(self.best, self.best_epoch + 1, epochs, late_fall, plateaued)


@kept_generators()  # seeded here, given back as they were
def train_sft(
    policy: Policy,
    train: Sequence[Scene],
    heldout: Sequence[Scene],
    settings: SftSettings,
    folder: Path,
    *,
    accelerator: Accelerator,
    features: FeatureCache,
    journal: Journal,
    ranks: Ranks | None = None,
    strategy: str = "ddp",
    run: RunIdentity | None = None,
) -> SftResult:
    """Train until the held-out loss stops falling; `folder/policy` always holds the best weights so far.

    Continues from the newest checkpoint in `folder/checkpoints`, bit for bit on CPU. A signal that asks to stop ends
    training after the step in progress, with a checkpoint.

    Args:
        policy: Trained in place; at the end it holds the best weights.
        train: Training scenes; human plans are the targets. Only those of a step are held at a time.
        heldout: Scenes that decide when to stop.
        settings: Plain arguments.
        folder: The stage's own folder, seen by all processes and written by the main one.
        accelerator: Device and backward.
        features: Cache of network inputs.
        journal: Takes the metrics, on the main process.
        ranks: Processes that share the micro-batches. All must call this with the same arguments.
        strategy: How several processes share the policy, `ddp` or `fsdp2`; with `fsdp2` its weights are pieces
            afterwards.
        run: Whose checkpoints these are.

    Raises:
        CheckpointError: The newest checkpoint cannot be gone on from.
        ConfigError: There are more processes than micro-batches.
        DataError: Scenes do not hold what the human drove.
        RunStoppedError: A signal asked for it.
        StorageError: A file cannot be written.
        TrainingError: The loss, on training or held-out scenes, is not finite.
    """
    ranks = ranks or Ranks()
    settings.check_processes(ranks.count)
    check_plans(train)
    check_plans(heldout)
    engine = TrainingEngine(
        policy, learning_rate=settings.learning_rate, weight_decay=settings.weight_decay, betas=(0.9, 0.98),
        accelerator=accelerator, ranks=ranks, strategy=strategy,
    )  # fmt: skip
    on_main(ranks, lambda: restore_folder(folder / "policy"))
    policy.remember_training(train)
    seed_generators(settings.seed)  # checkpoints carry them on
    with StopSignals(ranks) as signals:
        progress = _run(engine, train, heldout, settings, folder, features, journal, signals, run)
    _take_weights(policy, load_policy(folder / "policy"))
    return progress.result(settings.patience)


def _run(
    engine: TrainingEngine,
    train: Sequence[Scene],
    heldout: Sequence[Scene],
    settings: SftSettings,
    folder: Path,
    features: FeatureCache,
    journal: Journal,
    signals: StopSignals,
    run: RunIdentity | None,
) -> _Progress:
    """All steps, from the newest checkpoint on."""
    checkpoints = CheckpointStore(folder / "checkpoints", keep=2, run=run)
    per_epoch = math.ceil(len(train) / settings.batch_size)
    total = per_epoch * settings.max_epochs
    step, progress = 0, _Progress()
    if state := checkpoints.load(engine):
        step, progress = state.step, _Progress(**state.values)
    if engine.ranks.main:
        journal.resume(step)
        for notice in state.notices if state else ():
            journal.note(notice)
    epoch_started = time.perf_counter()
    while step < total and (step % per_epoch or not progress.stopped(settings.patience)):
        started = time.perf_counter()
        engine.set_learning_rate(settings.learning_rate * learning_rate_scale(step, total, settings.warmup_ratio))
        batch = [train[i] for i in scene_order(settings.seed, step, len(train), settings.batch_size)]
        metrics = sft_step(engine, batch, settings, step, features)
        progress.epoch_losses.append(metrics["loss/train"])
        metrics["time/scenes_per_s"] = len(batch) / (time.perf_counter() - started)
        step += 1
        if step % per_epoch == 0:
            metrics["loss/train_epoch"] = float(np.mean(progress.epoch_losses))
            metrics |= _end_epoch(engine, progress, heldout, settings, folder, features)
            metrics["time/epoch_s"] = time.perf_counter() - epoch_started
            epoch_started = time.perf_counter()
        if engine.ranks.main:
            journal.log(step, metrics)
        signal = signals.requested
        if signal or step % settings.save_steps == 0:
            checkpoints.save(step, engine, dataclasses.asdict(progress))
        if signal:
            raise stopped_by(signal, folder.name, step, checkpoints.resume_command)
    return progress


def _end_epoch(
    engine: TrainingEngine,
    progress: _Progress,
    heldout: Sequence[Scene],
    settings: SftSettings,
    folder: Path,
    features: FeatureCache,
) -> dict[str, float]:
    """Held-out loss after an epoch; the weights are published where they are the best so far.

    Raises:
        TrainingError: It is not finite.
    """
    whole, ranks, epoch = engine.whole_policy(), engine.ranks, progress.epochs
    loss = heldout_loss(whole, heldout, features, settings.mask_order, ranks)
    if not math.isfinite(loss):
        raise TrainingError(f"The held-out SFT loss is {loss} after epoch {epoch + 1}; lower sft.learning_rate.")
    if progress.note(loss):
        info = {"stage": "sft", "epoch": epoch, "heldout_loss": loss}
        on_main(ranks, lambda: publish_policy(whole, folder / "policy", info=info))
    return {"loss/heldout": loss, "loss/heldout_best": progress.best, "sft/epoch": float(epoch + 1)}


def _take_weights(policy: Policy, stored: Policy) -> None:
    """Put `stored` weights into `policy`, whose own may be pieces."""
    own = policy.state_dict()
    policy.load_state_dict({name: cut_like(value, own[name]) for name, value in stored.state_dict().items()})
