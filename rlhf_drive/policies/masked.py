"""Masked diffusion over action tokens: corruption, SFT loss, and decoding with an exact trace (WAM-Diff, LLaDA)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rlhf_drive.errors import ConfigError
from rlhf_drive.policies.moe import RouterRecord
from rlhf_drive.policies.process import Decoding, Denoiser
from rlhf_drive.policies.tokenizer import TrajectoryTokenizer
from rlhf_drive.policies.trace import DecodeTrace

__all__ = ["MaskedDiffusion", "corrupt", "draw", "reveal_steps", "sample", "sft_loss", "tempered_log_softmax"]


def reveal_steps(length: int, steps: int) -> list[int]:
    """How many positions each of K steps reveals: as even as possible, the larger ones first; K is cut to L.

    Example: ``reveal_steps(5, 3) == [2, 2, 1]``.
    """
    steps = min(steps, length)
    return [length // steps + (k < length % steps) for k in range(steps)]


def tempered_log_softmax(logits: Tensor, temperature: float, top_k: int) -> Tensor:
    """``log softmax(logits / temperature)`` over the `top_k` most probable tokens, -inf elsewhere; float32.

    Args:
        logits: ``[M, V]``.
        temperature: > 0.
        top_k: 0 keeps all tokens. Ties at the k-th logit are all kept.
    """
    scaled = logits.float() / temperature
    if 0 < top_k < scaled.shape[-1]:
        floor = scaled.topk(top_k, dim=-1).values[..., -1:]
        scaled = scaled.masked_fill(scaled < floor, -torch.inf)
    return torch.log_softmax(scaled, dim=-1)


def draw(logits: Tensor, uniform: Tensor, temperature: float, top_k: int) -> tuple[Tensor, Tensor]:
    """One token per row by inverse transform, and its log-probability.

    Args:
        logits: ``[M, V]``.
        uniform: ``[M]`` in [0, 1): the row's own random number, so that the draw does not depend on its batch.
        temperature: 0 takes the argmax, with log-probability 0.
        top_k: See :func:`tempered_log_softmax`.

    Returns:
        Tokens ``[M]`` long and log-probabilities ``[M]`` float32.
    """
    if temperature == 0:
        return logits.argmax(dim=-1), torch.zeros(len(logits), device=logits.device)
    logp = tempered_log_softmax(logits, temperature, top_k)
    cumulative = logp.double().exp().cumsum(dim=-1)
    target = (uniform.to(cumulative) * cumulative[:, -1])[:, None]
    token = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    # A draw within rounding of 1 may step past the last token of the support.
    last = logits.shape[-1] - 1 - logp.flip(-1).isfinite().int().argmax(dim=-1)
    token = torch.minimum(token, last)
    return token, logp.gather(-1, token[:, None]).squeeze(-1)


def _select(rank: Tensor, hidden: Tensor, count: int) -> Tensor:
    """``[N, L]`` bool: the `count` hidden positions of lowest `rank` in each row."""
    key = rank.masked_fill(~hidden, torch.inf)
    chosen = torch.zeros_like(hidden)
    return chosen.scatter(1, key.argsort(dim=1, stable=True)[:, :count], True)


def _fixed_rank(order: str, uniform: Tensor) -> Tensor:
    """``[N, L]`` the rank by which a weight-independent order reveals positions."""
    position = torch.arange(uniform.shape[1], device=uniform.device, dtype=uniform.dtype).expand_as(uniform)
    return {"causal": position, "reverse_causal": -position, "random": uniform}[order]


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
    """Decode one plan per row from all-masked, recording the exact trace.

    Order `confidence` reveals the positions whose tempered distribution has the largest maximum: a function of the
    current state alone. Its trace likelihood is exact for the weights that sampled; for other weights the schedule
    counts as frozen environment.

    Args:
        denoiser: Network with S scenes encoded in `context`.
        context: Shared scene context; N is a multiple of S.
        uniforms: ``[N, 2, L]`` in [0, 1): numbers for the order, then for the draws, per row.
        decoding: Steps, order, temperature, top-k.
        seed: Recorded in the trace.
        weight_version: Recorded in the trace.
        keep_experts: Whether the trace takes the routing of each step's forward pass, to be replayed.
    """
    device = uniforms.device
    n, _, length = uniforms.shape
    state = torch.full((n, length), denoiser.vocab_size, dtype=torch.long, device=device)
    hidden = torch.ones(n, length, dtype=torch.bool, device=device)
    records: dict[str, list[Tensor]] = {"state": [], "action": [], "scored": [], "logp": []}
    times, experts = [], []
    for count in reveal_steps(length, decoding.steps):
        record = RouterRecord() if keep_experts else None
        share = 1.0 - hidden[0].float().mean().item()
        time = torch.full((n,), share, device=device)
        if decoding.order == "confidence":
            logits = denoiser.action_logits(state, time, context, hidden, record)
            best = tempered_log_softmax(logits, decoding.temperature or 1.0, decoding.top_k).amax(dim=-1)
            rank = torch.zeros(n, length, device=device).masked_scatter(hidden, -best)
            chosen = _select(rank, hidden, count)
            logits = logits[chosen[hidden]]
        else:
            chosen = _select(_fixed_rank(decoding.order, uniforms[:, 0]), hidden, count)
            logits = denoiser.action_logits(state, time, context, chosen, record)
        token, token_logp = draw(logits, uniforms[:, 1][chosen], decoding.temperature, decoding.top_k)
        action = torch.zeros_like(state).masked_scatter(chosen, token)
        logp = torch.zeros(n, length, device=device).masked_scatter(chosen, token_logp)
        for name, value in (("state", state), ("action", action), ("scored", chosen), ("logp", logp)):
            records[name].append(value)
        times.append(share)
        if record is not None:
            experts.append(record.choices())
        state = torch.where(chosen, action, state)
        hidden = hidden & ~chosen
    return DecodeTrace(
        state=torch.stack(records["state"]),
        action=torch.stack(records["action"]),
        scored=torch.stack(records["scored"]),
        logp=torch.stack(records["logp"]),
        time=torch.tensor(times, device=device),
        temperature=decoding.temperature,
        top_k=decoding.top_k,
        order=decoding.order,
        seed=seed,
        weight_version=weight_version,
        experts=torch.stack(experts) if experts else None,
    )


def corrupt(tokens: Tensor, mask_token: int, order: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Hide ``l ~ U{1..L}`` positions of each row: those that an order would reveal last.

    With order `random` the hidden set is uniform given its size, which is the masked-diffusion bound of LLaDA with the
    weight ``L / l`` per hidden token; `causal` and `reverse_causal` give the states that those decoders visit; `mixed`
    takes each row's order at random, half uniform, half causal.

    Args:
        tokens: ``[N, L]`` long.
        mask_token: V.
        order: `random`, `causal`, `reverse_causal` or `mixed`.
        generator: Source of all randomness, on the tokens' device.

    Returns:
        State ``[N, L]`` and hidden ``[N, L]`` bool.
    """
    n, length = tokens.shape
    uniform = torch.rand(n, length, generator=generator, device=tokens.device)
    count = torch.randint(1, length + 1, (n, 1), generator=generator, device=tokens.device)
    if order == "mixed":
        causal = torch.rand(n, 1, generator=generator, device=tokens.device) < 0.5
        rank = torch.where(causal, _fixed_rank("causal", uniform), uniform)
    else:
        rank = _fixed_rank(order, uniform)
    place = rank.argsort(dim=1).argsort(dim=1)
    hidden = place >= length - count
    return torch.where(hidden, mask_token, tokens), hidden


