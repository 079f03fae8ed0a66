"""Native sparse-MoE transformer: scene encoder, and a trajectory decoder isolated from it, bidirectional or causal.

Scene tokens never attend to action tokens, so the encoded scene, with each decoder layer's cross-attention keys and
values, is computed once per scene and shared by all samples and all decode states.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from rlhf_drive.policies.inputs import (
    AGENT_FEATURES,
    EGO_FEATURES,
    ROUTE_FEATURES,
    ObservationBatch,
    polyline_features,
)
from rlhf_drive.policies.moe import RouterRecord, SparseMoE
from rlhf_drive.policies.plan_state import DEVIATION_FEATURES, plan_deviation
from rlhf_drive.policies.route import ROUTE_PIECES
from rlhf_drive.policies.time_conditioning import TimeConditioning

__all__ = ["SceneContext", "SceneEncoder", "TrajectoryDecoder"]


@dataclass(frozen=True)
class SceneContext:
    """S encoded scenes."""

    keys: tuple[Tensor, ...]
    """Per decoder layer ``[S, heads, M, d_head]``."""
    values: tuple[Tensor, ...]
    """Per decoder layer ``[S, heads, M, d_head]``."""
    mask: Tensor
    """``[S, 1, 1, M]`` bool, True where a scene token may be attended to."""
    summary: Tensor
    """``[S, d]`` the scene's global token."""
    anchor: Tensor
    """``[S, L]`` metres: the numbers that encode driving on along the route at the present speed."""

    def __len__(self) -> int:
        return int(self.summary.shape[0])

    def scene(self, index: int) -> SceneContext:
        """One of the scenes, as a context of its own."""
        one = slice(index, index + 1)
        keys, values = (tuple(part[one] for part in parts) for parts in (self.keys, self.values))
        return SceneContext(keys, values, self.mask[one], self.summary[one], self.anchor[one])


def _mlp(inputs: int, dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, dim), nn.GELU(), nn.Linear(dim, dim))


