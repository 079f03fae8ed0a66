"""Log-probability of the states a discrete flow went through, whatever end points led from one to the next.

``log sum_a p_theta(a | x_k) K_h(x_(k+1) | x_k, a)`` for each number at each step, with the very kernel that moved it
(:class:`~rlhf_drive.policies.numeric_path.EulerStep`), and ``log p_theta(x_K | x_(K-1))`` for the last step, which
takes its end points as the plan. The trace likelihood scores the end points that were drawn. Given the states these say
nothing more about the plan: their expected ratio is the ratio of this one, which varies less between rollouts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rlhf_drive.errors import ConfigError
from rlhf_drive.likelihood.base import Probes, TokenLogp, Unprobed
from rlhf_drive.likelihood.trace import TraceLikelihood
from rlhf_drive.policies.flow import DiscreteFlow
from rlhf_drive.policies.moe import RouterRecord
from rlhf_drive.policies.process import Denoiser
from rlhf_drive.policies.trace import DecodeTrace

__all__ = ["MarginalLikelihood"]


class MarginalLikelihood(Unprobed):
    """The flow's marginal likelihood as a :class:`~rlhf_drive.likelihood.base.LikelihoodEstimator`.

    The sampler's own log-probabilities are those of the end points, so old ones are computed afresh.
    """

    name, has_ratio, visits_steps, behaviour = "marginal", True, True, False

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
        """Log-probabilities ``[N, K*L]``; entropies are those of ``p_theta(a | x_k)``.

        See :class:`~rlhf_drive.likelihood.trace.TraceLikelihood` for `steps`.

        Raises:
            ConfigError: The policy does not decode by discrete flow, or the trace is greedy.
        """
        del probes
        process = getattr(policy, "process", None)
        if not isinstance(process, DiscreteFlow):
            raise ConfigError(
                "Likelihood 'marginal' adds up the end points of a discrete flow, which this policy does not draw "
                f"(process {getattr(process, 'name', None)!r}). Use likelihood 'trace', or process 'flow'."
            )
        moves = _Moves(process, trace)
        slots = torch.arange(trace.state.numel(), device=trace.state.device).view_as(trace.state)
        return TraceLikelihood(moves.score)(
            policy, context, replace(trace, action=slots),
            max_tokens=max_tokens, entropy=entropy, keep_experts=keep_experts, steps=steps, record=record,
        )  # fmt: skip


class _Moves:
    """What happened at each slot ``(k*N + n)*L + l`` of a flow's trace."""

    def __init__(self, process: DiscreteFlow, trace: DecodeTrace) -> None:
        self.steps = process.steps(trace.time)
        self.size = process.path.vocab_size
        self.per_step = trace.state[0].numel()
        self.before, self.end = trace.state.flatten(), trace.action.flatten()
        self.after = torch.cat([trace.state[1:], trace.action[-1:]]).flatten()

    def score(
        self, logits: Tensor, slot: Tensor, temperature: float, top_k: int, entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Marginal log-probabilities ``[M]`` of the moves at the slots ``[M]``, given logits ``[M, V]`` of end points.

        As in :func:`~rlhf_drive.likelihood.base.tempered_logp` the end point that was drawn always counts as possible.
        """
        if not temperature > 0:
            raise ConfigError(
                f"A trace sampled at temperature {temperature} has no likelihood. Set rollout.temperature above 0 for "
                "reinforcement learning."
            )
        scaled = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
        if 0 < top_k < self.size:
            outside = scaled < scaled.detach().topk(top_k, dim=-1).values[:, -1:]
            scaled = scaled.masked_fill(outside.scatter(-1, self.end[slot][:, None], False), -torch.inf)
        end_logp = scaled.log_softmax(dim=-1)
        logp = (end_logp + self._kernel(slot).to(end_logp)).logsumexp(dim=-1)
        if not entropy:
            return logp, None
        return logp, -(end_logp.exp() * end_logp.masked_fill(end_logp == -torch.inf, 0.0)).sum(dim=-1)

    @torch.no_grad()
    def _kernel(self, slot: Tensor) -> Tensor:
        """``[M, V]`` log-probability of each slot's move given each end point; no weights enter."""
        step = slot // self.per_step
        before, after = self.before[slot][:, None], self.after[slot][:, None]
        ends = torch.arange(self.size, device=slot.device)[None]
        kernel = torch.where(after == ends, 0.0, -torch.inf).double()
        for k, euler in enumerate(self.steps):
            here = (step == k).nonzero().flatten()
            if len(here):
                kernel = kernel.index_copy(0, here, euler.logp(before[here], after[here], ends))
        return kernel
