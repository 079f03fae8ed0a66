"""What a likelihood estimator is, and the one tempered log-probability all of them use."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from rlhf_drive.errors import ConfigError, DataError
from rlhf_drive.policies.moe import RouterRecord
from rlhf_drive.policies.process import Denoiser
from rlhf_drive.policies.trace import DecodeTrace

__all__ = ["LikelihoodEstimator", "Probes", "TokenLogp", "Unprobed", "flatten_steps", "tempered_logp"]


@dataclass(frozen=True)
class Probes:
    """Corrupted copies of N finished plans at which an estimator looks, drawn once per rollout.

    Live, old and reference policy see the same ones; they are keyed by the sample, not by its row in a batch.
    """

    hidden: Tensor
    """``[P, N, L]`` bool: positions hidden in each of P copies."""
    weight: Tensor
    """``[P, N, L]`` float32: weight of ``log p(y_l | copy)`` in the estimate; 0 where it does not count."""
    negative: Tensor | None = None
    """``[N]`` bool: rows with a negative advantage, for estimators that bound those from above; None before it is
    known."""
    experts: Tensor | None = None
    """``[P, N, layers, A]`` integers: routing to be replayed in each copy's forward pass, as `RouterRecord.choices`
    gives it; None lets the live router choose."""

    def rows(self, index: Tensor) -> Probes:
        """The probes of the rollouts in `index` (long or bool ``[N]``)."""
        return replace(
            self,
            hidden=self.hidden[:, index],
            weight=self.weight[:, index],
            negative=None if self.negative is None else self.negative[index],
            experts=None if self.experts is None else self.experts[:, index],
        )


@dataclass(frozen=True)
class TokenLogp:
    """Log-probability of N rollouts, slot by slot. T is ``K*L`` for an estimator that visits the decode steps (column
    ``k*L + l``) and L for one that looks at the finished plan."""

    logp: Tensor
    """``[N, T]``, 0 where not scored."""
    mask: Tensor
    """``[N, T]`` bool, scored slots."""
    entropy: Tensor | None = None
    """``[N, T]`` nats: entropy of the distribution each scored token was scored with, 0 elsewhere; None if not asked
    for."""
    experts: Tensor | None = None
    """Routing of these passes, ``[K or P, N, layers, A]`` int16 as the trace or the probes take it; None if not asked
    for."""


class Unprobed:
    """What estimators without probes have in common: they look where the trace says."""

    name: str

    def probe_shape(self, length: int) -> None:
        """None: there are no probes."""
        del length

    def draw(self, trace: DecodeTrace, uniforms: Tensor) -> Probes:
        """DataError: there is nothing to draw."""
        raise DataError(f"The {self.name} likelihood has no probes: the trace itself says where to look.")


class LikelihoodEstimator(Protocol):
    """Log-probability of rollouts under a policy. Live, old and reference log-probabilities that meet in one objective
    come from one estimator with the same probes."""

    @property
    def name(self) -> str:
        """Name in recipes."""

    @property
    def has_ratio(self) -> bool:
        """Whether ``exp(new - old)`` estimates a ratio of probabilities; where not, training is on-policy only."""

    @property
    def visits_steps(self) -> bool:
        """Whether it scores the decode steps (T is ``K*L``) and so takes `steps`, or the finished plan (T is L)."""

    @property
    def behaviour(self) -> bool:
        """Whether the sampler's own log-probabilities (`DecodeTrace.logp`) are this estimator's at theta = old."""

    def probe_shape(self, length: int) -> tuple[int, ...] | None:
        """Shape of the uniform numbers one row's probes need; None if the estimator draws none."""

    def draw(self, trace: DecodeTrace, uniforms: Tensor) -> Probes:
        """Probes of N rollouts from uniform numbers ``[N, *probe_shape]``."""

    def __call__(
        self,
        policy: Denoiser,
        context: Any,
        trace: DecodeTrace,
        probes: Probes | None = None,
        *,
        max_tokens: int = 0,
        entropy: bool = False,
        keep_experts: bool = False,
        steps: Tensor | None = None,
        record: RouterRecord | None = None,
    ) -> TokenLogp:
        """Log-probabilities of the trace's rollouts.

        Args:
            policy: The denoiser whose probability is asked for.
            context: The S encoded scenes; trace rows are scene-major and a multiple of S.
            trace: What the sampler did.
            probes: What `draw` gave for these rows.
            max_tokens: Most plan tokens (rows times L) per forward pass; 0 takes all at once. Where more than one pass
                is needed and gradients are on, each pass is computed again in the backward pass, so that memory is
                bounded too. Values do not depend on it.
            entropy: Whether to give entropies too.
            keep_experts: Whether to give the routing.
            steps: ``[m]`` long, decode steps to look at, of an estimator that visits them; the mask is False for the
                others. None looks at all.
            record: Takes routing statistics of the first pass.
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
        return chosen - _log_normaliser(scaled)
    floor = scaled.detach().topk(top_k, dim=-1).values[:, -1]
    normaliser = _log_normaliser(scaled.masked_fill(scaled < floor[:, None], -torch.inf))
    return chosen - torch.where(chosen < floor, torch.logaddexp(normaliser, chosen), normaliser)


def _log_normaliser(logits: Tensor) -> Tensor:
    """``logsumexp`` over the last axis, of rows whose largest logit is finite. What is less than ``exp(-40)`` of the
    largest counts as that, with gradient 0: it is lost in rounding, and an `exp` that underflows takes a CPU tens of
    times as long."""
    top = logits.detach().amax(dim=-1, keepdim=True)
    return top.squeeze(-1) + (logits - top).clamp_min(-40.0).exp().sum(dim=-1).log()


def flatten_steps(values: Tensor) -> Tensor:
    """``[K, N, L]`` to ``[N, K*L]``, column ``k*L + l``: the layout in which traces meet objectives.

    Example:
        >>> flatten_steps(torch.arange(4).view(2, 1, 2))
        tensor([[0, 1, 2, 3]])
    """
    return values.transpose(0, 1).flatten(1)
