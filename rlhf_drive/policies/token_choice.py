"""Token-choice routing: every token takes the k experts it scores highest (Shazeer et al. 1701.06538).

A token's experts depend on that token alone, so a sample's probability does not depend on its batch mates, and no token
is ever dropped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_drive.policies.dispatch import Pairs

__all__ = ["choose", "gates", "pair_up"]


def choose(logits: Tensor, k: int) -> Tensor:
    """``[n, E]`` router logits to the ``[n, k]`` experts of each token."""
    return logits.detach().topk(k, dim=-1).indices


def gates(logits: Tensor, chosen: Tensor) -> Tensor:
    """``softmax over the token's chosen experts of their logits``, ``[n, k]``: they add up to 1.

    Example:
        >>> gates(torch.tensor([[0.0, 9.0, 0.0]]), torch.tensor([[2, 0]]))
        tensor([[0.5000, 0.5000]])
    """
    return logits.gather(-1, chosen).softmax(dim=-1)


def pair_up(chosen: Tensor, gate: Tensor, experts: int) -> Pairs:
    """The ``n * k`` pairs of tokens and experts, and their gates, sorted by expert and then by token."""
    expert, order = chosen.flatten().sort(stable=True)
    counts = torch.bincount(expert, minlength=experts)
    return Pairs(order // chosen.shape[-1], counts, gate.flatten().index_select(0, order))
