"""The state of an update that can be undone: weights and optimizer, held in memory."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_drive.training.shards import piece

__all__ = ["Snapshot"]


class Snapshot:
    """Trainable weights, buffers and optimizer state at one moment, in memory on their own devices.

    Costs as much memory as those; each process keeps what it holds of them. Random generators are left out: samples
    are keyed by step, and updates draw nothing.
    """

    def __init__(self, policy: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        learned = [p for p in policy.parameters() if p.requires_grad]
        kept = [*learned, *policy.buffers()]
        self._values: list[tuple[Tensor, Tensor]] = [(t, piece(t.detach()).clone()) for t in kept]
        self._state = {p: _cloned(values) for p, values in optimizer.state.items()}
        self._groups = [
            {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back, bit for bit, and drop gradients. May be called again."""
        for tensor, value in self._values:
            piece(tensor).copy_(value)
            tensor.grad = None
        # By hand: load_state_dict would cast the moments to the weights' dtype.
        self._optimizer.state.clear()
        for parameter, values in self._state.items():
            self._optimizer.state[parameter] = _cloned(values)
        for group, values in zip(self._optimizer.param_groups, self._groups, strict=True):
            group.update(copy.deepcopy(values))


def _cloned(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v.detach().clone() if isinstance(v, Tensor) else copy.deepcopy(v) for k, v in values.items()}
