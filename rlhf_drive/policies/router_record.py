"""What the routers of a forward pass chose: noted for losses and metrics, replayed, and safe to compute again.

An importance ratio compares one sample under two sets of weights. Where an expert flips in between, the ratio jumps by
more than the update did, so the pass of the new weights may replay the experts of an earlier one (routing replay, GSPO
2507.18071 sec. 5.3). Only indices are replayed: gates come from the live router, with gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlhf_drive.errors import DataError
from rlhf_drive.policies import expert_choice, token_choice

__all__ = ["RouterRecord"]


class RouterRecord:
    """Each MoE layer's routing during one forward pass: noted for losses and metrics, or replayed.

    One record serves one pass. Activation checkpointing computes layers again in the backward pass: they find their
    choice here, so that rounding cannot flip an expert between the two, and note nothing twice.

    Not a dataclass: hooks that divide weights over processes take those apart and hand a layer a copy to note in.
    """

    def __init__(
        self,
        logits: list[Tensor] | None = None,
        chosen: list[Tensor] | None = None,
        replay: Tensor | None = None,
        rows: int = 0,
    ) -> None:
        self.logits = [] if logits is None else logits
        """Per layer ``[n, E]`` float32 router logits of ``n = N * L`` tokens."""
        self.chosen = [] if chosen is None else chosen
        """Per layer ``[n, k]`` expert indices (token choice), or ``[N, E, c]`` token positions within the row (expert
        choice)."""
        self.replay = replay
        """``[N, layers, A]`` choices of an earlier pass over the same N rows, to be used instead of the live ones;
        gates are computed from the live router logits."""
        self.rows = rows
        """N, rows of the pass; set by the first layer."""

    def earlier(self, layer: int, shape: tuple[int, ...], rows: int) -> Tensor | None:
        """The choice that `layer` must make, in its `shape`: its own when it is computed again, else the replayed one;
        None where the live router decides.

        Raises:
            DataError: The record was used by another pass, or what it replays does not fit this one.
        """
        if layer < len(self.chosen):
            # Only a backward pass computes a layer twice, and then a graph task is running.
            if torch._C._current_graph_task_id() < 0:
                raise DataError("A RouterRecord serves one forward pass, and this one is used; make a new one.")
            return self.chosen[layer]
        if self.replay is None:
            return None
        slots = math.prod(shape) // max(rows, 1)
        if self.replay.ndim != 3 or layer >= self.replay.shape[1] or self.replay.shape[::2] != (rows, slots):
            raise DataError(
                f"Routing of shape {tuple(self.replay.shape)} cannot be replayed in MoE layer {layer} with {rows} rows "
                f"of {slots} choices; record it with the same architecture and hand over the same rows."
            )
        return self.replay[:, layer].reshape(shape).long()

    def note(self, layer: int, logits: Tensor, chosen: Tensor, rows: int) -> None:
        """Take a layer's routing; nothing when the layer is computed again."""
        if layer == len(self.chosen):
            self.rows = rows
            self.logits.append(logits)
            self.chosen.append(chosen)

    def choices(self) -> Tensor:
        """``[N, layers, A]`` the routing of this pass, in the form that `replay` takes: A is ``L * k`` expert indices
        (token choice) or ``E * c`` token positions (expert choice). int16, or int32 where those numbers do not fit."""
        largest = max(max(logits.shape[-1], len(logits) // self.rows) for logits in self.logits)
        dtype = torch.int16 if largest <= torch.iinfo(torch.int16).max else torch.int32
        return torch.stack([chosen.view(self.rows, -1) for chosen in self.chosen], dim=1).to(dtype)

    def load(self, layer: int) -> Tensor:
        """``[E]`` share of the layer's token slots that each expert received; all alike under expert choice."""
        logits, chosen = self.logits[layer], self.chosen[layer]
        experts = logits.shape[-1]
        if chosen.ndim == 3:
            return torch.full((experts,), 1.0 / experts, device=logits.device)
        counts = torch.bincount(chosen.flatten(), minlength=experts).float()
        return counts / counts.sum()

    def balance_loss(self) -> Tensor:
        """Load-balance loss ``E * sum_e f_e P_e`` (Switch Transformer eq. 4), mean over layers; 1 when balanced."""
        losses = [
            logits.shape[-1] * (self.load(i) * logits.softmax(dim=-1).mean(dim=0)).sum()
            for i, logits in enumerate(self.logits)
        ]
        return torch.stack(losses).mean()

    def z_loss(self) -> Tensor:
        """Router z-loss ``mean(logsumexp(logits)^2)`` (ST-MoE eq. 5), mean over layers."""
        return torch.stack([logits.logsumexp(dim=-1).square().mean() for logits in self.logits]).mean()

    def load_cv(self) -> float:
        """Coefficient of variation of expert load, mean over layers; 0 when balanced, ``sqrt(E-1)`` when collapsed."""
        loads = torch.stack([self.load(i) for i in range(len(self.logits))])
        return float((loads.std(dim=-1, correction=0) / loads.mean(dim=-1)).mean())

    def flips(self, old: RouterRecord) -> float:
        """Share of token slots whose expert the same token did not have in an earlier pass over the same rows."""
        return _mean([_moved(new, before) for new, before in zip(self.chosen, old.chosen, strict=True)])

    def replay_flip_frac(self) -> float:
        """Share of token slots that the live router would have filled otherwise; 0 where nothing is replayed."""
        if self.replay is None:
            return 0.0
        return _mean([_moved(chosen, self._live(i)) for i, chosen in enumerate(self.chosen)])

    def _live(self, layer: int) -> Tensor:
        """What the layer's router would have chosen by itself, in the shape of `chosen`."""
        logits, chosen = self.logits[layer], self.chosen[layer]
        if chosen.ndim == 3:
            return expert_choice.choose(logits.view(self.rows, -1, logits.shape[-1]), chosen.shape[-1])
        return token_choice.choose(logits, chosen.shape[-1])

    def dropped_frac(self) -> float:
        """Share of tokens that no expert but the shared one saw, mean over layers; always 0 under token choice."""
        return _mean([self._dropped(i) for i in range(len(self.chosen))])

    def _dropped(self, layer: int) -> Tensor:
        logits, chosen = self.logits[layer], self.chosen[layer]
        if chosen.ndim == 2:
            return logits.new_zeros(())
        seen = torch.zeros(self.rows, len(logits) // self.rows, dtype=torch.bool, device=logits.device)
        return 1.0 - seen.scatter(1, chosen.flatten(1), True).float().mean()


def _moved(new: Tensor, before: Tensor) -> Tensor:
    """Share of the entries ``[..., k]`` of `new` that are not among those of `before` in the same place."""
    return 1.0 - (new[..., :, None] == before[..., None, :]).any(dim=-1).float().mean()


def _mean(values: list[Tensor]) -> float:
    return float(torch.stack(values).mean())
