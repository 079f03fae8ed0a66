"""One supervised step and the held-out loss, cut into parts that processes share.

Everything random in a part is keyed by (seed, step, number of the part), and parts are summed in their order: results
do not depend on how many processes there are.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from rlhf_drive.errors import DataError, TrainingError
from rlhf_drive.policies import Policy
from rlhf_drive.policies.feature_cache import FeatureCache
from rlhf_drive.policies.inputs import mirror_batch
from rlhf_drive.policies.moe import RouterRecord
from rlhf_drive.scenes import Scene
from rlhf_drive.scenes.split import human_known
from rlhf_drive.training.engine import TrainingEngine
from rlhf_drive.training.ranks import Ranks
from rlhf_drive.training.sft_settings import SftSettings

__all__ = ["check_plans", "heldout_loss", "sft_step"]

HELDOUT_SCENES = 256
"""Scenes whose held-out loss is computed at once."""
HELDOUT_MASKS = 4
"""Masks for each of them."""
MASKS = 2
"""Masks of a training scene: it is encoded once, so further decode states are cheap."""

Measures = dict[str, float]


def _targets(policy: Policy, scenes: Sequence[Scene]) -> Tensor:
    """``[S, L]`` tokens of the human plans.

    Raises:
        DataError: A scene does not hold what the human drove.
    """
    if without := [scene.token for scene in scenes if len(scene.reference.human_poses) == 0]:
        raise _no_plans(len(without), len(scenes), without[0])
    poses = np.stack([scene.reference.human_poses for scene in scenes])
    return torch.from_numpy(policy.tokenizer.encode(poses))


def check_plans(scenes: Sequence[Scene]) -> None:
    """Look for scenes without a plan before hours of training; those of a store are not read for it.

    Raises:
        DataError: Some do not hold what the human drove.
    """
    if len(without := np.flatnonzero(~human_known(scenes))):
        raise _no_plans(len(without), len(scenes), scenes[int(without[0])].token)


def _no_plans(without: int, count: int, first: str) -> DataError:
    return DataError(
        f"{without} of {count} scenes do not hold what the human drove, which SFT imitates; the first "
        f"is {first!r}. Import metric caches together with their logs."
    )


@torch.no_grad()
def heldout_loss(
    policy: Policy, scenes: Sequence[Scene], features: FeatureCache, mask_order: str, ranks: Ranks | None = None
) -> float:
    """Mean masked-diffusion loss on the human plans of `scenes`, nats per token, with the same masks at every call.

    Args:
        policy: Holds all weights. Put into evaluation mode.
        scenes: Only those of one part are held at a time.
        features: Cache of network inputs.
        mask_order: As in training.
        ranks: Processes that share the work; all of them get the result.
    """
    policy.eval()
    ranks = ranks or Ranks()
    starts = range(0, len(scenes), HELDOUT_SCENES)
    sums = {}
    for start in starts[ranks.index :: ranks.count]:
        part = [scenes[i] for i in range(start, min(start + HELDOUT_SCENES, len(scenes)))]
        context = policy.encode(features.batch(policy, part))
        generator = torch.Generator(device=policy.device).manual_seed(start)
        rows = _targets(policy, part).to(policy.device).repeat_interleave(HELDOUT_MASKS, dim=0)
        losses = policy.process.sft_loss(policy, rows, context, mask_order, generator)
        sums[start] = float(losses.sum()) / HELDOUT_MASKS
    everybody = {start: value for found in ranks.gather(sums) for start, value in found.items()}
    return sum(everybody[start] for start in starts) / len(scenes)


def sft_step(
    engine: TrainingEngine, scenes: Sequence[Scene], settings: SftSettings, step: int, features: FeatureCache
) -> Measures:
    """One optimizer step on `scenes`; returns the same measures on every process.

    A micro-batch's loss is a mean over its rows and its routers' tokens, weighed by its share of the scenes.

    Raises:
        TrainingError: The loss is not finite; on all processes alike.
    """
    engine.policy.train()
    parts = settings.micro_batches()
    measured: dict[int, Measures] = {}
    for turn in engine.turns(range(len(parts))):
        number = turn.part
        part, key = scenes[parts[number]], _key(settings.seed, step, number)
        weight = len(part) / len(scenes)
        # A batch in one piece goes on with torch's own generator, which checkpoints keep.
        with _dropout(key if len(parts) > 1 else None, engine.policy.device):
            loss, found = engine.forward(functools.partial(_loss, part, settings, features, key))
            engine.backward(loss * weight)
        if turn.counts:
            measured[number] = {name: value * weight for name, value in found.items()}
    everybody = {number: found for one in engine.ranks.gather(measured) for number, found in one.items()}
    total = {name: sum(everybody[number][name] for number in range(len(parts))) for name in everybody[0]}
    loss_value = total.pop("loss")
    if not math.isfinite(loss_value):
        raise TrainingError(f"The SFT loss is {loss_value} at step {step}; lower sft.learning_rate.")
    norm = engine.step(settings.max_grad_norm)
    return total | {"optim/grad_norm": float(norm), "optim/learning_rate": engine.optimizer.param_groups[0]["lr"]}


def _loss(
    scenes: Sequence[Scene], settings: SftSettings, features: FeatureCache, key: int, policy: Policy
) -> tuple[Tensor, Measures]:
    """Loss of a micro-batch, and what it consists of; masks and mirroring are functions of `key`."""
    generator = torch.Generator(device=policy.device).manual_seed(key)
    batch, tokens = features.batch(policy, scenes), _targets(policy, scenes).to(policy.device)
    if settings.mirror:
        flip = torch.rand(len(scenes), generator=generator, device=policy.device) < 0.5
        batch = mirror_batch(batch, flip)
        tokens = torch.where(flip[:, None], policy.tokenizer.mirror(tokens), tokens)
    record = RouterRecord()
    context = policy.encode(batch)
    rows = tokens.repeat_interleave(MASKS, dim=0)
    nll = policy.process.sft_loss(policy, rows, context, settings.mask_order, generator, record).mean()
    balance, z = record.balance_loss(), record.z_loss()
    loss = nll + settings.load_balance_coef * balance + settings.router_z_coef * z
    return loss, {
        "loss": float(loss.detach()),
        "loss/train": float(nll.detach()),
        "moe/balance": float(balance.detach()),
        "moe/router_z": float(z.detach()),
        "moe/load_cv": record.load_cv(),
        "moe/dropped_frac": record.dropped_frac(),
    }


def _key(seed: int, step: int, number: int) -> int:
    """Seed of a micro-batch's random numbers."""
    if number == 0:
        return seed * 1_000_003 + step
    digest = hashlib.blake2b(f"{seed}/{step}/{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # torch takes 63 bits


@contextmanager
def _dropout(key: int | None, device: torch.device) -> Iterator[None]:
    """Let dropout draw numbers keyed by `key`, and give torch's generators back as they were; None changes nothing."""
    if key is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(key)
        yield
