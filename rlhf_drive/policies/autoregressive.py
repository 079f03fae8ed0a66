"""Autoregressive decoding of action tokens on a causal network: teacher forcing, and sampling with an exact trace."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from rlhf_drive.errors import ConfigError
from rlhf_drive.policies.masked import draw
from rlhf_drive.policies.moe import RouterRecord
from rlhf_drive.policies.process import Decoding, Denoiser
from rlhf_drive.policies.tokenizer import TrajectoryTokenizer
from rlhf_drive.policies.trace import DecodeTrace

__all__ = ["Autoregressive", "CachedDenoiser", "sample", "sft_loss"]

NextLogits = Callable[[Tensor, int, RouterRecord | None], Tensor]
"""``(state [N, L], l, record) -> [N, V]``: logits of position l, called for l = 0, 1, …"""


@runtime_checkable
class CachedDenoiser(Denoiser, Protocol):
    """A causal network that remembers what it computed for a plan's first tokens."""

    def continuation(self, context: Any) -> NextLogits:
        """A function that gives the logits of position 0, then 1, …, each at the cost of one position."""


def _whole(denoiser: Denoiser, context: Any) -> NextLogits:
    """Such a function for a denoiser without memory: one forward over the whole state for each position."""

    def logits(state: Tensor, position: int, record: RouterRecord | None) -> Tensor:
        where = torch.zeros_like(state, dtype=torch.bool)
        where[:, position] = True
        time = torch.full((len(state),), position / state.shape[1], device=state.device)
        return denoiser.action_logits(state, time, context, where, record)

    return logits


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    context: Any,
    uniforms: Tensor,
    decoding: Decoding,
    *,
    seed: int = 0,
    weight_version: int = 0,
    keep_experts: bool = False,
) -> DecodeTrace:
    """Decode one plan per row, token by token, recording the exact trace: K = L, state k is the first k tokens.

    Args:
        denoiser: Causal network with S scenes encoded in `context`.
        context: Shared scene context; N is a multiple of S.
        uniforms: ``[N, 1, L]`` in [0, 1): numbers for the draws, per row.
        decoding: Temperature and top-k; steps must be L and order `causal`.
        seed: Recorded in the trace.
        weight_version: Recorded in the trace.
        keep_experts: Whether the trace takes the routing. A causal network routes position l alike in every state that
            holds the tokens before l, so one routing of the finished plan, ``[1, N, layers, A]``, stands for all steps.
    """
    n, _, length = uniforms.shape
    vocab, device = denoiser.vocab_size, uniforms.device
    remembers = isinstance(denoiser, CachedDenoiser)
    next_logits = denoiser.continuation(context) if isinstance(denoiser, CachedDenoiser) else _whole(denoiser, context)
    plan = torch.full((n, length), vocab, dtype=torch.long, device=device)
    logp = torch.zeros(n, length, device=device)
    experts: list[Tensor] = []
    for position in range(length):
        record = RouterRecord() if keep_experts else None
        logits = next_logits(plan, position, record)
        token, logp[:, position] = draw(logits, uniforms[:, 0, position], decoding.temperature, decoding.top_k)
        plan[:, position] = token
        if record is not None:
            experts.append(record.choices())
    # One row of experts a position from memory, or all positions' from the last whole state.
    routing = (torch.cat(experts, dim=-1) if remembers else experts[-1])[None] if keep_experts else None
    scored = torch.eye(length, dtype=torch.bool, device=device)[:, None].expand(-1, n, -1)
    decided = torch.ones(length, length, dtype=torch.bool, device=device).tril(-1)[:, None]
    return DecodeTrace(
        state=torch.where(decided, plan, vocab),
        action=torch.where(scored, plan, 0),
        scored=scored.contiguous(),
        logp=torch.where(scored, logp, 0.0),
        time=torch.arange(length, device=device) / length,
        temperature=decoding.temperature,
        top_k=decoding.top_k,
        order=decoding.order,
        seed=seed,
        weight_version=weight_version,
        experts=routing,
        prefix=True,
    )


def sft_loss(
    denoiser: Denoiser,
    tokens: Tensor,
    context: Any,
    order: str,
    generator: torch.Generator,
    record: RouterRecord | None = None,
) -> Tensor:
    """``-log p(tokens) / L`` per row, nats per token ``[N]``: all positions in one forward (teacher forcing).

    The network reads only tokens before each position, so `order` and `generator` have nothing to decide.
    """
    del order, generator
    time = torch.zeros(len(tokens), device=tokens.device)
    everywhere = torch.ones_like(tokens, dtype=torch.bool)
    logits = denoiser.action_logits(tokens, time, context, everywhere, record)
    nll = torch.nn.functional.cross_entropy(logits, tokens.flatten(), reduction="none")
    return nll.view(tokens.shape).mean(dim=1)


class Autoregressive:
    """The autoregressive process: the next token given the scene and all tokens before it."""

    name, causal, timed = "autoregressive", True, False
    sample = staticmethod(sample)
    sft_loss = staticmethod(sft_loss)

    def __init__(self, tokenizer: TrajectoryTokenizer | None = None) -> None:
        del tokenizer  # the next token is drawn whatever it stands for

    def options(self) -> Mapping[str, float]:
        """None."""
        return {}

    def uniforms_shape(self, length: int, decoding: Decoding) -> tuple[int, ...]:
        """Numbers for the draws."""
        del decoding
        return 1, length

    def check(self, length: int, decoding: Decoding) -> None:
        """ConfigError unless each step decides the next token."""
        if decoding.order != "causal" or decoding.steps != length:
            raise ConfigError(
                f"An autoregressive policy decides one token after the other; got {decoding.steps} steps in order "
                f"{decoding.order!r}. Set steps to {length} and order to causal."
            )
