"""Policy and optimizer of a training run: forward, backward and step, on one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor

from rlhf_drive.policies import Policy
from rlhf_drive.training.ranks import Ranks

__all__ = ["EngineState", "TrainingEngine"]

T = TypeVar("T")


@dataclass(frozen=True)
class EngineState:
    """Weights and optimizer as one process would hold them, on the CPU; the same for any number of processes."""

    weights: Mapping[str, Tensor]
    """The policy's state dict, whole."""
    optimizer: Mapping[str, Any]
    """``optimizer.state_dict()``, whole: `state` by parameter number, and `param_groups`."""


class TrainingEngine:
    """Owns the optimizer of a policy and runs its forward and backward passes.

    All that depends on how weights and gradients are spread over processes is in here. A step reads::

        for part in engine.share(micro_batches):
            loss = engine.forward(lambda policy: loss_of(policy, part))
            engine.backward(loss)
        engine.step(max_norm)

    Every loss is its micro-batch's *share* of the batch's loss (denominators are global): gradients are summed over
    micro-batches and processes, never averaged.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        learning_rate: float,
        weight_decay: float,
        betas: tuple[float, float] = (0.9, 0.999),
        accelerator: Accelerator,
        ranks: Ranks | None = None,
    ) -> None:
        self.policy, self.accelerator, self.ranks = policy, accelerator, ranks or Ranks()
        self.parameters = [p for p in policy.parameters() if p.requires_grad]
        """Those that are trained."""
        self.optimizer = torch.optim.AdamW(self.parameters, lr=learning_rate, weight_decay=weight_decay, betas=betas)

    def share(self, parts: Sequence[T]) -> list[T]:
        """The micro-batches of this process: every `count`-th, so that all have as many to within one."""
        return list(parts[self.ranks.index :: self.ranks.count])

    def forward(self, function: Callable[[Policy], T]) -> T:
        """``function(policy)``, with the weights in place that it needs; gradients flow through it."""
        return function(self.policy)

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's gradients."""
        self.accelerator.backward(loss)

    def set_learning_rate(self, value: float) -> None:
        """For the next step."""
        for group in self.optimizer.param_groups:
            group["lr"] = value

    def state(self) -> EngineState | None:
        """What a checkpoint keeps; on the main process, None on the others. All processes must call it."""
        return EngineState(dict(self.policy.state_dict()), self.optimizer.state_dict())

    def restore(self, state: EngineState) -> None:
        """Go on from :meth:`state`, of a run with any number of processes; every process gets the whole state."""
        self.policy.load_state_dict(dict(state.weights))
        self.optimizer.load_state_dict(dict(state.optimizer))

    def whole_policy(self) -> Policy:
        """A policy that holds all weights, to publish or to sample from: the live one where it does. Collective."""
        return self.policy
