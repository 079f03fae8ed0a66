"""What a sampler did, step by step: enough to recompute the probability of its samples exactly."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

__all__ = ["DecodeTrace"]

ROW_FIELDS = ("state", "action", "scored", "logp", "experts")


@dataclass(frozen=True)
class DecodeTrace:
    """K decode steps of N rollouts of L tokens; the likelihood sums ``log p(action | state_k)`` over scored (k, l).

    For masked diffusion `action` is the token revealed at that step; every position is scored once. For discrete
    flow it is the end point ``x1`` drawn at that step, and every position is scored at every step. For an
    autoregressive policy it is the next token. Example: with K = 2, L = 2 in causal order,
    ``scored[0] = [[1, 0]]``, ``scored[1] = [[0, 1]]``.
    """

    state: Tensor
    """``[K, N, L]`` long: tokens before step k; the mask token is ``vocab_size``."""
    action: Tensor
    """``[K, N, L]`` long: the token drawn at step k; arbitrary where not scored."""
    scored: Tensor
    """``[K, N, L]`` bool: positions whose draw belongs to the probability of the rollout."""
    time: Tensor
    """``[K]`` float: process time before step k; for masked diffusion the share of positions already revealed."""
    logp: Tensor
    """``[K, N, L]`` float32: behaviour log-probability of each scored draw, 0 elsewhere."""
    temperature: float
    """Softmax temperature the draws were made with; 0 means greedy (no likelihood)."""
    top_k: int
    """Support of each draw: the k most probable tokens; 0 means all."""
    order: str
    """Decoding order."""
    seed: int
    """Seed that keys the row's random numbers."""
    weight_version: int
    """Version of the weights that sampled."""
    experts: Tensor | None = None
    """``[K, N, layers, A]`` integers: the routing of each state's forward pass, as `RouterRecord.choices` gives it;
    with `prefix`, ``[1, N, layers, A]`` of the finished plan's. A likelihood replays it where it is there; None lets
    the live router choose."""
    prefix: bool = False
    """Whether state k is the finished plan cut off before its scored positions, and the network causal, so that one
    forward over the finished plan gives the logits of all K steps (autoregressive policies)."""

    def __len__(self) -> int:
        return int(self.state.shape[1])

    @property
    def tokens(self) -> Tensor:
        """``[N, L]`` the finished tokens: the last scored action of each position."""
        last = len(self.scored) - 1 - self.scored.flip(0).int().argmax(dim=0)
        return self.action.gather(0, last[None])[0]

    def rows(self, index: Tensor) -> DecodeTrace:
        """The trace of the rollouts in `index` (long or bool ``[N]``)."""
        values = {name: getattr(self, name) for name in ROW_FIELDS}
        parts: dict[str, Any] = {name: value[:, index] for name, value in values.items() if value is not None}
        return replace(self, **parts)

    def to(self, device: torch.device) -> DecodeTrace:
        """The same trace with its tensors on `device`."""
        values = {name: getattr(self, name) for name in (*ROW_FIELDS, "time")}
        return replace(self, **{name: value.to(device) for name, value in values.items() if value is not None})

    @staticmethod
    def concatenate(traces: list[DecodeTrace]) -> DecodeTrace:
        """Rows of several traces that share K, L and decoding settings, one after the other."""
        joined: dict[str, Any] = {
            name: torch.cat([getattr(trace, name) for trace in traces], dim=1)
            for name in ROW_FIELDS
            if getattr(traces[0], name) is not None
        }
        return replace(traces[0], **joined)
