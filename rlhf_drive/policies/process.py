"""What a decoding process needs of a network, and what the rest of the project needs of a process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from rlhf_drive.errors import ConfigError, did_you_mean

__all__ = ["DECODE_ORDERS", "Decoding", "Denoiser"]

DECODE_ORDERS = ("causal", "reverse_causal", "random", "confidence")
"""Orders in which positions are revealed. None depends on a sampled token's own probability: with such an order
(LLaDA's `low_confidence`) the product of probabilities is not a probability, so it cannot be trained on."""


@dataclass(frozen=True)
class Decoding:
    """How to sample. Example: ``Decoding(steps=8, order="causal", temperature=1.0, top_k=0)``."""

    steps: int
    """K: decode steps, 1 … L; positions are spread over them as evenly as possible."""
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
    """A network that predicts tokens at masked positions given a partly revealed plan and a scene context."""

    @property
    def vocab_size(self) -> int:
        """V: numeric tokens; ids ``0 … V-1``, and V is the mask token."""

    def action_logits(self, state: Tensor, time: Tensor, context: Any, where: Tensor) -> Tensor:
        """Logits at the positions in `where` only.

        Args:
            state: ``[N, L]`` long, rows scene-major: N is a multiple of the context's S scenes.
            time: ``[N]`` float, process time of each row.
            context: What ``encode`` returned for the S scenes; shared by the ``N // S`` rows of each scene.
            where: ``[N, L]`` bool.

        Returns:
            ``[where.sum(), V]`` float32 in the order of ``where.nonzero()``.
        """
