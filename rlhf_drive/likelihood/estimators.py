"""Likelihood estimators by the name that recipes use."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from rlhf_drive.errors import UnknownNameError, did_you_mean
from rlhf_drive.likelihood.base import LikelihoodEstimator
from rlhf_drive.likelihood.coupled import coupled_likelihood
from rlhf_drive.likelihood.elbo import elbo_likelihood
from rlhf_drive.likelihood.marginal import MarginalLikelihood
from rlhf_drive.likelihood.mean_field import MeanFieldLikelihood
from rlhf_drive.likelihood.random_mask import random_mask_likelihood
from rlhf_drive.likelihood.sandwich import sandwich_likelihood
from rlhf_drive.likelihood.trace import TraceLikelihood

__all__ = ["ESTIMATORS", "make_likelihood"]

ESTIMATORS: Mapping[str, Callable[..., LikelihoodEstimator]] = {
    "trace": lambda draws, antithetic: TraceLikelihood(),
    "marginal": lambda draws, antithetic: MarginalLikelihood(),
    "mean_field": lambda draws, antithetic: MeanFieldLikelihood(),
    "coupled": lambda draws, antithetic: coupled_likelihood(draws),
    "elbo": elbo_likelihood,
    "random_mask": lambda draws, antithetic: random_mask_likelihood(draws),
    "sandwich": sandwich_likelihood,
}
"""``factory(draws, antithetic)`` by name; estimators without draws ignore both."""


def make_likelihood(name: str, *, draws: int = 1, antithetic: bool = False) -> LikelihoodEstimator:
    """The estimator called `name`.

    Args:
        name: A key of `ESTIMATORS`.
        draws: Probes a Monte-Carlo estimator averages over.
        antithetic: Whether probes come in complementary pairs.

    Raises:
        UnknownNameError: There is no such estimator.
    """
    if name not in ESTIMATORS:
        raise UnknownNameError(f"Unknown likelihood {name!r}. {did_you_mean(name, ESTIMATORS)}")
    return ESTIMATORS[name](draws, antithetic)
