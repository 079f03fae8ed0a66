"""Sparse mixture of experts: token-choice top-k routing with a shared expert, and what must be watched about it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from rlhf_drive.policies.router_record import RouterRecord

__all__ = ["RouterRecord", "SparseMoE"]


class SparseMoE(nn.Module):
    """``shared(x) + sum over the top-k experts of gate_e(x) expert_e(x)``; gates are a softmax over the chosen logits.

    The routing of a token depends on that token alone, so a sample's probability does not depend on its batch mates.
    """

    def __init__(self, dim: int, hidden: int, experts: int, top_k: int, *, layer: int = 0) -> None:
        """An MoE block; `layer` is its place among those that share a record."""
        super().__init__()
        self.top_k, self.layer = top_k, layer
        self.router = nn.Linear(dim, experts, bias=False)
        self.up = nn.Parameter(torch.empty(experts, dim, hidden))
        self.down = nn.Parameter(torch.empty(experts, hidden, dim))
        self.shared = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        for weight in (self.up, self.down):
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)

    def _logits(self, x: Tensor) -> Tensor:
        """``[n, E]`` router logits, at least in float32 whatever the dtype of the weights or of autocast."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return functional.linear(x.to(dtype), self.router.weight.to(dtype))

    def forward(self, x: Tensor, record: RouterRecord | None = None) -> Tensor:
        """``[N, L, dim]`` (or ``[n, dim]``) to the same; notes this layer's routing in `record`, or replays it."""
        shape, rows = x.shape, len(x)
        x = x.flatten(0, -2)
        logits = self._logits(x)
        chosen = None if record is None else record.earlier(self.layer, (len(x), self.top_k), rows)
        if chosen is None:
            chosen = logits.detach().topk(self.top_k, dim=-1).indices
        if record is not None:
            record.note(self.layer, logits, chosen, rows)
        gate = logits.gather(1, chosen).softmax(dim=-1).to(x.dtype)
        # Sort the (token, expert) pairs once, then every expert works on one contiguous slice. The gradient of indexing
        # adds a token's k parts in an order that threads race for; that of index_select adds them in one order.
        expert, order = chosen.flatten().sort(stable=True)
        token = order // self.top_k
        sizes = torch.bincount(expert, minlength=len(self.up)).tolist()
        pieces = []
        for e, piece in enumerate(x.index_select(0, token).split(sizes)):
            if sizes[e]:
                pieces.append(functional.gelu(piece @ self.up[e]) @ self.down[e])
        routed = torch.cat(pieces) * gate.flatten()[order, None]
        return (self.shared(x) + torch.zeros_like(x).index_add(0, token, routed)).view(shape)
