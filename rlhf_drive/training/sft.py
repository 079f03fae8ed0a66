"""Supervised fine-tuning on human plans, until the held-out loss stops falling."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from rlhf_drive.errors import DataError, TrainingError
from rlhf_drive.policies import Policy, load_policy
from rlhf_drive.policies.checkpoints import restore_folder
from rlhf_drive.policies.feature_cache import FeatureCache
from rlhf_drive.policies.inputs import mirror_batch
from rlhf_drive.policies.moe import RouterRecord
from rlhf_drive.scenes import Scene
from rlhf_drive.training.checkpoint import CheckpointStore, publish_policy
from rlhf_drive.training.engine import TrainingEngine
from rlhf_drive.training.journal import Journal
from rlhf_drive.training.schedule import learning_rate_scale, scene_order

__all__ = ["SftResult", "SftSettings", "heldout_loss", "train_sft"]

FLAT = 0.01
"""A held-out loss that falls by a smaller share in the last fifth of the epochs has stopped falling."""
MIN_FALL = 1e-3
"""Nats per token by which the held-out loss must fall to count as falling."""


@dataclass(frozen=True)
class SftSettings:
    """Plain arguments of supervised training; a recipe's `sft` section gives them."""

    max_epochs: int
    """Length of the learning-rate schedule; training may stop earlier, see `patience`."""
    batch_size: int
    """Scenes a step."""
    micro_batch_scenes: int
    """Scenes per backward pass; 0 takes the batch at once."""
    learning_rate: float
    """Peak learning rate."""
    weight_decay: float
    """AdamW's decoupled decay."""
    warmup_ratio: float
    """Share of steps spent warming up."""
    max_grad_norm: float
    """Gradients are scaled down to this norm."""
    mask_order: str
    """Which positions are hidden: `random`, `causal`, `reverse_causal` or `mixed`."""
    mirror: bool
    """Whether half of the scenes are mirrored left to right."""
    load_balance_coef: float
    """Weight of the experts' load-balance loss."""
    router_z_coef: float
    """Weight of the router z-loss."""
    patience: int
    """Epochs without a better held-out loss after which training stops."""
    save_steps: int
    """Steps between checkpoints."""
    seed: int
    """Keys scene order, masks, mirroring and dropout."""


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


def _targets(policy: Policy, scenes: Sequence[Scene]) -> Tensor:
    """``[S, L]`` tokens of the human plans.

    Raises:
        DataError: A scene does not hold what the human drove.
    """
    if without := [scene.token for scene in scenes if len(scene.reference.human_poses) == 0]:
        raise DataError(
            f"{len(without)} of {len(scenes)} scenes do not hold what the human drove, which SFT imitates; the first "
            f"is {without[0]!r}. Import metric caches together with their logs."
        )
    poses = np.stack([scene.reference.human_poses for scene in scenes])
    return torch.from_numpy(policy.tokenizer.encode(poses))


@torch.no_grad()
def heldout_loss(policy: Policy, scenes: Sequence[Scene], features: FeatureCache, mask_order: str) -> float:
    """Mean masked-diffusion loss on the human plans of `scenes`, nats per token, with the same masks at every call."""
    policy.eval()
    total = 0.0
    for start in range(0, len(scenes), 256):
        part = scenes[start : start + 256]
        context = policy.encode(features.batch(policy, part))
        generator = torch.Generator(device=policy.device).manual_seed(start)
        rows = _targets(policy, part).to(policy.device).repeat_interleave(4, dim=0)
        total += float(policy.process.sft_loss(policy, rows, context, mask_order, generator).sum()) / 4
    return total / len(scenes)


