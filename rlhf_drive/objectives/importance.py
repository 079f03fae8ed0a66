"""How far the policy has moved from the one that sampled, per token, per decode step or per sequence.

With ``d_t = logp_t - old_logp_t``: ``token`` takes ``d_t`` (GRPO, 2402.03300); ``sequence`` the row's mean of ``d_t``
(GSPO, 2507.18071); ``sequence_token`` has that mean as its value, but each token's weight moves with its own
log-probability only, ``sg[mean d] + d_t - sg[d_t]`` (GSPO-token); ``step`` the mean of ``d_t`` over the tokens
decided in the same decode step.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

__all__ = [
    "IMPORTANCE_SAMPLING_LEVELS",
    "WHOLE_SEQUENCE",
    "ImportanceSamplingLevel",
    "log_importance",
    "log_ratio_sum",
    "step_share",
]

ImportanceSamplingLevel = Literal["token", "sequence", "sequence_token", "step"]
IMPORTANCE_SAMPLING_LEVELS: tuple[str, ...] = get_args(ImportanceSamplingLevel)
WHOLE_SEQUENCE = ("sequence", "sequence_token")
"""Levels whose ratio is one of all tokens of a row."""


def log_importance(
    logp: Tensor, old_logp: Tensor, mask: Tensor, level: ImportanceSamplingLevel, step_of: Tensor | None = None
) -> Tensor:
    """Log importance weight of each token.

    With advantages per row, ``sequence_token`` and ``sequence`` have the same loss and gradient, as the paper says;
    they differ where a row's tokens have advantages of their own.

    Args:
        logp: ``[N, T]`` live log-probabilities.
        old_logp: ``[N, T]`` log-probabilities of the policy that sampled.
        mask: ``[N, T]`` bool, scored tokens; values elsewhere may be anything, NaN included.
        level: One of `IMPORTANCE_SAMPLING_LEVELS`.
        step_of: ``[T]`` long, decode step of each slot, for ``step``; None means that all belong to one step.

    Returns:
        ``[N, T]`` (zero where unscored), or ``[N, 1]`` for ``sequence``.

    Example:
        >>> logp, mask = torch.tensor([[0.2, 0.4, 0.9]]), torch.ones(1, 3, dtype=torch.bool)
        >>> log_importance(logp, torch.zeros(1, 3), mask, "step", torch.tensor([0, 0, 1]))
        tensor([[0.3000, 0.3000, 0.9000]])
    """
    log_ratio = torch.where(mask, logp - old_logp, 0.0)
    if level == "token":
        return log_ratio
    if level == "step":
        if step_of is None:
            step_of = torch.zeros(mask.shape[1], dtype=torch.long, device=mask.device)
        mean = _step_sums(log_ratio, step_of) / _step_sums(mask.to(log_ratio.dtype), step_of).clamp(min=1)
        return torch.where(mask, mean.index_select(1, step_of), 0.0)
    mean = log_ratio.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    if level == "sequence":
        return mean
    return torch.where(mask, mean.detach() + log_ratio - log_ratio.detach(), 0.0)


def log_ratio_sum(
    logp: Tensor, old_logp: Tensor, mask: Tensor, level: ImportanceSamplingLevel, step_of: Tensor | None = None
) -> Tensor:
    """Log of how much more probable what was drawn has become: each token, decode step or whole row as one draw.

    Where `log_importance` takes means (geometric means of ratios), this takes sums: the ratio of joint probabilities.

    Args:
        logp: ``[N, T]`` log-probabilities of one policy.
        old_logp: ``[N, T]`` log-probabilities of the other.
        mask: ``[N, T]`` bool, scored tokens; values elsewhere may be anything, NaN included.
        level: One of `IMPORTANCE_SAMPLING_LEVELS`; both levels of whole rows are the same here.
        step_of: ``[T]`` long, decode step of each slot, for ``step``; None means that all belong to one step.

    Returns:
        ``[N, T]`` (zero where unscored), or ``[N, 1]`` for ``sequence`` and ``sequence_token``.

    Example:
        >>> logp, mask = torch.tensor([[0.2, 0.4, 0.9]]), torch.ones(1, 3, dtype=torch.bool)
        >>> log_ratio_sum(logp, torch.zeros(1, 3), mask, "step", torch.tensor([0, 0, 1]))
        tensor([[0.6000, 0.6000, 0.9000]])
    """
    log_ratio = torch.where(mask, logp - old_logp, 0.0)
    if level == "token":
        return log_ratio
    if level == "step" and step_of is not None:
        return torch.where(mask, _step_sums(log_ratio, step_of).index_select(1, step_of), 0.0)
    total = log_ratio.sum(-1, keepdim=True)
    return torch.where(mask, total, 0.0) if level == "step" else total


def step_share(mask: Tensor, step_of: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What each slot must be weighted with for a row's mean over tokens to become its mean over decode steps.

    ``tokens of the row / (decode steps of the row * tokens of this step)``: the tokens of a row still weigh as many as
    they are together, but every step weighs the same, however many tokens it decided.

    Args:
        mask: ``[N, T]`` bool, scored tokens.
        step_of: ``[T]`` long, decode step of each slot; None means that all belong to one step.
        dtype: Of the result.

    Returns:
        ``[N, T]``, zero where unscored.
    """
    scored = mask.to(dtype)
    if step_of is None:
        return scored
    sizes = _step_sums(scored, step_of)
    steps = (sizes > 0).sum(-1, keepdim=True).clamp(min=1)
    shares = scored.sum(-1, keepdim=True) / (steps * sizes.clamp(min=1))
    return scored * shares.index_select(1, step_of)


def _step_sums(values: Tensor, step_of: Tensor) -> Tensor:
    """``[N, K]`` sums of ``[N, T]`` values over the slots of each step."""
    steps = int(step_of.max()) + 1 if step_of.numel() else 1
    return values.new_zeros(values.shape[0], steps).index_add(1, step_of, values)
