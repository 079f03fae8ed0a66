"""One random share of hidden tokens per rollout (UniGRPO of MMaDA, 2505.15809).

A share ``t`` of the tokens is hidden, the hidden ones are scored, and their mean is the log-probability per token.
Times L it stands for ``log p(y)``, so a hidden token weighs ``L / |m|``. Several draws take evenly spaced shares from
one random start, ``t_j = (t_0 + j / n) mod 1``, the paper's structured noising: each share is uniform in [0, 1), and
together they cover it.

Tokens are hidden one by one, so that |m| is uniform over 0 … L. Where nothing would be hidden the token nearest to it
is, which makes a single hidden token twice as likely as it is under the evidence lower bound: the estimate leans
towards the plan's last tokens, those with everything else known.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_drive.likelihood.base import Probes
from rlhf_drive.likelihood.probes import ProbeLikelihood

__all__ = ["random_mask_likelihood", "random_mask_probes"]


def random_mask_likelihood(draws: int) -> ProbeLikelihood:
    """The estimator with `draws` evenly spaced shares."""

    def shape(length: int) -> tuple[int, ...]:
        return draws, 1 + length

    return ProbeLikelihood("random_mask", shape, random_mask_probes)


def random_mask_probes(uniforms: Tensor) -> Probes:
    """Hidden tokens weighed ``L / |m| / draws``.

    Args:
        uniforms: ``[N, draws, 1 + L]``: the share to start from (of the first draw; the others' are not used), then
            each position's number.
    """
    u = uniforms.transpose(0, 1)
    draws, _, length = u[..., 1:].shape
    spaced = torch.arange(draws, device=u.device, dtype=u.dtype)[:, None] / draws
    share = (u[:1, :, 0] + spaced).remainder(1.0)[..., None]
    position = u[..., 1:]
    hidden = (position < share) | (position == position.amin(dim=-1, keepdim=True))
    count = hidden.sum(dim=-1, keepdim=True).to(u.dtype)
    return Probes(hidden=hidden, weight=hidden * (length / (count * draws)))
