"""Plan states to scores, in as few forward passes as memory allows, all against one encoded context."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlhf_drive.likelihood.scoring import Scorer, draw_scores, score_draws
from rlhf_drive.policies.moe import RouterRecord
from rlhf_drive.policies.process import Denoiser

__all__ = ["RowScores", "StateRows", "score_rows"]


@dataclass(frozen=True)
class StateRows:
    """R plan states and what is to be scored in each; rows of a scene stand together, the same number for each."""

    state: Tensor
    """``[R, L]`` long: tokens that the network sees."""
    time: Tensor
    """``[R]`` float, process time."""
    action: Tensor
    """``[R, L]`` long: the tokens whose probability is asked for; arbitrary where not scored."""
    scored: Tensor
    """``[R, L]`` bool."""
    experts: Tensor | None = None
    """``[R, layers, A]`` int16: routing to be replayed; None lets the live router choose."""

    def take(self, index: Tensor) -> StateRows:
        """The rows in `index` (long)."""
        return StateRows(
            self.state[index],
            self.time[index],
            self.action[index],
            self.scored[index],
            None if self.experts is None else self.experts[index],
        )


@dataclass(frozen=True)
class RowScores:
    """Scores of R plan states."""

    logp: Tensor
    """``[R, L]`` log-probability of each scored token, 0 elsewhere."""
    entropy: Tensor | None
    """``[R, L]`` nats, 0 where not scored; None if not asked for."""
    experts: Tensor | None
    """``[R, layers, A]`` int16 routing; None if not asked for, or if the network has no experts."""


def score_rows(
    policy: Denoiser,
    context: Any,
    rows: StateRows,
    temperature: float,
    top_k: int,
    *,
    max_rows: int = 0,
    recompute: bool = True,
    entropy: bool = False,
    keep_experts: bool = False,
    record: RouterRecord | None = None,
    scorer: Scorer = draw_scores,
) -> RowScores:
    """Score all rows; values do not depend on how they are cut into passes.

    Every pass takes the same number of rows of each scene, so that all share the one context.

    Args:
        policy: The denoiser whose probability is asked for.
        context: The S encoded scenes; R is a multiple of S.
        rows: What to score.
        temperature: Temperature the tokens were drawn with.
        top_k: Support they were drawn from.
        max_rows: Most rows a forward pass, but at least one a scene; 0 takes all at once.
        recompute: Whether, of several passes under gradients, each is computed again in the backward pass instead of
            keeping its activations.
        entropy: Whether entropies are wanted.
        keep_experts: Whether the routing is wanted.
        record: Takes routing statistics of the first pass.
        scorer: What is asked of each scored position's logits.
    """
    scenes, total = len(context), len(rows.state)

    def one_pass(part: StateRows, first: bool) -> Callable[[], tuple[Tensor, Tensor | None, Tensor | None]]:
        return _pass(
            policy, context, part, temperature, top_k,
            entropy=entropy, keep_experts=keep_experts, record=record if first else None, scorer=scorer,
        )  # fmt: skip

    if not 0 < max_rows < total:
        return RowScores(*one_pass(rows, True)())
    numbers = torch.arange(total, device=rows.state.device).view(scenes, -1)
    results = []
    for i, index in enumerate(numbers.split(max(1, max_rows // scenes), dim=1)):
        call = one_pass(rows.take(index.flatten()), i == 0)
        results.append(checkpoint(call, use_reentrant=False) if recompute and torch.is_grad_enabled() else call())

    def joined(parts: list[Tensor | None]) -> Tensor | None:
        found = [part.unflatten(0, (scenes, -1)) for part in parts if part is not None]
        return torch.cat(found, dim=1).flatten(0, 1) if found else None

    logp, entropies, experts = (joined(list(parts)) for parts in zip(*results, strict=True))
    assert logp is not None
    return RowScores(logp, entropies, experts)


def _pass(
    policy: Denoiser,
    context: Any,
    rows: StateRows,
    temperature: float,
    top_k: int,
    *,
    entropy: bool,
    keep_experts: bool,
    record: RouterRecord | None,
    scorer: Scorer,
) -> Callable[[], tuple[Tensor, Tensor | None, Tensor | None]]:
    """One forward pass, as a call that checkpointing may repeat: the record then repeats its own choices, where a
    router on the brink could choose differently."""
    routing = RouterRecord() if record is None else record
    routing.replay = rows.experts

    def call() -> tuple[Tensor, Tensor | None, Tensor | None]:
        features = policy.action_features(rows.state, rows.time, context, rows.scored, routing)
        action = rows.action[rows.scored]
        logp, entropies = score_draws(policy, features, action, temperature, top_k, entropy=entropy, scorer=scorer)
        empty = logp.new_zeros(rows.scored.shape)
        experts = routing.choices() if keep_experts and routing.logits else None
        if record is None:
            routing.logits.clear()
        return (
            empty.masked_scatter(rows.scored, logp),
            None if entropies is None else empty.masked_scatter(rows.scored, entropies),
            experts,
        )

    return call
