"""Losses beside the policy objective: behaviour cloning on the human's plans, and the routers' own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_drive.policies import Policy, SceneContext
from rlhf_drive.policies.moe import RouterRecord
from rlhf_drive.scenes import Scene

__all__ = ["cloning_loss", "has_human", "router_loss"]

MASKS_PER_SCENE = 4
"""Corrupted copies of the human's plan that behaviour cloning looks at."""


def has_human(scene: Scene) -> bool:
    """Whether the scene holds what the human drove."""
    return len(scene.reference.human_poses) > 0


def cloning_loss(
    policy: Policy,
    context: SceneContext,
    scenes: Sequence[Scene],
    order: str,
    *,
    seed: int,
    step: int,
    calls: int = 0,
) -> Tensor:
    """Sum over scenes of the SFT loss on the human's plan, nats per token; scenes without a human add nothing.

    Args:
        policy: The live policy.
        context: The S encoded scenes.
        scenes: S scenes.
        order: Decoding order of the rollouts: cloning hides what this decoder reveals last.
        seed: Keys the masks of a scene, with `step` and the scene's name: they do not depend on the micro-batch.
        step: RL step.
        calls: Times at least that the decoder is run, where processes must run it equally often; what is run in vain
            counts 0 times.
    """
    hidden_last = order if order in ("causal", "reverse_causal") else "random"
    total = context.summary.new_zeros(())
    with_human = [(s, scene) for s, scene in enumerate(scenes) if has_human(scene)]
    for s, scene in with_human:
        tokens = torch.from_numpy(policy.tokenizer.encode(scene.reference.human_poses[None])).to(policy.device)
        key = hashlib.blake2b(f"{seed}/{step}/cloning/{scene.token}".encode(), digest_size=7).digest()
        generator = torch.Generator(device=policy.device).manual_seed(int.from_bytes(key, "little"))
        # A causal policy looks at the whole plan at once: copies of it would all be the same.
        rows = tokens.expand(1 if policy.process.causal else MASKS_PER_SCENE, -1)
        total = total + policy.process.sft_loss(policy, rows, context.scene(s), hidden_last, generator).mean()
    blank = torch.zeros(1, policy.tokenizer.length, dtype=torch.long, device=policy.device)
    for _ in range(calls - len(with_human)):
        generator = torch.Generator(device=policy.device).manual_seed(0)
        loss = policy.process.sft_loss(policy, blank, context.scene(0), hidden_last, generator)
        total = total + 0.0 * loss.mean()
    return total


def router_loss(record: RouterRecord, load_balance_coef: float, router_z_coef: float) -> Tensor:
    """``load_balance_coef * balance + router_z_coef * z`` of one forward pass."""
    return load_balance_coef * record.balance_loss() + router_z_coef * record.z_loss()
