"""What a sampler did, step by step: enough to recompute the probability of its samples exactly."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

__all__ = ["DecodeTrace"]

ROW_FIELDS = ("state", "action", "scored", "logp")


@dataclass(frozen=True)
class DecodeTrace:
    """K decode steps of N rollouts of L tokens; the likelihood sums ``log p(action | state_k)`` over scored (k, l).

    For masked diffusion `action` is the token revealed at that step; every position is scored exactly once. Example:
    with K = 2, L = 2 in causal order, ``scored[0] = [[1, 0]]``, ``scored[1] = [[0, 1]]``.
    """

    state: Tensor
    """``[K, N, L]`` long: tokens before step k; the mask token is ``vocab_size``."""
    action: Tensor
    """``[K, N, L]`` long: the token drawn at step k; arbitrary where not scored."""
    scored: Tensor
    """``[K, N, L]`` bool: positions whose draw belongs to the probability of the rollout."""
    time: Tensor
    """``[K]`` float: share of positions already revealed before step k."""
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

    def __len__(self) -> int:
        return int(self.state.shape[1])

    @property
    def tokens(self) -> Tensor:
        """``[N, L]`` the finished tokens: each position's scored action."""
        return (self.action * self.scored).sum(dim=0)

    def rows(self, index: Tensor) -> DecodeTrace:
        """The trace of the rollouts in `index` (long or bool ``[N]``)."""
        parts: dict[str, Any] = {name: getattr(self, name)[:, index] for name in ROW_FIELDS}
        return replace(self, **parts)

    @staticmethod
    def concatenate(traces: list[DecodeTrace]) -> DecodeTrace:
        """Rows of several traces that share K, L and decoding settings, one after the other."""
        joined: dict[str, Any] = {
            name: torch.cat([getattr(trace, name) for trace in traces], dim=1) for name in ROW_FIELDS
        }
        return replace(traces[0], **joined)
