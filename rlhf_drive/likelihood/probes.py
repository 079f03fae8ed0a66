"""Log-probability of finished plans from corrupted copies of them: what all masked-state surrogates share.

An estimator hides some positions in each of P copies of a plan and adds up ``weight * log p(y_l | copy)`` over hidden
ones. They differ in what they hide and how they weigh it: one function from uniform numbers to `Probes` each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_drive.errors import ConfigError, DataError
from rlhf_drive.likelihood.base import Probes, TokenLogp
from rlhf_drive.likelihood.passes import StateRows, score_rows
from rlhf_drive.likelihood_fits import refusal
from rlhf_drive.policies.moe import RouterRecord
from rlhf_drive.policies.process import Denoiser
from rlhf_drive.policies.trace import DecodeTrace

__all__ = ["ProbeLikelihood", "require_masked", "score_probes", "weighted_sum"]


def weighted_sum(logp: Tensor, probes: Probes) -> Tensor:
    """``sum_p weight * logp``: ``[P, N, L]`` to ``[N, L]``."""
    return (logp * probes.weight).sum(dim=0)


@dataclass(frozen=True)
class ProbeLikelihood:
    """A surrogate made of probes, as a :class:`~rlhf_drive.likelihood.base.LikelihoodEstimator`.

    The row sums of its log-probabilities are the estimate. All slots count in the mask, also those that these probes
    leave at 0: every token belongs to the plan.
    """

    name: str
    """Name in recipes."""
    shape: Callable[[int], tuple[int, ...]]
    """Plan length L to the shape of one row's uniform numbers."""
    make: Callable[[Tensor], Probes]
    """Uniform numbers ``[N, *shape]`` in [0, 1) to the probes of N rows, each from its own numbers alone."""
    combine: Callable[[Tensor, Probes], Tensor] = weighted_sum
    """``[P, N, L]`` log-probabilities, 0 where the weight is 0, and the probes to ``[N, L]``."""
    has_ratio: bool = True
    """Whether ``exp(new - old)`` estimates a ratio of probabilities."""
    visits_steps: bool = False
    """False: it scores the finished plan."""
    behaviour: bool = False
    """False: the sampler's own log-probabilities are another estimator's."""

    def probe_shape(self, length: int) -> tuple[int, ...]:
        """Shape of the uniform numbers one row's probes need."""
        return self.shape(length)

    def draw(self, trace: DecodeTrace, uniforms: Tensor) -> Probes:
        """Probes of N rollouts from uniform numbers ``[N, *probe_shape]``."""
        expected = (len(trace), *self.shape(trace.state.shape[-1]))
        if tuple(uniforms.shape) != expected:
            raise DataError(f"Probes of {self.name} need uniform numbers {list(expected)}, got {list(uniforms.shape)}.")
        return self.make(uniforms)

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
        """Log-probabilities ``[N, L]``; entropies weighed as the log-probabilities are."""
        if probes is None:
            raise DataError(f"The {self.name} likelihood needs probes; draw them once per rollout.")
        if steps is not None:
            raise ConfigError(f"The {self.name} likelihood visits no decode steps to choose from; use 'trace'.")
        return score_probes(
            self.name, policy, context, trace, probes, self.combine,
            max_tokens=max_tokens, entropy=entropy, keep_experts=keep_experts, record=record,
        )  # fmt: skip


def require_masked(name: str, policy: Denoiser, trace: DecodeTrace) -> None:
    """ConfigError if the trace's process has no masked states for the likelihood called `name` to look at."""
    process = "masked"
    if trace.prefix:
        process = "autoregressive"
    elif not bool((trace.state[0] == policy.vocab_size).all()):
        process = "flow"
    reason = refusal(name, process)
    if reason is not None:
        raise ConfigError(reason)


def score_probes(
    name: str,
    policy: Denoiser,
    context: Any,
    trace: DecodeTrace,
    probes: Probes,
    combine: Callable[[Tensor, Probes], Tensor] = weighted_sum,
    *,
    max_tokens: int = 0,
    entropy: bool = False,
    keep_experts: bool = False,
    record: RouterRecord | None = None,
) -> TokenLogp:
    """Score P copies of each of the N finished plans against one encoded context, row (n, p) at ``n*P + p``.

    Args:
        name: Who asks, for errors.
        policy: The denoiser whose probability is asked for.
        context: The S encoded scenes; N is a multiple of S, scene-major.
        trace: Gives the finished plans, temperature and top-k.
        probes: What to hide and how to weigh it; their routing is replayed where they hold one.
        combine: Makes ``[N, L]`` of the copies' ``[P, N, L]``.
        max_tokens: See :class:`~rlhf_drive.likelihood.base.LikelihoodEstimator`.
        entropy: Whether entropies are wanted.
        keep_experts: Whether the routing ``[P, N, layers, A]`` is wanted.
        record: Takes routing statistics of the first pass.

    Raises:
        ConfigError: The trace's process has no masked states, or it was decoded greedily.
    """
    require_masked(name, policy, trace)
    copies, n, length = probes.hidden.shape
    tokens = trace.tokens

    def rows(values: Tensor) -> Tensor:
        """``[P, N, ...]`` to ``[N*P, ...]``."""
        return values.transpose(0, 1).flatten(0, 1)

    def back(values: Tensor) -> Tensor:
        """``[N*P, ...]`` to ``[P, N, ...]``."""
        return values.unflatten(0, (n, copies)).transpose(0, 1)

    hidden = rows(probes.hidden)
    scores = score_rows(
        policy,
        context,
        StateRows(
            state=rows(torch.where(probes.hidden, policy.vocab_size, tokens)),
            time=1.0 - hidden.float().mean(dim=1),
            action=tokens.repeat_interleave(copies, dim=0),
            scored=rows(probes.weight != 0),
            experts=None if probes.experts is None else rows(probes.experts),
        ),
        trace.temperature,
        trace.top_k,
        max_rows=0 if max_tokens <= 0 else max(1, max_tokens // length),
        entropy=entropy,
        keep_experts=keep_experts,
        record=record,
    )
    return TokenLogp(
        logp=combine(back(scores.logp), probes),
        mask=torch.ones_like(tokens, dtype=torch.bool),
        entropy=None if scores.entropy is None else weighted_sum(back(scores.entropy), probes),
        experts=None if scores.experts is None else back(scores.experts),
    )
