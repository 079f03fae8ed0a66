"""Sparse mixture of experts beside a shared expert."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from rlhf_drive.errors import DataError, UnknownNameError, did_you_mean
from rlhf_drive.policies import expert_choice, token_choice
from rlhf_drive.policies.dispatch import Pairs, mix_experts
from rlhf_drive.policies.router_record import RouterRecord

__all__ = ["ROUTINGS", "RouterRecord", "SparseMoE"]

ROUTINGS = ("token_choice", "expert_choice")
"""Who chooses: a token its `top_k` experts, or an expert its share of each row's tokens."""


class SparseMoE(nn.Module):
    """``shared(x) + sum over the routed experts of gate_e(x) expert_e(x)``, ``expert_e(x) = gelu(x @ up_e) @ down_e``.

    See :mod:`~rlhf_drive.policies.token_choice` and :mod:`~rlhf_drive.policies.expert_choice` for who is routed where
    and with what gate. With both, a row's output depends on that row alone.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        experts: int,
        top_k: int,
        *,
        routing: str = "token_choice",
        capacity_factor: float = 0.25,
        layer: int = 0,
    ) -> None:
        """An MoE block.

        Args:
            dim: Width of tokens.
            hidden: Width inside an expert.
            experts: E.
            top_k: Experts a token chooses; expert choice does not look at it.
            routing: One of `ROUTINGS`.
            capacity_factor: Share of a row's tokens that each expert takes, in (0, 1]; token choice ignores it.
            layer: The block's place among those that share a record.
        """
        super().__init__()
        if routing not in ROUTINGS:
            raise UnknownNameError(f"Unknown routing {routing!r}. {did_you_mean(routing, ROUTINGS)}")
        self.top_k, self.routing, self.capacity_factor, self.layer = top_k, routing, capacity_factor, layer
        self.kernel = "auto"
        self.router = nn.Linear(dim, experts, bias=False)
        self.up = nn.Parameter(torch.empty(experts, dim, hidden))
        self.down = nn.Parameter(torch.empty(experts, hidden, dim))
        self.shared = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        for weight in (self.up, self.down):
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)

    def _logits(self, x: Tensor) -> Tensor:
        """``[..., E]`` router logits, at least in float32 whatever the dtype of the weights or of autocast."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return functional.linear(x.to(dtype), self.router.weight.to(dtype))

    def _route(self, logits: Tensor, record: RouterRecord | None) -> Pairs:
        """Who goes where: as the record says, where it holds an earlier choice, else as the live logits say."""
        rows, experts = len(logits), logits.shape[-1]
        if self.routing == "expert_choice":
            if logits.ndim != 3:
                raise DataError(f"Expert choice needs rows of tokens, [N, L, dim]; got {logits.ndim - 1} dimensions.")
            length = logits.shape[1]
            c = expert_choice.capacity(length, self.capacity_factor)
            chosen = None if record is None else record.earlier(self.layer, (rows, experts, c), rows)
            if chosen is None:
                chosen = expert_choice.choose(logits, c)
            pairs = expert_choice.pair_up(chosen, expert_choice.gates(logits, chosen), length)
            logits = logits.flatten(0, 1)
        else:
            logits = logits.view(-1, experts)
            chosen = None if record is None else record.earlier(self.layer, (len(logits), self.top_k), rows)
            if chosen is None:
                chosen = token_choice.choose(logits, self.top_k)
            pairs = token_choice.pair_up(chosen, token_choice.gates(logits, chosen), experts)
        if record is not None:
            record.note(self.layer, logits, chosen, rows)
        return pairs

    def forward(self, x: Tensor, record: RouterRecord | None = None) -> Tensor:
        """``[N, L, dim]`` (for token choice also ``[n, dim]``) to the same; notes this layer's routing in `record`, or
        replays it."""
        pairs = self._route(self._logits(x), record)
        routed = mix_experts(x.flatten(0, -2), self.up, self.down, pairs, self.kernel)
        return self.shared(x) + routed.view(x.shape)
