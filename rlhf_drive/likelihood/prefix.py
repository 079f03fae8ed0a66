"""All steps of an autoregressive decode in one forward pass.

State k of such a trace is the finished plan cut off before position k, and the network is causal: its logits at
position k are the same whether later tokens are hidden or not. So one pass over the finished plan holds the logits of
all K steps, and the sum over steps becomes the sum over positions of one state.

Routing follows the same argument as long as each token chooses its own experts: the sampler's trace carries one routing
of the finished plan, ``[1, N, layers, A]``, and so does the likelihood's.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rlhf_drive.likelihood.base import TokenLogp, flatten_steps
from rlhf_drive.policies.trace import DecodeTrace

__all__ = ["at_steps", "whole_plan"]


def whole_plan(trace: DecodeTrace, mask_token: int, steps: Tensor | None = None) -> DecodeTrace:
    """The trace with K = 1 that scores in one state what a prefix trace scores in K.

    Args:
        trace: A prefix trace of N rollouts of L tokens.
        mask_token: V.
        steps: ``[m]`` long, the steps to score; None scores all.

    Example:
        >>> from rlhf_drive.policies.autoregressive import sample
        >>> whole_plan(sample(policy, context, uniforms, decoding), policy.vocab_size).state.shape[0]
        1
    """
    # The last state holds all tokens but those decided there; an unscored draw leaves no other mark in the trace.
    plan = torch.where(trace.state[-1] == mask_token, trace.tokens, trace.state[-1])
    return replace(
        trace,
        state=plan[None],
        action=plan[None],
        scored=_chosen(trace, steps).any(dim=0, keepdim=True),
        time=trace.time[:1],
        logp=trace.logp.sum(dim=0, keepdim=True),
        prefix=False,
    )


def at_steps(whole: TokenLogp, trace: DecodeTrace, steps: Tensor | None = None) -> TokenLogp:
    """What was computed for the whole plan ``[N, L]``, at the columns ``k*L + l`` of the prefix trace ``[N, K*L]``."""
    scored = _chosen(trace, steps)
    entropy = None if whole.entropy is None else _spread(whole.entropy, scored)
    return replace(whole, logp=_spread(whole.logp, scored), mask=flatten_steps(scored), entropy=entropy)


def _chosen(trace: DecodeTrace, steps: Tensor | None) -> Tensor:
    """``[K, N, L]`` bool: what the trace scores at `steps`."""
    if steps is None:
        return trace.scored
    wanted = torch.zeros(len(trace.scored), dtype=torch.bool, device=steps.device).index_fill(0, steps, True)
    return trace.scored & wanted[:, None, None]


def _spread(values: Tensor, scored: Tensor) -> Tensor:
    """``[N, L]`` to ``[N, K*L]``: each value in the columns that score its position, 0 elsewhere."""
    return flatten_steps(torch.where(scored, values, 0.0))
