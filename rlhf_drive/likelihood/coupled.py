"""Coupled masks (DiffuCoder, 2506.20639): every token is scored under a mask and its complement.

``log p(y_i) ~ 1/2 [l_i(all masked) + w_i l_i(own)]`` with ``t ~ U(0.2, 0.8)``, mask ``m ~ Bernoulli(t)`` and its
complement; a token's own copy is the one of the two that hides it, ``w = 1/t`` for the mask and ``1/(1-t)`` for the
complement. Each token is scored in every draw, so that none goes without a gradient.

Coupling keeps the mean: mask and complement are equally distributed, since t and 1-t are. But the weights of one token
have mean 2, not 1, so the estimate over-scales log-ratios by about 1.5, and a clip range with them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_drive.likelihood.base import Probes
from rlhf_drive.likelihood.probes import ProbeLikelihood

__all__ = ["T_RANGE", "coupled_likelihood", "coupled_probes"]

T_RANGE = (0.2, 0.8)
"""Range of the share of hidden tokens."""


def coupled_likelihood(draws: int) -> ProbeLikelihood:
    """The estimator that averages `draws` coupled pairs; ``1 + 2 * draws`` copies of each plan."""
    return ProbeLikelihood("coupled", lambda length: (draws, 1 + length), coupled_probes)


def coupled_probes(uniforms: Tensor) -> Probes:
    """All hidden, then the pairs' masks, then their complements.

    Args:
        uniforms: ``[N, draws, 1 + L]``: each pair's t, then each position's number.
    """
    low, high = T_RANGE
    u = uniforms.transpose(0, 1)
    t = low + (high - low) * u[..., :1]
    mask = u[..., 1:] < t
    full = torch.ones_like(mask[:1])
    half = torch.full_like(u[:1, :, 1:], 0.5)
    share = 0.5 / len(mask)
    return Probes(
        hidden=torch.cat([full, mask, ~mask]),
        weight=torch.cat([half, share * mask / t, share * ~mask / (1.0 - t)]),
    )
