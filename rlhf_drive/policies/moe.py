"""Sparse mixture of experts: token-choice top-k routing with a shared expert, and what must be watched about it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["RouterRecord", "SparseMoE"]


@dataclass
class RouterRecord:
    """Each MoE layer's routing during one forward pass: noted for losses and metrics, or replayed."""

    logits: list[Tensor] = field(default_factory=list)
    """Per layer ``[n, E]`` float32 router logits."""
    chosen: list[Tensor] = field(default_factory=list)
    """Per layer ``[n, k]`` expert indices."""
    replay: Tensor | None = None
    """``[N, layers, A]`` choices of an earlier pass over the same N rows, to be used instead of the live ones; gates
    are computed from the live router logits."""
    rows: int = 0
    """N, rows of the pass; set by the first layer."""

    def choices(self) -> Tensor:
        """``[N, layers, A]`` int16: the routing of this pass, in the form that `replay` takes. A is ``L * k``."""
        return torch.stack([chosen.view(self.rows, -1) for chosen in self.chosen], dim=1).to(torch.int16)

    def load(self, layer: int) -> Tensor:
        """``[E]`` share of the layer's token slots that each expert received."""
        experts = self.logits[layer].shape[-1]
        counts = torch.bincount(self.chosen[layer].flatten(), minlength=experts).float()
        return counts / counts.sum()

    def balance_loss(self) -> Tensor:
        """Load-balance loss ``E * sum_e f_e P_e`` (Switch Transformer eq. 4), mean over layers; 1 when balanced."""
        losses = [
            logits.shape[-1] * (self.load(i) * logits.softmax(dim=-1).mean(dim=0)).sum()
            for i, logits in enumerate(self.logits)
        ]
        return torch.stack(losses).mean()

    def z_loss(self) -> Tensor:
        """Router z-loss ``mean(logsumexp(logits)^2)`` (ST-MoE eq. 5), mean over layers."""
        return torch.stack([logits.logsumexp(dim=-1).square().mean() for logits in self.logits]).mean()

    def load_cv(self) -> float:
        """Coefficient of variation of expert load, mean over layers; 0 when balanced, ``sqrt(E-1)`` when collapsed."""
        loads = torch.stack([self.load(i) for i in range(len(self.logits))])
        return float((loads.std(dim=-1, correction=0) / loads.mean(dim=-1)).mean())

    def flips(self, old: RouterRecord) -> float:
        """Share of token slots whose expert the same token did not have in an earlier pass."""
        moved = [
            1.0 - (new[:, :, None] == before[:, None, :]).any(dim=-1).float().mean()
            for new, before in zip(self.chosen, old.chosen, strict=True)
        ]
        return float(torch.stack(moved).mean())


class SparseMoE(nn.Module):
    """``shared(x) + sum over the top-k experts of gate_e(x) expert_e(x)``; gates are a softmax over the chosen logits.

    The routing of a token depends on that token alone, so a sample's probability does not depend on its batch mates.
    """

    def __init__(self, dim: int, hidden: int, experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.router = nn.Linear(dim, experts, bias=False)
        self.up = nn.Parameter(torch.empty(experts, dim, hidden))
        self.down = nn.Parameter(torch.empty(experts, hidden, dim))
        self.shared = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        for weight in (self.up, self.down):
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)

    def forward(self, x: Tensor, record: RouterRecord | None = None) -> Tensor:
        """``[N, L, dim]`` (or ``[n, dim]``) to the same; appends this layer's routing to `record`."""
        shape, rows = x.shape, len(x)
        x = x.flatten(0, -2)
        logits = self.router(x).float()
        value, chosen = logits.topk(self.top_k, dim=-1)
        if record is not None:
            record.rows = rows
            record.logits.append(logits)
            record.chosen.append(chosen)
        gate = value.softmax(dim=-1).to(x.dtype)
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
