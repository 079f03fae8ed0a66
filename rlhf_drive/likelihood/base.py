"""What a likelihood estimator is, and the one tempered log-probability all of them use."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from rlhf_drive.errors import ConfigError
from rlhf_drive.policies.process import Denoiser
from rlhf_drive.policies.trace import DecodeTrace

__all__ = ["LikelihoodEstimator", "flatten_steps", "tempered_logp"]


class LikelihoodEstimator(Protocol):
    """Log-probability of rollouts under a policy, token slot by token slot."""

    def __call__(
        self, policy: Denoiser, context: Any, trace: DecodeTrace, *, max_rows: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities ``[N, T]`` (0 where not scored) and mask ``[N, T]`` bool.

        T is ``K*L`` for an estimator that visits the decode steps and L for one that looks at the plan once. Live, old
        and reference log-probabilities that meet in one objective must come from one estimator.

        Args:
            policy: The denoiser whose probability is asked for.
            context: The S encoded scenes; trace rows are scene-major and a multiple of S.
            trace: What the sampler did.
            max_rows: Most (rollout, step) rows per forward pass; 0 takes all at once. Values do not depend on it.
        """
        ...


def tempered_logp(logits: Tensor, action: Tensor, temperature: float, top_k: int) -> Tensor:
    """``log softmax(logits / temperature)[action]`` over the sampler's support, at least in float32.

    With `top_k` the support is the live top-k (ties at the k-th logit kept, as in sampling) united with the action, so
    that the value is exact whenever the action lies inside and finite when it has dropped out.

    Args:
        logits: ``[M, V]``.
        action: ``[M]`` long.
        temperature: Softmax temperature the action was drawn with, positive.
        top_k: Number of most probable tokens the action was drawn from; 0 means all.

    Returns:
        ``[M]`` in float32, or in float64 if the logits are.

    Raises:
        ConfigError: If the temperature is not positive: a greedy choice has no probability to learn from.

    Example:
        >>> tempered_logp(torch.zeros(1, 4), torch.tensor([2]), temperature=1.0, top_k=0).exp()
        tensor([0.2500])
    """
    if not temperature > 0:
        raise ConfigError(
            f"A trace sampled at temperature {temperature} has no likelihood: greedy decoding gives each plan "
            "probability 1 or 0. Set rollout.temperature above 0 for reinforcement learning."
        )
    scaled = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    chosen = scaled.gather(-1, action[:, None]).squeeze(-1)
    if not 0 < top_k < scaled.shape[-1]:
        return chosen - scaled.logsumexp(-1)
    floor = scaled.detach().topk(top_k, dim=-1).values[:, -1]
    normaliser = scaled.masked_fill(scaled < floor[:, None], -torch.inf).logsumexp(-1)
    return chosen - torch.where(chosen < floor, torch.logaddexp(normaliser, chosen), normaliser)


def flatten_steps(values: Tensor) -> Tensor:
    """``[K, N, L]`` to ``[N, K*L]``, column ``k*L + l``: the layout in which traces meet objectives.

    Example:
        >>> flatten_steps(torch.arange(4).view(2, 1, 2))
        tensor([[0, 1, 2, 3]])
    """
    return values.transpose(0, 1).flatten(1)
