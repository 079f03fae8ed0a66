"""Policy terms: what is maximised for each token, given its importance weight and advantage.

All take weights ``[N, T]`` or ``[N, 1]`` and advantages ``[N, 1]`` or ``[N, T]``, and know no aggregation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_drive.errors import DataError

__all__ = [
    "cispo_surrogate",
    "clipped_surrogate",
    "geometric_mean_weight",
    "sapo_surrogate",
    "weighted_likelihood",
]


def clipped_surrogate(
    weight: Tensor, advantages: Tensor, epsilon: float, epsilon_high: float, delta: float = 0.0
) -> Tensor:
    """``min(w A, clip(w, 1 - epsilon, 1 + epsilon_high) A)`` (PPO, 1707.06347).

    The gradient vanishes only where moving on would leave the trust region further: ``w > 1 + epsilon_high`` with
    ``A > 0``, and ``w < 1 - epsilon`` with ``A < 0``. Where the advantage is negative, a large ``w`` makes the term as
    negative as it likes; `delta` bounds it (dual clip, 1912.09729; two-sided clipping, 2505.07291): ``w`` becomes
    ``min(w, delta)`` in the first branch, without gradient beyond.

    Args:
        weight: Importance weights.
        advantages: Advantages.
        epsilon: Lower half-width of the trust region.
        epsilon_high: Upper half-width.
        delta: Upper bound of the unclipped weight, above ``1 + epsilon_high``; 0 means none.
    """
    clipped = weight.clamp(1 - epsilon, 1 + epsilon_high)
    bounded = weight.clamp(max=delta) if delta > 0 else weight
    return torch.minimum(bounded * advantages, clipped * advantages)


def cispo_surrogate(weight: Tensor, advantages: Tensor, logp: Tensor, cap: float) -> Tensor:
    """``sg[min(w, cap)] A logp`` (CISPO, 2506.13585, with TRL's one bound).

    The weight is clipped, not the update: no token ever loses its gradient, but none weighs more than `cap`.

    Args:
        weight: Importance weights.
        advantages: Advantages.
        logp: ``[N, T]`` live log-probabilities, finite.
        cap: Largest weight, absolute (not 1 + something).
    """
    return weight.clamp(max=cap).detach() * advantages * logp


def sapo_surrogate(weight: Tensor, advantages: Tensor, temperature_pos: float, temperature_neg: float) -> Tensor:
    """``A (4 / tau) sigmoid(tau (w - 1))`` (SAPO, 2511.20347): a soft gate in place of the clip.

    Its slope at ``w = 1`` is A, as that of ``w A``, and fades on both sides, faster for a higher temperature.

    Args:
        weight: Importance weights.
        advantages: Advantages.
        temperature_pos: tau where the advantage is positive.
        temperature_neg: tau elsewhere.
    """
    tau = torch.where(advantages > 0, temperature_pos, temperature_neg)
    return advantages * torch.sigmoid(tau * (weight - 1)) * 4 / tau


def geometric_mean_weight(
    log_ratio: Tensor, advantages: Tensor, mask: Tensor, epsilon: float, epsilon_high: float
) -> Tensor:
    """``exp(mean_t c_t)``, GMPO's weight of a row (2507.20673); times A it is what is maximised.

    ``c_t = min(d_t, epsilon_high)`` where ``A > 0`` and ``max(d_t, -epsilon)`` where ``A < 0``, with ``d_t`` the
    token's log ratio: clipped in log space, token by token, and only on the side on which the update would overshoot.
    Unlike in GSPO, which clips the mean, one runaway token loses its gradient and the rest of the row keeps theirs.

    Args:
        log_ratio: ``[N, T]`` log ratio per token, zero where unscored.
        advantages: ``[N, 1]``.
        mask: ``[N, T]`` bool, scored tokens.
        epsilon: Lower bound of the log ratio is -epsilon.
        epsilon_high: Upper bound of the log ratio.

    Returns:
        ``[N, 1]``.

    Raises:
        DataError: If the advantages are per token.
    """
    if advantages.shape[1] != 1:
        raise DataError(f"gmpo weighs whole rows: it needs advantages [N], got {list(advantages.shape)}.")
    clipped = torch.where(advantages > 0, log_ratio.clamp(max=epsilon_high), log_ratio.clamp(min=-epsilon))
    total = torch.where(mask, clipped, 0.0).sum(-1, keepdim=True)
    return (total / mask.sum(-1, keepdim=True).clamp(min=1)).exp()


def weighted_likelihood(advantages: Tensor, rows: Tensor, group_size: int) -> Tensor:
    """``n (softmax(A) - softmax(-A))`` over the n learned rows of each group: wd1's weight of ``logp`` (2507.08838).

    No ratio, hence no old policy: good plans are imitated, bad ones unlearned. The paper's loss is
    ``-sum softmax(A) logp + sum softmax(-A) logp`` over a group. The factor n makes a mean over rows out of that sum:
    the weights then compare with advantages, and for small ones are ``2 A`` minus its mean. The paper's 1/temperature
    is a factor on the advantages (`reward_scale`).

    Args:
        advantages: ``[N, 1]``.
        rows: ``[N]`` bool, rows that are learned from; the others have weight 0 and enter no softmax.
        group_size: G; rows come in groups of so many.

    Returns:
        ``[N, 1]``.

    Raises:
        DataError: If the rows are not whole groups, or are advantages per token.
    """
    if group_size < 2 or advantages.shape[0] % group_size or advantages.shape[1] != 1:
        raise DataError(
            f"wll compares the rows of a group: it needs advantages [N] of whole groups of at least 2, got "
            f"{list(advantages.shape)} with group_size {group_size}."
        )
    groups, kept = advantages.view(-1, group_size), rows.view(-1, group_size)
    count = kept.sum(-1, keepdim=True)

    def softmax(values: Tensor) -> Tensor:
        weights = torch.where(kept, values, -torch.inf).softmax(-1)
        return torch.where(kept, weights, 0.0)  # a group without learned rows is NaN before this

    return (count * (softmax(groups) - softmax(-groups))).view(-1, 1)
