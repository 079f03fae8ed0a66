"""What a decoding process needs of a network, and what the rest of the project needs of a process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from rlhf_drive.errors import ConfigError, did_you_mean
from rlhf_drive.policies.moe import RouterRecord
from rlhf_drive.policies.trace import DecodeTrace

__all__ = ["DECODE_ORDERS", "Decoding", "Denoiser", "Process"]

DECODE_ORDERS = ("causal", "reverse_causal", "random", "confidence", "all")
"""Orders in which positions are decided; `all` decides every position at every step (discrete flow). None depends on a
sampled token's own probability: with such an order (LLaDA's `low_confidence`) the product of probabilities is not a
probability, so it cannot be trained on."""


@dataclass(frozen=True)
class Decoding:
    """How to sample. Example: ``Decoding(steps=8, order="causal", temperature=1.0, top_k=0)``."""

    steps: int
    """K: decode steps. 1 … L of a masked policy, whose positions are spread over them as evenly as possible; L of an
    autoregressive one; any number of a flow."""
    order: str
    """One of `DECODE_ORDERS`."""
    temperature: float
    """Softmax temperature; 0 takes the most probable token (evaluation only)."""
    top_k: int
    """Draw among the k most probable tokens; 0 means all."""

    def __post_init__(self) -> None:
        if self.order not in DECODE_ORDERS:
            hint = did_you_mean(self.order, DECODE_ORDERS)
            if self.order == "low_confidence":
                hint = (
                    "It ranks positions by the sampled token's own confidence, so the product of probabilities is not "
                    "a probability; use 'confidence' (ranks by the state's logits) or another of: "
                    f"{', '.join(DECODE_ORDERS)}."
                )
            raise ConfigError(f"Unknown decoding order {self.order!r}. {hint}")
        if self.steps < 1 or self.temperature < 0 or self.top_k < 0:
            raise ConfigError(f"Decoding needs steps >= 1, temperature >= 0 and top_k >= 0; got {self}.")


class Denoiser(Protocol):
    """A network that predicts tokens given a partly decided plan and a scene context.

    Two stages, so that a likelihood can hold ``[M, F]`` features for the backward pass instead of ``[M, V]`` logits.
    """

    @property
    def vocab_size(self) -> int:
        """V: numeric tokens; ids ``0 … V-1``, and V is the mask token."""

    def action_features(
        self, state: Tensor, time: Tensor, context: Any, where: Tensor, record: RouterRecord | None = None
    ) -> Tensor:
        """What the head reads at the positions in `where` only.

        Args:
            state: ``[N, L]`` long, rows scene-major: N is a multiple of the context's S scenes.
            time: ``[N]`` float, process time of each row.
            context: What ``encode`` returned for the S scenes; shared by the ``N // S`` rows of each scene.
            where: ``[N, L]`` bool.
            record: Takes the routing of this pass, or holds the one to be replayed.

        Returns:
            ``[where.sum(), F]`` in the order of ``where.nonzero()``.
        """

    def logits(self, features: Tensor) -> Tensor:
        """``[M, F]`` features to ``[M, V]`` float32 logits; rows do not depend on each other."""

    def action_logits(
        self, state: Tensor, time: Tensor, context: Any, where: Tensor, record: RouterRecord | None = None
    ) -> Tensor:
        """``logits(action_features(...))``, ``[where.sum(), V]``."""


class Process(Protocol):
    """How plans are corrupted for supervised training and decoded for rollouts. Implementations are frozen."""

    @property
    def name(self) -> str:
        """Name in recipes and checkpoints."""

    @property
    def causal(self) -> bool:
        """Whether the network's position l may see tokens before l only."""

    @property
    def timed(self) -> bool:
        """Whether the network must be told the process time: a masked plan tells its own, a noisy one does not."""

    def options(self) -> Mapping[str, float]:
        """Numbers that the process was built with, by recipe key."""

    def uniforms_shape(self, length: int, decoding: Decoding) -> tuple[int, ...]:
        """Shape of the uniform numbers one row needs."""

    def check(self, length: int, decoding: Decoding) -> None:
        """ConfigError where the process cannot decode so."""

    def sample(
        self,
        denoiser: Denoiser,
        context: Any,
        uniforms: Tensor,
        decoding: Decoding,
        *,
        seed: int = 0,
        weight_version: int = 0,
        keep_experts: bool = False,
    ) -> DecodeTrace:
        """One plan per row of `uniforms` ``[N, *uniforms_shape]``; `keep_experts` notes the routing in the trace."""

    def sft_loss(
        self,
        denoiser: Denoiser,
        tokens: Tensor,
        context: Any,
        order: str,
        generator: torch.Generator,
        record: RouterRecord | None = None,
    ) -> Tensor:
        """``[N]`` nats per token of the plans ``[N, L]``."""