def _heads(x: Tensor, heads: int) -> Tensor:
    """``[B, n, d] -> [B, heads, n, d / heads]``."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


PlanPast = list[list[Tensor]]
"""By causal layer, keys and values ``[N, heads, l, d_head]`` of the l positions seen so far; both absent at first."""


class SelfAttention(nn.Module):
    """Multi-head self-attention: bidirectional, or from each position to itself and those before it."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, causal: bool = False, past: list[Tensor] | None = None
    ) -> Tensor:
        """``[B, n, d] -> [B, n, d]``; `mask` ``[B, 1, 1, n]`` True where a token may be attended to.

        With `past`, `x` is the one position that follows those in it, and it is added to them.
        """
        q, k, v = (_heads(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        if past is not None:
            k, v = (torch.cat([*old, new], dim=2) for old, new in ((past[:1], k), (past[1:], v)))
            past[:] = k, v
        dropout = self.dropout if self.training else 0.0
        causal = causal and past is None
        mixed = functional.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal)
        return self.out(mixed.transpose(1, 2).flatten(2))


class EncoderLayer(nn.Module):
    """Pre-norm transformer layer over scene tokens."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm_attention, self.norm_mlp = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = SelfAttention(dim, heads, dropout)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """``[S, M, d] -> [S, M, d]``."""
        x = x + self.drop(self.attention(self.norm_attention(x), mask))
        return x + self.drop(self.mlp(self.norm_mlp(x)))


class SceneEncoder(nn.Module):
    """Vectorised observation to scene tokens: one global token, route pieces, agents, map pieces."""

    def __init__(self, dim: int, heads: int, layers: int, points: int, dropout: float) -> None:
        super().__init__()
        self.glob = _mlp(EGO_FEATURES + ROUTE_PIECES * ROUTE_FEATURES, dim)
        self.route = _mlp(ROUTE_FEATURES, dim)
        self.agent = _mlp(AGENT_FEATURES, dim)
        self.line = _mlp(polyline_features(points), dim)
        self.piece = nn.Parameter(torch.randn(ROUTE_PIECES, dim) * 0.02)
        self.layers = nn.ModuleList(EncoderLayer(dim, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)

    def forward(self, batch: ObservationBatch) -> tuple[Tensor, Tensor]:
        """Scene tokens ``[S, M, d]`` (global token first) and mask ``[S, 1, 1, M]``."""
        glob = self.glob(torch.cat([batch.ego, batch.route.flatten(1)], dim=-1))[:, None]
        route = self.route(batch.route) + self.piece
        x = torch.cat([glob, route, self.agent(batch.agents), self.line(batch.lines)], dim=1)
        always = torch.ones(len(batch), 1 + route.shape[1], dtype=torch.bool, device=x.device)
        mask = torch.cat([always, batch.agents_mask, batch.lines_mask], dim=1)[:, None, None]
        for layer in self.layers:
            x = layer(x, mask)
        return self.norm(x), mask


class DecoderLayer(nn.Module):
    """Self-attention among the plan's tokens, cross-attention to the cached scene, sparse MoE."""

    def __init__(
        self, dim: int, heads: int, experts: int, top_k: int, expert_dim: int, dropout: float, *,
        routing: str = "token_choice", capacity_factor: float = 0.25, index: int = 0,
    ) -> None:  # fmt: skip
        """The decoder's layer number `index`."""
        super().__init__()
        self.heads = heads
        self.norm_self, self.norm_cross, self.norm_moe = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = SelfAttention(dim, heads, dropout)
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)
        self.moe = SparseMoE(
            dim, expert_dim, experts, top_k, routing=routing, capacity_factor=capacity_factor, layer=index
        )
        self.drop = nn.Dropout(dropout)

    def scene(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[S, heads, M, d_head]`` of the scene tokens for this layer."""
        key, value = self.key_value(tokens).chunk(2, dim=-1)
        return _heads(key, self.heads), _heads(value, self.heads)

    def forward(
        self, x: Tensor, key: Tensor, value: Tensor, mask: Tensor, record: RouterRecord | None,
        causal: bool = False, past: list[Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """``[N, L, d] -> [N, L, d]``; all rows of a scene query its keys together, nothing is repeated per row."""
        n, length, dim = x.shape
        x = x + self.drop(self.attention(self.norm_self(x), causal=causal, past=past))
        query = _heads(self.query(self.norm_cross(x)).reshape(len(key), -1, dim), self.heads)
        seen = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        x = x + self.drop(self.out(seen.transpose(1, 2).reshape(n, length, dim)))
        return x + self.drop(self.moe(self.norm_moe(x), record))


class TrajectoryDecoder(nn.Module):
    """Plan tokens to hidden states. Tokens are embedded by their numeric value, also relative to the
    anchor plan, with a learned table on top, so that neighbouring numbers start as neighbours.

    A causal decoder feeds position l the token before it, with the mask's embedding as the marker of the plan's begin,
    and where the plan has got to before the pose that l belongs to; so its output at l depends on tokens before l
    alone, whatever stands at l and after it.
    """

    WAVELENGTHS_M = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)

    def __init__(
        self, vocab: int, length: int, encoding: str, dim: int, heads: int, layers: int, experts: int, top_k: int,
        expert_dim: int, dropout: float, *, causal: bool = False, routing: str = "token_choice",
        capacity_factor: float = 0.25,
    ) -> None:  # fmt: skip
        super().__init__()
        self.mask_token, self.encoding, self.causal = vocab, encoding, causal
        self.table = nn.Embedding(vocab + 1, dim)
        self.value = nn.Linear(4 * len(self.WAVELENGTHS_M) + 1, dim)
        self.deviation = nn.Linear(DEVIATION_FEATURES, dim)
        self.position = nn.Parameter(torch.randn(length, dim) * 0.02)
        self.condition = nn.Linear(dim, dim)
        self.anchor = nn.Linear(1, dim)
        self.layers = nn.ModuleList(
            DecoderLayer(
                dim, heads, experts, top_k, expert_dim, dropout,
                routing=routing, capacity_factor=capacity_factor, index=index,
            )
            for index in range(layers)
        )  # fmt: skip
        self.norm = nn.LayerNorm(dim)
        self.checkpointing = False  # whether layers keep their input alone and are computed again in the backward pass
        nn.init.normal_(self.table.weight, std=0.02)
        self.time: TimeConditioning | None = None

    def attend_to_time(self) -> None:
        """Tell the network the process time from now on. Called last, so that other weights are drawn as without."""
        self.time = TimeConditioning(self.position.shape[1])

    def waves(self, metres: Tensor) -> Tensor:
        """Sines and cosines of a number at octave wavelengths, ``[..., 2 * wavelengths]``."""
        frequency = 2.0 * torch.pi / torch.tensor(self.WAVELENGTHS_M, device=metres.device)
        phase = metres[..., None] * frequency
        return torch.cat([phase.sin(), phase.cos()], dim=-1)

    def embed(self, state: Tensor, values: Tensor, context: SceneContext, position: int | None = None) -> Tensor:
        """``[N, L, d]`` embeddings of partly hidden plans, or ``[N, 1, d]`` of one position of a causal decoder.

        `values` ``[V + 1]`` metres, 0 for the mask.
        """
        per_scene = len(state) // len(context)
        at = slice(None) if position is None else slice(position, position + 1)
        read = slice(max(at.start - 1, 0), at.start) if at.start is not None else slice(-1 if self.causal else None)
        anchor = context.anchor.repeat_interleave(per_scene, dim=0)
        metres = values[state]
        tokens = self._tokens(state[:, read], metres[:, read], anchor[:, read])
        if self.causal and not position:
            tokens = torch.cat([self.table.weight[self.mask_token].expand(len(state), 1, -1), tokens], dim=1)
        numbers = torch.where(state == self.mask_token, anchor, metres)
        deviation = plan_deviation(numbers, context.anchor, self.encoding)
        deviation = self.deviation(deviation if position is None else deviation[:, position // 2, None])
        deviation = deviation.repeat_interleave(2 if position is None else 1, dim=1)
        scene = self.condition(context.summary)[:, None] + self.anchor(context.anchor[:, at, None] / 20.0)
        scene = (scene + self.position[at]).repeat_interleave(per_scene, dim=0)
        return tokens + deviation + scene

    def _tokens(self, state: Tensor, metres: Tensor, anchor: Tensor) -> Tensor:
        """``[N, n, d]`` embeddings of tokens by themselves."""
        offset = metres - anchor
        features = torch.cat([self.waves(metres), self.waves(offset), (offset / 4.0).tanh()[..., None]], dim=-1)
        features = features.masked_fill((state == self.mask_token)[..., None], 0.0)
        return self.table(state) + self.value(features)

    def forward(
        self, state: Tensor, time: Tensor, values: Tensor, context: SceneContext, record: RouterRecord | None
    ) -> Tensor:
        """Hidden states ``[N, L, d]`` of rows ``[N, L]``, scene-major over the context's scenes."""
        x = self.embed(state, values, context)
        if self.time is not None:
            x = self.time(x, time)
        again = self.checkpointing and torch.is_grad_enabled()
        if again and record is None:
            record = RouterRecord()  # so that a layer computed again routes as it did
        for layer, key, value in zip(self.layers, context.keys, context.values, strict=True):
            inputs = (x, key, value, context.mask, record, self.causal)
            x = checkpoint(layer, *inputs, use_reentrant=False) if again else layer(*inputs)
        return self.norm(x)

    def next(
        self, state: Tensor, position: int, values: Tensor, context: SceneContext, past: PlanPast,
        record: RouterRecord | None,
    ) -> Tensor:  # fmt: skip
        """Hidden state ``[N, d]`` of one position of a causal decoder; `past` holds those before it and takes it in."""
        x = self.embed(state, values, context, position)
        for layer, key, value, old in zip(self.layers, context.keys, context.values, past, strict=True):
            x = layer(x, key, value, context.mask, record, True, old)
        return self.norm(x)[:, 0]
