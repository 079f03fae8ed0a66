"""How a network is told the process time: how much of a noisy plan is to be believed."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["TimeConditioning"]


class TimeConditioning(nn.Module):
    """``x * (1 + scale(t)) + shift(t)``, both from a small MLP on sines and cosines of t; the identity at first."""

    CYCLES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
    """Periods in t from 0 to 1; the lowest tells 0 from 1."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(2 * len(self.CYCLES), dim)
        self.out = nn.Linear(dim, 2 * dim)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Embeddings ``[N, L, d]`` at times ``[N]``, to the same shape."""
        phase = 2.0 * torch.pi * time[:, None].float() * torch.tensor(self.CYCLES, device=time.device)
        features = torch.cat([phase.sin(), phase.cos()], dim=-1).to(self.hidden.weight.dtype)
        scale, shift = self.out(functional.gelu(self.hidden(features)))[:, None].chunk(2, dim=-1)
        return x * (1.0 + scale) + shift
