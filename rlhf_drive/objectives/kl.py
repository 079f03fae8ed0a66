"""Per-token estimates of a Kullback–Leibler divergence from samples (Schulman, "Approximating KL divergence", 2020).

With ``d = other_logp - logp`` at a token drawn from the policy of `logp`: ``k1 = -d`` is unbiased and can be negative,
``k2 = d^2 / 2`` is biased with low variance, ``k3 = e^d - d - 1`` is unbiased and never negative. Tokens here come from
the behaviour policy, so that all three are exact only at ``theta = old``; TRL takes the same liberty.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["kl_k1", "kl_k2", "kl_k3"]


def kl_k1(logp: Tensor, other_logp: Tensor) -> Tensor:
    """``logp - other_logp`` per token: estimates ``KL(policy || other)``, any shape."""
    return logp - other_logp


def kl_k2(logp: Tensor, other_logp: Tensor) -> Tensor:
    """``(logp - other_logp)^2 / 2`` per token, any shape."""
    return 0.5 * (logp - other_logp).square()


def kl_k3(logp: Tensor, other_logp: Tensor) -> Tensor:
    """``e^d - d - 1`` with ``d = other_logp - logp`` per token; never negative, any shape.

    Example:
        >>> kl_k3(torch.tensor([0.0]), torch.tensor([0.0]))
        tensor([0.])
    """
    difference = other_logp - logp
    return torch.exp(difference) - difference - 1