@torch.random.fork_rng(devices=[])  # dropout draws from torch's own generator: seeded here, given back as it was
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
) -> SftResult:
    """Train until the held-out loss stops falling; `folder/policy` always holds the best weights so far.

    Continues from the newest checkpoint in `folder/checkpoints`, bit for bit on CPU.

    Args:
        policy: Trained in place; at the end it holds the best weights.
        train: Training scenes; human plans are the targets.
        heldout: Scenes that decide when to stop.
        settings: Plain arguments.
        folder: The stage's own folder.
        accelerator: Device and backward.
        features: Cache of network inputs.
        journal: Takes the metrics.

    Raises:
        TrainingError: The loss, on training or held-out scenes, is not finite.
    """
    engine = TrainingEngine(
        policy, learning_rate=settings.learning_rate, weight_decay=settings.weight_decay, betas=(0.9, 0.98),
        accelerator=accelerator,
    )  # fmt: skip
    restore_folder(folder / "policy")
    checkpoints = CheckpointStore(folder / "checkpoints", keep=2)
    policy.remember_training(train)
    targets = _targets(policy, train)
    per_epoch = math.ceil(len(train) / settings.batch_size)
    total = per_epoch * settings.max_epochs
    best, best_epoch, fell_epoch, step = math.inf, -1, -1, 0
    epoch_losses: list[float] = []
    bests: list[float] = []
    torch.manual_seed(settings.seed)  # checkpoints carry the generator on
    if state := checkpoints.load(engine):
        step, best = state.step, float(state.values["best"])
        best_epoch, fell_epoch = int(state.values["best_epoch"]), int(state.values["fell_epoch"])
        epoch_losses, bests = list(state.values["epoch_losses"]), list(state.values["bests"])
    journal.resume(step)
    epoch_started = time.perf_counter()
    while step < total and not _stopped(step, per_epoch, fell_epoch, settings.patience):
        started = time.perf_counter()
        engine.set_learning_rate(settings.learning_rate * learning_rate_scale(step, total, settings.warmup_ratio))
        index = scene_order(settings.seed, step, len(train), settings.batch_size)
        batch = [train[i] for i in index]
        metrics = _sft_step(engine, batch, targets[index], settings, step, features)
        epoch_losses.append(metrics["loss/train"])
        metrics["time/scenes_per_s"] = len(batch) / (time.perf_counter() - started)
        step += 1
        if step % per_epoch == 0:
            loss = heldout_loss(policy, heldout, features, settings.mask_order)
            if not math.isfinite(loss):
                raise TrainingError(f"The held-out SFT loss is {loss} at step {step}; lower sft.learning_rate.")
            epoch = step // per_epoch - 1
            fell_epoch = epoch if loss < best - MIN_FALL else fell_epoch
            if loss < best:
                best, best_epoch = loss, epoch
                publish_policy(policy, folder / "policy", info={"stage": "sft", "epoch": epoch, "heldout_loss": loss})
            bests.append(best)
            metrics |= {"loss/heldout": loss, "loss/heldout_best": best, "sft/epoch": float(epoch + 1)}
            metrics["loss/train_epoch"] = float(np.mean(epoch_losses))
            metrics["time/epoch_s"] = time.perf_counter() - epoch_started
            epoch_started, epoch_losses = time.perf_counter(), []
        journal.log(step, metrics)
        if step % settings.save_steps == 0:
            values: dict[str, object] = {"best": best, "best_epoch": best_epoch, "fell_epoch": fell_epoch}
            values |= {"epoch_losses": epoch_losses, "bests": bests}
            checkpoints.save(step, engine, values)
    policy.load_state_dict(load_policy(folder / "policy").state_dict())
    epochs = step // per_epoch
    late_fall = 1.0 - best / bests[max(int(0.8 * epochs) - 1, 0)]
    plateaued = epochs - 1 - fell_epoch >= settings.patience or late_fall < FLAT
    return SftResult(best, best_epoch + 1, epochs, late_fall, plateaued)


def _stopped(step: int, per_epoch: int, fell_epoch: int, patience: int) -> bool:
    return step % per_epoch == 0 and step // per_epoch - 1 - fell_epoch >= patience


def _sft_step(
    engine: TrainingEngine,
    scenes: Sequence[Scene],
    targets: Tensor,
    settings: SftSettings,
    step: int,
    features: FeatureCache,
) -> dict[str, float]:
    """One optimizer step; masks and mirroring are functions of (seed, step)."""
    policy, optimizer = engine.policy.train(), engine.optimizer
    generator = torch.Generator(device=policy.device).manual_seed(settings.seed * 1_000_003 + step)
    batch, tokens = features.batch(policy, scenes), targets.to(policy.device)
    if settings.mirror:
        flip = torch.rand(len(scenes), generator=generator, device=policy.device) < 0.5
        batch = mirror_batch(batch, flip)
        tokens = torch.where(flip[:, None], policy.tokenizer.mirror(tokens), tokens)
    record = RouterRecord()
    context = policy.encode(batch)
    # Several masks a scene: the scene is encoded once, so further decode states are cheap.
    rows = tokens.repeat_interleave(2, dim=0)
    nll = policy.process.sft_loss(policy, rows, context, settings.mask_order, generator, record).mean()
    balance, z = record.balance_loss(), record.z_loss()
    loss = nll + settings.load_balance_coef * balance + settings.router_z_coef * z
    if not torch.isfinite(loss):
        raise TrainingError(f"The SFT loss is {loss.item()} at step {step}; lower sft.learning_rate.")
    engine.backward(loss)
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), settings.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {
        "loss/train": float(nll.detach()),
        "moe/balance": float(balance.detach()),
        "moe/router_z": float(z.detach()),
        "moe/load_cv": record.load_cv(),
        "moe/dropped_frac": record.dropped_frac(),
        "optim/grad_norm": float(norm),
        "optim/learning_rate": optimizer.param_groups[0]["lr"],
    }
