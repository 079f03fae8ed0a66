"""From the head's features to log-probabilities of draws, a slice of rows at a time.

Logits are wide (V numbers) and features narrow. Where all of a pass's logits would be large, they are made in chunks of
rows, and each chunk is made again in the backward pass: features are kept, logits are not.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlhf_drive.likelihood.base import tempered_logp
from rlhf_drive.policies.process import Denoiser

__all__ = ["LOGITS_LIMIT", "Scorer", "draw_scores", "score_draws", "tempered_entropy"]

Scorer = Callable[[Tensor, Tensor, float, int, bool], tuple[Tensor, Tensor | None]]
"""``(logits [M, V], action [M], temperature, top_k, entropy) -> (logp [M], entropy [M] or None)``."""

LOGITS_LIMIT = 1 << 21
"""Most logits (rows times V) made at once; with gradients on, a pass with more keeps none of them."""


def draw_scores(
    logits: Tensor, action: Tensor, temperature: float, top_k: int, entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of the actions themselves, and entropies if wanted: the `Scorer` of most estimators."""
    logp = tempered_logp(logits, action, temperature, top_k)
    return logp, tempered_entropy(logits, action, temperature, top_k) if entropy else None


def score_draws(
    policy: Denoiser,
    features: Tensor,
    action: Tensor,
    temperature: float,
    top_k: int,
    *,
    entropy: bool = False,
    limit: int = LOGITS_LIMIT,
    scorer: Scorer = draw_scores,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of M draws, and the entropy of the distributions they count as drawn from.

    Args:
        policy: Whose head reads the features.
        features: ``[M, F]`` as `Denoiser.action_features` gives them.
        action: ``[M]`` long.
        temperature: Softmax temperature the actions were drawn with, positive.
        top_k: Support they were drawn from; 0 means all.
        entropy: Whether entropies are wanted.
        limit: Most logits made at once; values and gradients do not depend on it.
        scorer: What is asked of the logits; `action` is passed on to it.

    Returns:
        Log-probabilities ``[M]`` and entropies ``[M]`` (or None), nats, in float32 or wider.

    Raises:
        ConfigError: If the temperature is not positive.
    """

    def score(part: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor | None]:
        return scorer(policy.logits(part), drawn, temperature, top_k, entropy)

    rows = max(1, limit // policy.vocab_size)
    if len(features) <= rows:
        return score(features, action)
    parts = [
        checkpoint(score, part, drawn, use_reentrant=False, preserve_rng_state=False)
        if torch.is_grad_enabled()
        else score(part, drawn)
        for part, drawn in zip(features.split(rows), action.split(rows), strict=True)
    ]
    entropies = [part for _, part in parts if part is not None]
    return torch.cat([logp for logp, _ in parts]), torch.cat(entropies) if entropies else None


def tempered_entropy(logits: Tensor, action: Tensor, temperature: float, top_k: int) -> Tensor:
    """``-sum_v p_v log p_v`` of the distribution that `tempered_logp` scores the action with: the live top-k united
    with the action.

    Args:
        logits: ``[M, V]``.
        action: ``[M]`` long.
        temperature: Positive.
        top_k: 0 means all tokens.

    Returns:
        ``[M]`` nats, at least in float32.

    Example:
        >>> tempered_entropy(torch.zeros(1, 4), torch.tensor([2]), temperature=1.0, top_k=0).exp()
        tensor([4.])
    """
    scaled = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    if 0 < top_k < scaled.shape[-1]:
        outside = scaled < scaled.detach().topk(top_k, dim=-1).values[:, -1:]
        scaled = scaled.masked_fill(outside.scatter(-1, action[:, None], False), -torch.inf)
    logp = scaled.log_softmax(dim=-1)
    # Not logp.exp(): an `exp` that underflows takes a CPU tens of times as long.
    return -(scaled.softmax(dim=-1) * logp.masked_fill(logp == -torch.inf, 0.0)).sum(dim=-1)
