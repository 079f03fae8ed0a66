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

from rlhf_drive.likelihood.base import Probes, TokenLogp, Unprobed, flatten_steps
from rlhf_drive.likelihood.passes import RowScores, StateRows, score_rows
from rlhf_drive.likelihood.prefix import at_steps, whole_plan
from rlhf_drive.likelihood.scoring import Scorer, draw_scores
from rlhf_drive.policies.moe import RouterRecord
from rlhf_drive.policies.process import Denoiser
from rlhf_drive.policies.trace import DecodeTrace

__all__ = ["TraceLikelihood", "trace_logp"]


class TraceLikelihood(Unprobed):
    """The exact likelihood of the decode as a :class:`~rlhf_drive.likelihood.base.LikelihoodEstimator`.

    The states of all steps go through the network together, row (n, k) at ``n*K + k``, so that the rows of a scene
    stand next to each other and share its context; the head runs at scored positions only. Steps that score nothing
    are left out. Where the trace holds the sampler's routing, it is replayed. Another `scorer` asks something else of
    the same logits. An autoregressive trace is one state, the finished plan (:mod:`rlhf_drive.likelihood.prefix`).
    """

    name, has_ratio, visits_steps, behaviour = "trace", True, True, True

    def __init__(self, scorer: Scorer = draw_scores) -> None:
        self.scorer = scorer

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
        """Log-probabilities ``[N, K*L]``; routing of a step that is not looked at is -1, which no router can replay.

        With `steps`, m of K steps drawn at random, ``K/m`` times the sum over them of any per-slot term is unbiased for
        the sum over all: good for objectives that add token terms up. A product over slots (a sequence ratio) is not.
        """
        del probes
        max_rows = 0 if max_tokens <= 0 else max(1, max_tokens // trace.state.shape[-1])
        return _score(
            policy, context, trace, _visited(trace, steps),
            max_rows=max_rows, entropy=entropy, keep_experts=keep_experts, record=record, scorer=self.scorer,
        )  # fmt: skip


def trace_logp(policy: Denoiser, context: Any, trace: DecodeTrace, *, max_rows: int = 0) -> tuple[Tensor, Tensor]:
    """Log-probability of every scored draw of the trace, with the temperature and top-k it was drawn with.

    Args:
        policy: The denoiser whose probability is asked for.
        context: The S encoded scenes; N is a multiple of S, scene-major.
        trace: What the sampler did, N rollouts in K steps.
        max_rows: Most (rollout, step) rows per forward pass, a multiple of N: at least N rows go at once. 0 takes all.
            Every pass keeps its activations for the backward pass; `TraceLikelihood` can bound memory instead.

    Returns:
        Log-probabilities ``[N, K*L]``, 0 where not scored, and mask ``[N, K*L]`` bool; column ``k*L + l``.

    Raises:
        ConfigError: If the trace was decoded greedily.
    """
    visited, n = _visited(trace, None), max(1, len(trace))
    whole = 0 if max_rows <= 0 else n * max(1, max_rows // n)
    result = _score(policy, context, trace, visited, max_rows=whole, recompute=False)
    return result.logp, result.mask


def _score(policy: Denoiser, context: Any, trace: DecodeTrace, visited: Tensor, **options: Any) -> TokenLogp:
    """The visited steps scored in their places; `options` of `score_rows`."""
    if trace.prefix:
        whole = whole_plan(trace, policy.vocab_size, visited)
        return at_steps(_score(policy, context, whole, _visited(whole, None), **options), trace, visited)
    if not len(visited):
        blank = torch.zeros(len(trace), len(trace.time) * trace.state.shape[-1], device=trace.state.device)
        return TokenLogp(blank, blank.bool(), blank if options.get("entropy") else None)
    rows = _step_rows(trace, visited)
    return _spread(trace, visited, score_rows(policy, context, rows, trace.temperature, trace.top_k, **options))


def _visited(trace: DecodeTrace, steps: Tensor | None) -> Tensor:
    """``[m]`` long, ascending: the steps that score something, of those in `steps`."""
    wanted = trace.scored.flatten(1).any(dim=1)
    if steps is not None:
        wanted &= torch.zeros_like(wanted).index_fill(0, steps.to(wanted.device), True)
    return wanted.nonzero().flatten()


def _step_rows(trace: DecodeTrace, steps: Tensor) -> StateRows:
    """The states of the steps, row (n, k) at ``n*m + k``."""

    def rows(values: Tensor) -> Tensor:
        return values[steps].transpose(0, 1).flatten(0, 1)

    return StateRows(
        state=rows(trace.state),
        time=trace.time[steps].repeat(len(trace)),
        action=rows(trace.action),
        scored=rows(trace.scored),
        experts=None if trace.experts is None else rows(trace.experts),
    )


def _spread(trace: DecodeTrace, steps: Tensor, scores: RowScores) -> TokenLogp:
    """Scores of the visited steps, put into their places among all K."""
    n, total = len(trace), len(trace.time)

    def place(values: Tensor, fill: int = 0) -> Tensor:
        """``[n*m, ...]`` to ``[N, K, ...]``."""
        empty = values.new_full((n, total, *values.shape[1:]), fill)
        return empty.index_copy(1, steps, values.unflatten(0, (n, len(steps))))

    mask = torch.zeros_like(trace.scored).index_copy(0, steps, trace.scored[steps])
    return TokenLogp(
        logp=place(scores.logp).flatten(1),
        mask=flatten_steps(mask),
        entropy=None if scores.entropy is None else place(scores.entropy).flatten(1),
        experts=None if scores.experts is None else place(scores.experts, -1).transpose(0, 1),
    )
