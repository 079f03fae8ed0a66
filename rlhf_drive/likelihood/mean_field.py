"""Mean-field surrogate: every token scored from the all-masked plan (d1, 2504.12216; WAM-Diff, 2512.11872).

``sum_i log p(y_i | all masked, c)`` in one forward pass. It leaves out all dependence between tokens, so it is the
log-probability of the rollout only for one-step decoding or for a policy whose tokens do not depend on each other.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from rlhf_drive.errors import DataError
from rlhf_drive.likelihood.base import Probes, TokenLogp
from rlhf_drive.likelihood.trace import trace_logp
from rlhf_drive.policies.moe import RouterRecord
from rlhf_drive.policies.process import Denoiser
from rlhf_drive.policies.trace import DecodeTrace

__all__ = ["MeanFieldLikelihood", "mean_field_logp"]


class MeanFieldLikelihood:
    """The mean-field surrogate as a :class:`~rlhf_drive.likelihood.base.LikelihoodEstimator`."""

    name, has_ratio, behaviour = "mean_field", True, False

    def probe_shape(self, length: int) -> None:
        """None: every plan is looked at from the state before the first step."""
        del length

    def draw(self, trace: DecodeTrace, uniforms: Tensor) -> Probes:
        """DataError: there is nothing to draw."""
        raise DataError("The mean-field likelihood has no probes.")

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
        """Log-probabilities ``[N, L]``."""
        del probes, max_tokens, entropy, keep_experts, steps, record
        return TokenLogp(*mean_field_logp(policy, context, trace))


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
