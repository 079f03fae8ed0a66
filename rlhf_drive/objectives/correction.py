"""Weights for samples that other weights have drawn than those the update starts from.

Three policies take part: the behaviour policy ``b`` drew the tokens, the old policy ``o`` is where the update starts,
``pi`` is what is trained. The objective's ratio ``pi / o`` and its trust region stay as they are; each term is
multiplied with the constant ``min(o / b, cap)``. That is the decoupled objective of AReaL (2505.24298), and truncated
importance sampling: TRL's ``token_truncate`` and ``sequence_truncate``.

What the weight makes right, with ``d_t = log o_t - log b_t`` and no cap:

* ``sequence`` and ``sequence_token``: ``exp(sum_t d_t)``, the ratio of the whole rollout. At ``pi = o`` the gradient's
  expectation over samples of ``b`` is that over samples of ``o``: no bias. The geometric mean ``exp(mean_t d_t)``, by
  which the objective measures how far ``pi`` has moved, is no weight for this: it gives, up to a factor, expectations
  under ``b^(1 - 1/T) o^(1/T)``, which among T tokens is one T-th of the way from ``b`` to ``o``.
* ``token``: ``exp(d_t)`` for each token. The token is weighed as ``o`` would draw it, in a state that ``b`` led to and
  with the return that ``b`` went on to get: ``sum_t E_{s ~ b} sum_a grad o(a | s) Q_b(s, a)``, one step of policy
  improvement of ``b``. Biased, but the weights of many tokens do not multiply.
* ``step``: the same with decode steps, ``exp`` of the sum of ``d_t`` over the tokens decided together.

The cap bounds from above only: a rollout that ``o`` would hardly draw may count as little as it likes. Denominators
stay counts of rows and tokens; they are not sums of weights. KL and entropy terms are not weighed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_drive.objectives.base import LossInputs
from rlhf_drive.objectives.importance import ImportanceSamplingLevel, log_ratio_sum

__all__ = ["importance_correction"]


def importance_correction(inputs: LossInputs, level: ImportanceSamplingLevel, cap: float) -> Tensor:
    """``min(exp(sum of old_logp - behaviour_logp), cap)`` over each token, decode step or row; no gradient.

    For an objective of one's own, which has to multiply its terms with it.

    Args:
        inputs: With `behaviour_logp`; values where nothing is scored or looked at may be anything.
        level: One of `IMPORTANCE_SAMPLING_LEVELS`; `sequence_token` is weighed as `sequence`.
        cap: Largest weight, positive; ``math.inf`` for none.

    Returns:
        ``[N, T]``, 1 where nothing is scored; ``[N, 1]`` for whole rows. All ones without `behaviour_logp`.

    Example:
        >>> old, behaviour = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.5]]).log()
        >>> mask = torch.ones(1, 2, dtype=torch.bool)
        >>> inputs = LossInputs(old, old, None, torch.ones(1), mask, behaviour_logp=behaviour)
        >>> importance_correction(inputs, "token", cap=1.5)
        tensor([[1.5000, 1.0000]])
    """
    old_logp = inputs.old_logp
    behaviour_logp = old_logp if inputs.behaviour_logp is None else inputs.behaviour_logp
    seen = inputs.mask & inputs.learned_rows()[:, None]
    if inputs.weight is not None:
        seen = seen & (inputs.weight > 0)
    with torch.no_grad():
        weight = log_ratio_sum(old_logp, behaviour_logp, seen, level, inputs.step_of).exp()
        return weight.clamp(max=cap).to(old_logp.dtype)
