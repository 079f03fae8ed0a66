"""Exact log-probability of a rollout: the product of its own draws, each under the state it was made in.

``log pi = sum over scored (k, l) of log p(action[k, l] | state[k], time[k], context)``. Exact where the decoding order
does not depend on the weights (causal, reverse_causal, random). With order `confidence`, a function of the state's
logits, it is exact for the weights that sampled; for others the recorded schedule counts as part of the environment. An
order that looks at the sampled token's own probability (LLaDA's `low_confidence`) gives no probability at all and is
refused by :class:`rlhf_drive.policies.process.Decoding`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_drive.errors import DataError
from rlhf_drive.likelihood.base import Probes, TokenLogp, flatten_steps, tempered_logp
from rlhf_drive.policies.moe import RouterRecord
from rlhf_drive.policies.process import Denoiser
from rlhf_drive.policies.trace import DecodeTrace

__all__ = ["TraceLikelihood", "trace_logp"]


class TraceLikelihood:
    """The exact likelihood of the decode as a :class:`~rlhf_drive.likelihood.base.LikelihoodEstimator`."""

    name, has_ratio, behaviour = "trace", True, True

    def probe_shape(self, length: int) -> None:
        """None: the trace itself says where to look."""
        del length

    def draw(self, trace: DecodeTrace, uniforms: Tensor) -> Probes:
        """DataError: there is nothing to draw."""
        raise DataError("The trace likelihood has no probes: it looks at the states that the sampler visited.")

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
        """Log-probabilities ``[N, K*L]``."""
        del probes, entropy, keep_experts, steps, record
        logp, mask = trace_logp(policy, context, trace, max_rows=max_tokens // trace.state.shape[-1])
        return TokenLogp(logp, mask)


def trace_logp(policy: Denoiser, context: Any, trace: DecodeTrace, *, max_rows: int = 0) -> tuple[Tensor, Tensor]:
    """Log-probability of every scored draw of the trace, with the temperature and top-k it was drawn with.

    The states of all steps go through the network together, row (n, k) at ``n*K + k``, so that the rows of a scene stay
    next to each other and share its context; the head runs at scored positions only. Steps that score nothing are left
    out.

    Args:
        policy: The denoiser whose probability is asked for.
        context: The S encoded scenes; N is a multiple of S, scene-major.
        trace: What the sampler did, N rollouts in K steps.
        max_rows: Most (rollout, step) rows per forward pass, in whole steps: at least N rows go at once. 0 takes all.

    Returns:
        Log-probabilities ``[N, K*L]``, 0 where not scored, and mask ``[N, K*L]`` bool; column ``k*L + l``.

    Raises:
        ConfigError: If the trace was decoded greedily.
    """
    mask = flatten_steps(trace.scored)
    steps = trace.scored.flatten(1).any(dim=1).nonzero().flatten()
    if not len(steps):
        return torch.zeros(mask.shape, device=mask.device), mask
    per_pass = len(steps) if max_rows <= 0 else max(1, max_rows // max(1, len(trace)))
    parts = [_steps_logp(policy, context, trace, chunk) for chunk in steps.split(per_pass)]
    scored_logp = torch.cat(parts, dim=1)
    logp = scored_logp.new_zeros(len(trace), len(trace.time), trace.state.shape[-1])
    return logp.index_copy(1, steps, scored_logp).flatten(1), mask


def _steps_logp(policy: Denoiser, context: Any, trace: DecodeTrace, steps: Tensor) -> Tensor:
    """Log-probabilities ``[N, len(steps), L]`` of the chosen steps in one forward pass."""
    n, length = len(trace), trace.state.shape[-1]
    state, action, scored = (
        values[steps].transpose(0, 1).reshape(-1, length) for values in (trace.state, trace.action, trace.scored)
    )
    logits = policy.action_logits(state, trace.time[steps].repeat(n), context, scored)
    logp = tempered_logp(logits, action[scored], trace.temperature, trace.top_k)
    return logp.new_zeros(scored.shape).masked_scatter(scored, logp).view(n, len(steps), length)
