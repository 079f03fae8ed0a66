"""A denoiser that is a table, so that every rollout can be listed and every probability worked out by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rlhf_drive.policies.trace import DecodeTrace

Schedule = Sequence[Sequence[int]]
"""Positions revealed at each step."""


class TabularDenoiser(torch.nn.Module):
    """Logits looked up by (scene, whole masked state, position), times ``1 + time / 2``; float64.

    `context` is the ``[S]`` tensor of scene numbers. `calls` lists (rows, head evaluations) of each forward pass.
    """

    def __init__(
        self, num_scenes: int, length: int, vocab_size: int, seed: int, *, scale: float = 1.0, coupled: bool = True
    ) -> None:
        super().__init__()
        states = (vocab_size + 1) ** length if coupled else 1
        generator = torch.Generator().manual_seed(seed)
        table = torch.randn(num_scenes, states, length, vocab_size, generator=generator, dtype=torch.float64)
        self.table = torch.nn.Parameter(scale * table)
        self.vocab_size = vocab_size
        self.length = length
        self.coupled = coupled
        self.calls: list[tuple[int, int]] = []

    def action_features(
        self, state: Tensor, time: Tensor, context: Tensor, where: Tensor, record: object = None
    ) -> Tensor:
        return self.action_logits(state, time, context, where, record)

    def logits(self, features: Tensor) -> Tensor:
        return features

    def action_logits(
        self, state: Tensor, time: Tensor, context: Tensor, where: Tensor, record: object = None
    ) -> Tensor:
        assert len(state) % len(context) == 0
        self.calls.append((len(state), int(where.sum())))
        scene = context.repeat_interleave(len(state) // len(context))
        place = (self.vocab_size + 1) ** torch.arange(self.length)
        index = (state * place).sum(-1) if self.coupled else torch.zeros(len(state), dtype=torch.long)
        # The share of revealed positions, freed of float32 rounding.
        share = (time.double() * self.length).round() / self.length
        gain = 1 + 0.5 * share if self.coupled else torch.ones_like(share)
        return (self.table[scene, index] * gain[:, None, None])[where]


def all_outcomes(length: int, vocab_size: int) -> Tensor:
    """``[V**L, L]`` every plan there is."""
    return torch.tensor(list(itertools.product(range(vocab_size), repeat=length)))


def all_schedules(length: int, steps: int) -> list[list[list[int]]]:
    """Every order of the positions, cut into `steps` as even pieces as there are (larger first), without repeats."""
    sizes = [length // steps + (k < length % steps) for k in range(steps)]
    ends = list(itertools.accumulate(sizes))
    found = {
        tuple(tuple(sorted(order[end - size : end])) for size, end in zip(sizes, ends, strict=True))
        for order in itertools.permutations(range(length))
    }
    return [[list(positions) for positions in schedule] for schedule in sorted(found)]


def scheduled_trace(
    tokens: Tensor, schedule: Schedule, vocab_size: int, *, temperature: float = 1.0, top_k: int = 0
) -> DecodeTrace:
    """The trace that reveals `tokens` ``[N, L]`` by `schedule`; behaviour log-probabilities are left at 0."""
    hidden = torch.ones_like(tokens, dtype=torch.bool)
    states, masks, times = [], [], []
    for positions in schedule:
        states.append(torch.where(hidden, vocab_size, tokens))
        masks.append(torch.zeros_like(hidden))
        masks[-1][:, positions] = True
        times.append(1 - hidden[0].float().mean().item())
        hidden = hidden & ~masks[-1]
    action = tokens.expand(len(schedule), -1, -1)
    return _trace(torch.stack(states), action, torch.stack(masks), times, temperature, top_k)


def _trace(
    state: Tensor, action: Tensor, scored: Tensor, times: Sequence[float], temperature: float, top_k: int
) -> DecodeTrace:
    return DecodeTrace(
        state=state,
        action=torch.where(scored, action, 0),
        scored=scored,
        time=torch.tensor(times),
        logp=torch.zeros(state.shape),
        temperature=temperature,
        top_k=top_k,
        order="causal",
        seed=0,
        weight_version=0,
    )


def distribution(
    policy: TabularDenoiser, scene: int, state: Sequence[int], position: int, temperature: float = 1.0, top_k: int = 0
) -> list[float]:
    """Probability of each token at one position of one state, by the plain formula; 0 outside the top-k."""
    index = sum(token * (policy.vocab_size + 1) ** place for place, token in enumerate(state))
    revealed = sum(token != policy.vocab_size for token in state)
    gain = 1 + 0.5 * revealed / policy.length
    logits = [gain * x / temperature for x in policy.table[scene, index, position].tolist()]
    kept = sorted(range(len(logits)), key=lambda token: -logits[token])[: top_k or len(logits)]
    total = sum(math.exp(logits[token]) for token in kept)
    return [math.exp(x) / total if token in kept else 0.0 for token, x in enumerate(logits)]


def outcome_probability(
    policy: TabularDenoiser,
    scene: int,
    tokens: Sequence[int],
    schedule: Schedule,
    temperature: float = 1.0,
    top_k: int = 0,
) -> float:
    """Probability that decoding by `schedule` gives `tokens`: a loop over steps and positions, nothing packed."""
    state = [policy.vocab_size] * policy.length
    probability = 1.0
    for positions in schedule:
        before = list(state)
        for position in positions:
            row = distribution(policy, scene, before, position, temperature, top_k)
            probability *= row[tokens[position]]
            state[position] = tokens[position]
    return probability


Reveals = Callable[[Sequence[int], Sequence[int]], set[tuple[int, int]]]
"""(state, hidden positions) -> every (position, token) the sampler may reveal next."""


def adaptive_trace(policy: TabularDenoiser, reveals: Reveals) -> DecodeTrace:
    """Every path of a sampler that reveals one token a step and chooses the position on the way, as one trace."""
    paths: list[list[tuple[int, int]]] = [[]]
    for _ in range(policy.length):
        grown = []
        for path in paths:
            before = _state_after(policy, path)
            hidden = [place for place, token in enumerate(before) if token == policy.vocab_size]
            grown += [[*path, step] for step in sorted(reveals(before, hidden))]
        paths = grown
    length, n = policy.length, len(paths)
    state = torch.full((length, n, length), policy.vocab_size)
    action, scored = torch.zeros_like(state), torch.zeros(length, n, length, dtype=torch.bool)
    for row, path in enumerate(paths):
        for k, (position, token) in enumerate(path):
            state[k, row] = torch.tensor(_state_after(policy, path[:k]))
            action[k, row, position] = token
            scored[k, row, position] = True
    return _trace(state, action, scored, [k / length for k in range(length)], 1.0, 0)


def _state_after(policy: TabularDenoiser, path: Sequence[tuple[int, int]]) -> list[int]:
    state = [policy.vocab_size] * policy.length
    for position, token in path:
        state[position] = token
    return state


class CausalTable(torch.nn.Module):
    """Logits looked up by (scene, tokens before the position, position); float64. `calls` as in `TabularDenoiser`."""

    def __init__(self, num_scenes: int, length: int, vocab_size: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        shape = (num_scenes, (vocab_size + 1) ** length, length, vocab_size)
        self.table = torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
        self.vocab_size, self.length = vocab_size, length
        self.calls: list[tuple[int, int]] = []

    def action_features(
        self, state: Tensor, time: Tensor, context: Tensor, where: Tensor, record: object = None
    ) -> Tensor:
        assert len(state) % len(context) == 0
        self.calls.append((len(state), int(where.sum())))
        scene = context.repeat_interleave(len(state) // len(context))
        place = (self.vocab_size + 1) ** torch.arange(self.length)
        before = (state * place).cumsum(dim=1) - state * place
        return self.table[scene[:, None], before, torch.arange(self.length)][where]

    def logits(self, features: Tensor) -> Tensor:
        return features

    def action_logits(
        self, state: Tensor, time: Tensor, context: Tensor, where: Tensor, record: object = None
    ) -> Tensor:
        return self.action_features(state, time, context, where, record)

    def probability(self, scene: int, tokens: Sequence[int], temperature: float = 1.0, top_k: int = 0) -> float:
        """Probability that token-by-token decoding gives `tokens`: the product of plain conditional probabilities."""
        probability, before = 1.0, 0
        for position, token in enumerate(tokens):
            logits = [x / temperature for x in self.table[scene, before, position].tolist()]
            kept = sorted(range(len(logits)), key=lambda candidate: -logits[candidate])[: top_k or len(logits)]
            total = sum(math.exp(logits[candidate]) for candidate in kept)
            probability *= math.exp(logits[token]) / total if token in kept else 0.0
            before += token * (self.vocab_size + 1) ** position
        return probability
