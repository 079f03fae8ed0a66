"""Routers in RL: frozen if the recipe says so, and what is logged about them."""

from __future__ import annotations

from rlhf_drive.policies import Policy
from rlhf_drive.policies.moe import RouterRecord

__all__ = ["freeze_router", "routing_metrics"]


def freeze_router(policy: Policy) -> None:
    """Stop gradients of all router weights."""
    for name, parameter in policy.named_parameters():
        if name.endswith("router.weight"):
            parameter.requires_grad_(False)


def routing_metrics(routing: RouterRecord, first: RouterRecord) -> dict[str, float]:
    """Of the first micro-batch: how even the load is, and the share of slots whose expert is, or without replay would
    be, another than in the first pass."""
    return {
        "moe/load_cv": routing.load_cv(),
        "moe/routing_flip_frac": routing.flips(first) if routing.replay is None else routing.replay_flip_frac(),
        "moe/dropped_frac": routing.dropped_frac(),
    }
