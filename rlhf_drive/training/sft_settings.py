"""Plain arguments of supervised training."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rlhf_drive.errors import ConfigError

__all__ = ["SftSettings"]


@dataclass(frozen=True)
class SftSettings:
    """Plain arguments of supervised training; a recipe's `sft` section gives them."""

    max_epochs: int
    """Length of the learning-rate schedule; training may stop earlier, see `patience`."""
    batch_size: int
    """Scenes a step."""
    micro_batch_scenes: int
    """Scenes per backward pass; 0 takes the batch at once. Masks, mirroring, dropout and the routers' losses are those
    of a micro-batch, so its size changes numbers; how many processes share the micro-batches does not."""
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

    def micro_batches(self) -> list[slice]:
        """The parts of a step's batch, in order. Example: 5 scenes by 2 are ``[0:2, 2:4, 4:5]``."""
        size = self.micro_batch_scenes or self.batch_size
        return [slice(at, min(at + size, self.batch_size)) for at in range(0, self.batch_size, size)]

    def check_processes(self, processes: int) -> None:
        """Refuse more processes than micro-batches: some would have nothing to do.

        Raises:
            ConfigError: What to set instead.
        """
        parts = len(self.micro_batches())
        if parts >= processes:
            return
        size, most = self.micro_batch_scenes, self.batch_size // processes
        how = f"Set sft.micro_batch_scenes to {most} or less" if most else "Raise sft.batch_size"
        raise ConfigError(
            f"sft.micro_batch_scenes is {size}{'' if size else ' (the whole batch)'}: the {self.batch_size} scenes of "
            f"a step make {math.ceil(self.batch_size / (size or self.batch_size))} micro-batch{'es'[: 2 * (parts > 1)]}"
            f", too few for {processes} processes. {how}, or start fewer processes."
        )
