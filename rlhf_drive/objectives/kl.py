"""Estimates of the divergence from the reference policy, per token: as metrics, as a loss, or taken off the reward.

With ``d = other_logp - logp`` at a token drawn from the policy of `logp`, ``k1 = -d`` is unbiased and can be negative,
``k2 = d^2 / 2`` is biased with low variance, ``k3 = e^d - d - 1`` is unbiased and never negative (Schulman,
"Approximating KL divergence", 2020).

An unbiased value does not make an unbiased gradient, since the tokens too depend on the weights. In expectation over
on-policy tokens the gradient of ``k1`` is zero: added to a loss as it is, it makes noise and nothing else. That of
``k2`` is the gradient of ``KL(policy || reference)``; that of ``k3`` the one of ``KL(reference || policy)``. An
importance weight ``w``, which carries gradient, mends the others: ``w k1`` and ``w k3`` have the gradient of
``KL(policy || reference)``, off-policy too (2512.02556).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from rlhf_drive.objectives.settings import ObjectiveSettings

__all__ = ["KL_ESTIMATORS", "KL_PLACES", "KlEstimator", "kl_k1", "kl_k2", "kl_k3", "kl_loss", "reward_penalty"]

KlEstimator = Literal["k1", "k2", "k3"]
KL_ESTIMATORS: tuple[str, ...] = get_args(KlEstimator)
KL_PLACES = ("loss", "reward")


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


_ESTIMATES = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


def kl_loss(
    logp: Tensor, old_logp: Tensor, ref_logp: Tensor, estimator: KlEstimator, weight: Tensor | None = None
) -> Tensor:
    """KL term of the loss per token, with a gradient that pulls towards the reference.

    ``k1`` is always weighted with the token's own ratio ``exp(logp - old_logp)``, because it has no gradient in
    expectation without. `weight` corrects the two others: ``w k3``, as TRL's ``use_bias_correction_kl``, and
    ``sg[w] k2``, whose gradient is right already once the tokens are weighted as the live policy would draw them.

    Args:
        logp: ``[N, T]`` live log-probabilities, finite.
        old_logp: ``[N, T]`` log-probabilities of the policy that sampled, finite.
        ref_logp: ``[N, T]`` log-probabilities of the reference, finite.
        estimator: One of `KL_ESTIMATORS`.
        weight: ``[N, T]`` or ``[N, 1]`` importance weights with gradient; None corrects nothing but ``k1``.
    """
    values = _ESTIMATES[estimator](logp, ref_logp)
    if estimator == "k1":
        return (logp - old_logp).exp() * values
    if weight is None:
        return values
    return (weight.detach() if estimator == "k2" else weight) * values


def reward_penalty(
    old_logp: Tensor, ref_logp: Tensor, mask: Tensor, settings: ObjectiveSettings, weight: Tensor | None = None
) -> Tensor:
    """``beta * sum_t k_t``: what ``kl_in: reward`` subtracts from each rollout's reward before advantages.

    With ``k1`` the sum is ``log(pi_old / pi_ref)`` of the whole rollout, and maximising the reward less that penalty
    maximises ``E[R] - beta KL(policy || reference)`` exactly (the group's mean is a baseline). ``k2`` and ``k3`` as a
    reward are other objectives, which only near the reference agree with it. No gradient flows.

    Args:
        old_logp: ``[N, T]`` log-probabilities of the policy that sampled.
        ref_logp: ``[N, T]`` log-probabilities of the reference.
        mask: ``[N, T]`` bool, scored tokens; values elsewhere may be anything.
        settings: Gives `beta` and `kl_estimator`.
        weight: ``[N, T]``, how often a slot counts (`LossInputs.weight`); None means once.

    Returns:
        ``[N]``, in units of the reward.
    """
    with torch.no_grad():
        scored = mask if weight is None else mask & (weight > 0)
        old, ref = torch.where(scored, old_logp, 0.0), torch.where(scored, ref_logp, 0.0)
        values = _ESTIMATES[settings.kl_estimator](old, ref)
        return settings.beta * (values if weight is None else values * weight).sum(-1)
