"""Evidence bounds from both sides (SPG, 2510.09541): push good rollouts by a lower, bad ones by an upper bound.

With p the probability over uniformly random orders and ``q_i = p(y_i | what is known when i is revealed)``:

    lower   sum_i E[log q_i]                      the evidence lower bound, for A >= 0
    upper   sum_i (1/beta) log E[q_i^beta]        with SPG's weights w(t) 1[i hidden] = L/l, which add up to 1
    mix     MIX * upper + (1 - MIX) * lower       for A < 0

Both expectations are over the states in which i is hidden: ``E[(L/l) 1(i in m) f(m)]`` with ``l ~ U{1..L}``, so the
upper bound needs no constant here. By Hölder ``E[prod q_i] <= prod E[q_i^L]^(1/L)``, so it holds for ``beta >= L``; for
smaller beta (SPG trains with 1.5) it can lie below log p where tokens are strongly coupled: SPG's proof leaves a
constant out there, which does not depend on the weights. With a few draws, logarithms of averages lie below the
average's logarithm, so that the estimate is lower than the bound it estimates.

There is no ratio in this: bounds of new and old weights do not divide into one. Train on-policy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_drive.errors import DataError
from rlhf_drive.likelihood.base import Probes
from rlhf_drive.likelihood.elbo import elbo_likelihood
from rlhf_drive.likelihood.probes import ProbeLikelihood, weighted_sum

__all__ = ["BETA", "MIX", "sandwich", "sandwich_likelihood", "upper_bound"]

BETA = 1.5
"""Order of the upper bound in SPG's experiments."""
MIX = 0.5
"""Share of the upper bound where the advantage is negative, as in SPG's experiments."""


def sandwich_likelihood(draws: int, antithetic: bool = False) -> ProbeLikelihood:
    """The bounds from `draws` masks of :func:`~rlhf_drive.likelihood.elbo.elbo_likelihood`.

    Raises:
        ConfigError: An odd number of masks cannot be paired.
    """
    elbo = elbo_likelihood(draws, antithetic)
    return ProbeLikelihood("sandwich", elbo.shape, elbo.make, combine=sandwich, has_ratio=False)


def sandwich(logp: Tensor, probes: Probes) -> Tensor:
    """``[P, N, L]`` to ``[N, L]``: the lower bound, or the mixture in rows of negative advantage."""
    if probes.negative is None:
        raise DataError(
            "The sandwich likelihood bounds rollouts by the sign of their advantage; set Probes.negative first."
        )
    lower = weighted_sum(logp, probes)
    mixed = MIX * upper_bound(logp, probes, BETA) + (1.0 - MIX) * lower
    return torch.where(probes.negative[:, None], mixed, lower)


def upper_bound(logp: Tensor, probes: Probes, beta: float) -> Tensor:
    """``(1/beta) log sum_p weight * exp(beta * logp)`` per token; 0 for a token that no probe scores.

    Args:
        logp: ``[P, N, L]``.
        probes: Their weights, with expectation 1 over the draws.
        beta: Order, at least 1; a bound for certain from L on.
    """
    counted = probes.weight > 0
    terms = (beta * logp + probes.weight.clamp(min=1e-30).log()).masked_fill(~counted, -torch.inf)
    covered = counted.any(dim=0)
    return torch.where(covered, terms.logsumexp(dim=0) / beta, 0.0)
