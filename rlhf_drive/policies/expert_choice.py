"""Expert-choice routing: every expert takes the tokens that score it highest (Zhou et al. 2202.09368; WAM-Diff).

Load is even by construction, but a token may be taken by many experts or by none, and whether it is taken depends on
the tokens it competes with. Those are the tokens of its own row, one state of one plan, and no others: batch mates,
micro-batch split and padding rows cannot change a sample's probability. Within the row a token's output depends on all
tokens, later ones too, so a causal network cannot be routed this way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_drive.policies.dispatch import Pairs

__all__ = ["capacity", "choose", "gates", "pair_up"]


def capacity(length: int, factor: float) -> int:
    """c, tokens that each expert takes of a row of `length`: ``max(1, round(factor * length))``. A token then gets
    ``E * c / length`` experts on average; WAM-Diff takes a factor of 0.1 with 64 experts.

    Example:
        >>> capacity(16, 0.25)
        4
    """
    return max(1, round(factor * length))


def choose(logits: Tensor, c: int) -> Tensor:
    """``[N, L, E]`` router logits to the positions ``[N, E, c]`` in its own row that each expert takes: those where its
    share of the token's softmax over experts is largest (2202.09368 eq. 2)."""
    return logits.detach().softmax(dim=-1).transpose(1, 2).topk(c, dim=-1).indices


def gates(logits: Tensor, chosen: Tensor) -> Tensor:
    """``softmax over all E experts of the token's logits``, at the chosen positions, ``[N, E, c]``.

    Not renormalised over the experts that took the token (as in 2202.09368): a gate then does not jump when another
    expert takes or drops the token, and a token that few experts want gets little from them.
    """
    return logits.softmax(dim=-1).transpose(1, 2).gather(-1, chosen)


def pair_up(chosen: Tensor, gate: Tensor, length: int) -> Pairs:
    """The ``E * N * c`` pairs of tokens and experts, and their gates, sorted by expert and then by row."""
    rows, experts, c = chosen.shape
    token = chosen + length * torch.arange(rows, device=chosen.device)[:, None, None]
    counts = torch.full((experts,), rows * c, device=chosen.device)
    return Pairs(token.transpose(0, 1).flatten(), counts, gate.transpose(0, 1).flatten())