def sft_loss(
    denoiser: Denoiser,
    tokens: Tensor,
    context: Any,
    order: str,
    generator: torch.Generator,
    record: RouterRecord | None = None,
) -> Tensor:
    """Masked-diffusion bound per row: ``mean over hidden positions of -log p(token | state)``, nats per token, ``[N]``.

    Its expectation over masks of order `random` times L bounds ``-log p(tokens)`` from above (LLaDA eq. 3 with the
    number of masked tokens drawn first). With a fixed order it trains the states that this decoder visits, on all
    positions still hidden there and not on the next ones alone: no bound, but right for any number of steps.
    """
    state, hidden = corrupt(tokens, denoiser.vocab_size, order, generator)
    time = 1.0 - hidden.float().mean(dim=1)
    logits = denoiser.action_logits(state, time, context, hidden, record)
    nll = torch.nn.functional.cross_entropy(logits, tokens[hidden], reduction="none")
    per_position = torch.zeros(tokens.shape, device=tokens.device).masked_scatter(hidden, nll)
    return per_position.sum(dim=1) / hidden.sum(dim=1)


class MaskedDiffusion:
    """The masked-diffusion process: all-masked to a full plan, some positions at a time."""

    name, causal, timed = "masked", False, False
    sample = staticmethod(sample)
    sft_loss = staticmethod(sft_loss)

    def __init__(self, tokenizer: TrajectoryTokenizer | None = None) -> None:
        del tokenizer  # masking does not look at what tokens stand for

    def options(self) -> Mapping[str, float]:
        """None."""
        return {}

    def uniforms_shape(self, length: int, decoding: Decoding) -> tuple[int, ...]:
        """Numbers for the order, then for the draws."""
        del decoding
        return 2, length

    def check(self, length: int, decoding: Decoding) -> None:
        """ConfigError for order `all`, which has no meaning here."""
        del length
        if decoding.order == "all":
            raise ConfigError("Order 'all' decides every position at every step; a masked policy reveals each once.")
