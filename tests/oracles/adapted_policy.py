"""A small policy, and adapters on it that have learned something."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from oracles.tiny_policy import ARCHITECTURE, observation
from rlhf_drive.policies import Architecture, LoraSettings, Policy, TrajectoryTokenizer, add_lora
from rlhf_drive.policies.adapters import adapter_state
from rlhf_drive.policies.moe import RouterRecord

SETTINGS = LoraSettings(rank=4, alpha=6.0, experts=True)
TOKENIZER = TrajectoryTokenizer("displacements", -5.0, 15.0, 0.5)
STATE = torch.randint(0, TOKENIZER.vocab_size + 1, (6, 16), generator=torch.Generator().manual_seed(0))


def make(
    seed: int = 3, architecture: Architecture = ARCHITECTURE, tokenizer: TrajectoryTokenizer = TOKENIZER,
    process: str = "masked",
) -> Policy:  # fmt: skip
    torch.manual_seed(seed)
    return Policy(architecture, tokenizer, process).eval()


BASE = make()
BATCH = BASE.batch([observation(0), observation(1, agents=2)])


def move(policy: Policy) -> Policy:
    """The policy, its adapters moved at random as training might move them."""
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for factor in adapter_state(policy).values():
            factor.add_(0.1 * torch.randn(factor.shape, generator=generator))
    return policy


def adapted(settings: LoraSettings = SETTINGS) -> Policy:
    """The base with adapters that have learned something."""
    return move(add_lora(copy.deepcopy(BASE), settings, seed=5))


def logits(policy: Policy, record: RouterRecord | None = None) -> Tensor:
    """``[6, 16, V]`` logits of partly hidden plans."""
    everywhere = torch.ones_like(STATE, dtype=torch.bool)
    return policy.action_logits(STATE, torch.zeros(6), policy.encode(BATCH), everywhere, record).view(6, 16, -1)


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)
