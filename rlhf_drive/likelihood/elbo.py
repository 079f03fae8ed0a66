"""Evidence lower bound of a masked-diffusion model by Monte Carlo (ESPO, 2512.03759; LLaDA, 2502.09992).

``log p(y) >= sum_{l=1..L} (1/l) E_{|m|=l} S(m)``, ``S(m) = sum_{i in m} log p(y_i | y outside m)``, where p is the
probability over uniformly random orders. The estimate ``mean_j (L / l_j) S(m_j)`` with ``l_j ~ U{1..L}`` is unbiased
for the bound.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_drive.errors import ConfigError
from rlhf_drive.likelihood.base import Probes
from rlhf_drive.likelihood.masks import hide_some
from rlhf_drive.likelihood.probes import ProbeLikelihood

__all__ = ["antithetic_probes", "elbo_likelihood", "elbo_probes"]


def elbo_likelihood(draws: int, antithetic: bool = False) -> ProbeLikelihood:
    """The estimator that averages `draws` masks, in complementary pairs if `antithetic`.

    Raises:
        ConfigError: An odd number of masks cannot be paired.
    """
    if not antithetic:
        return ProbeLikelihood("elbo", lambda length: (draws, 1 + length), elbo_probes)
    if draws % 2:
        raise ConfigError(
            f"rl.likelihood_draws {draws} cannot be paired; with rl.likelihood_antithetic it must be even."
        )
    return ProbeLikelihood("elbo", lambda length: (draws // 2, 1 + length), antithetic_probes)


def elbo_probes(uniforms: Tensor) -> Probes:
    """Independent masks, each position in one weighed ``L / l / draws``.

    Args:
        uniforms: ``[N, draws, 1 + L]``: each mask's size, then each position's number.
    """
    u = uniforms.transpose(0, 1)
    length = u.shape[-1] - 1
    count = _count(u[..., 0], length)
    hidden = hide_some(u[..., 1:], count)
    weight = length / count.to(u.dtype) / len(u)
    return Probes(hidden=hidden, weight=hidden * weight[..., None])


def antithetic_probes(uniforms: Tensor) -> Probes:
    """Pairs of a mask of l positions and its complement of ``L - l``, so that every pair scores every token once.

    A size s < L comes up as a mask with probability 1/L and as the complement of a mask of ``L - s`` with as much
    again, so each has half the weight, ``L / (2s)``. Size L has no such partner (the complement of nothing is never
    drawn), so it keeps its whole weight, 1. Halving it too would bias the estimate.

    Args:
        uniforms: ``[N, pairs, 1 + L]``: each pair's l, then each position's number.
    """
    u = uniforms.transpose(0, 1)
    length = u.shape[-1] - 1
    count = _count(u[..., 0], length)
    hidden = hide_some(u[..., 1:], count)
    size = count.to(u.dtype)
    weight = torch.where(count == length, 1.0, length / (2.0 * size))[..., None] / len(u)
    other = (length / (2.0 * (length - size).clamp(min=1.0)))[..., None] / len(u)
    return Probes(hidden=torch.cat([hidden, ~hidden]), weight=torch.cat([hidden * weight, ~hidden * other]))


def _count(uniform: Tensor, length: int) -> Tensor:
    """A number in [0, 1) to one of 1 … `length`, all equally likely."""
    return (uniform * length).long().clamp(max=length - 1) + 1
