"""Mean-field surrogate: every token scored from the all-masked plan (d1, 2504.12216; WAM-Diff, 2512.11872).

``sum_i log p(y_i | all masked, c)`` in one forward pass. It leaves out all dependence between tokens, so it is the
log-probability of the rollout only for one-step decoding or for a policy whose tokens do not depend on each other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_drive.errors import ConfigError
from rlhf_drive.likelihood.base import Probes, TokenLogp, Unprobed
from rlhf_drive.likelihood.probes import score_probes
from rlhf_drive.policies.moe import RouterRecord
from rlhf_drive.policies.process import Denoiser
from rlhf_drive.policies.trace import DecodeTrace

__all__ = ["MeanFieldLikelihood", "mean_field_logp"]


class MeanFieldLikelihood(Unprobed):
    """The mean-field surrogate as a :class:`~rlhf_drive.likelihood.base.LikelihoodEstimator`.

    Having no probes, it replays the routing that the trace holds for the state before the first step: its own state.
    """

    name, has_ratio, visits_steps, behaviour = "mean_field", True, False, False

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
        """Log-probabilities ``[N, L]``; routing ``[1, N, layers, A]``, as `DecodeTrace.experts` takes it."""
        del probes
        if steps is not None:
            raise ConfigError("The mean-field likelihood visits no decode steps to choose from; use 'trace'.")
        hidden = torch.ones_like(trace.scored[:1])
        experts = None if trace.experts is None else trace.experts[:1]
        copies = Probes(hidden=hidden, weight=hidden.float(), experts=experts)
        return score_probes(
            self.name, policy, context, trace, copies,
            max_tokens=max_tokens, entropy=entropy, keep_experts=keep_experts, record=record,
        )  # fmt: skip


def mean_field_logp(policy: Denoiser, context: Any, trace: DecodeTrace, *, max_rows: int = 0) -> tuple[Tensor, Tensor]:
    """``log p(y_l | all masked, c)`` for each finished token of the trace.

    Args:
        policy: The denoiser whose probability is asked for.
        context: The S encoded scenes; N is a multiple of S, scene-major.
        trace: What the sampler did; its final tokens, temperature and top-k are used.
        max_rows: Taken for the common signature; there is one row per rollout, and all go at once.

    Returns:
        Log-probabilities ``[N, L]`` and mask ``[N, L]`` bool, all True.

    Raises:
        ConfigError: If the trace was decoded greedily, or its process has no masked states.
    """
    del max_rows
    result = MeanFieldLikelihood()(policy, context, trace)
    return result.logp, result.mask
