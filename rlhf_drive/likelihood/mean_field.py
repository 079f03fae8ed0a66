"""Mean-field surrogate: every token scored from the all-masked plan (d1, 2504.12216; WAM-Diff, 2512.11872).

``sum_i log p(y_i | all masked, c)`` in one forward pass. It leaves out all dependence between tokens, so it is the
log-probability of the rollout only for one-step decoding or for a policy whose tokens do not depend on each other.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from rlhf_drive.likelihood.trace import trace_logp
from rlhf_drive.policies.process import Denoiser
from rlhf_drive.policies.trace import DecodeTrace

__all__ = ["mean_field_logp"]


def mean_field_logp(policy: Denoiser, context: Any, trace: DecodeTrace, *, max_rows: int = 0) -> tuple[Tensor, Tensor]:
    """``log p(y_l | state before the first step, c)`` for each finished token of the trace.

    Args:
        policy: The denoiser whose probability is asked for.
        context: The S encoded scenes; N is a multiple of S, scene-major.
        trace: What the sampler did; its final tokens, first state, temperature and top-k are used.
        max_rows: Taken for the common signature; there is one row per rollout, and all go at once.

    Returns:
        Log-probabilities ``[N, L]``, 0 where not scored, and mask ``[N, L]`` bool.

    Raises:
        ConfigError: If the trace was decoded greedily.
    """
    one_step = replace(
        trace,
        state=trace.state[:1],
        action=trace.tokens[None],
        scored=trace.scored.any(dim=0, keepdim=True),
        time=trace.time[:1],
    )
    return trace_logp(policy, context, one_step, max_rows=max_rows)
