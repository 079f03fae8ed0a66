"""The decoding processes a policy can be trained and sampled with, by the name that recipes and checkpoints use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from rlhf_drive.errors import UnknownNameError, did_you_mean
from rlhf_drive.policies import masked
from rlhf_drive.policies.trace import DecodeTrace

__all__ = ["PROCESSES", "Process", "process_named"]


@dataclass(frozen=True)
class Process:
    """How plans are corrupted for supervised training and decoded for rollouts."""

    name: str
    """Name in recipes and checkpoints."""
    sample: Callable[..., DecodeTrace]
    """``(denoiser, context, uniforms, decoding, *, seed, weight_version) -> DecodeTrace``."""
    sft_loss: Callable[..., Tensor]
    """``(denoiser, tokens, context, order, generator) -> [N]`` nats per token."""


PROCESSES = {"masked": Process("masked", masked.sample, masked.sft_loss)}
"""Processes by name."""


def process_named(name: str) -> Process:
    """The process called `name`; UnknownNameError with a suggestion otherwise."""
    if name not in PROCESSES:
        raise UnknownNameError(f"Unknown decoding process {name!r}. {did_you_mean(name, PROCESSES)}")
    return PROCESSES[name]
