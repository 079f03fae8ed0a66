"""Bounds on log p of a table model by listing every order and every mask, with plain loops."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from oracles.tabular import TabularDenoiser, distribution, outcome_probability

Mask = tuple[bool, ...]


def all_masks(length: int) -> list[Mask]:
    """Every set of hidden positions with at least one."""
    return [mask for mask in itertools.product((False, True), repeat=length) if any(mask)]


def hidden_logp(policy: TabularDenoiser, tokens: Sequence[int], mask: Mask, scene: int = 0) -> list[float]:
    """``log p(y_i | y outside the mask)`` of each hidden position, 0 of the others."""
    state = [policy.vocab_size if hidden else token for token, hidden in zip(tokens, mask, strict=True)]
    return [
        math.log(distribution(policy, scene, state, i)[tokens[i]]) if hidden else 0.0 for i, hidden in enumerate(mask)
    ]


def random_order_logp(policy: TabularDenoiser, tokens: Sequence[int]) -> float:
    """``log`` of the mean over all orders of the probability that decoding one token at a time gives these tokens."""
    orders = list(itertools.permutations(range(len(tokens))))
    return math.log(sum(outcome_probability(policy, 0, tokens, [[i] for i in o]) for o in orders) / len(orders))


def lower_bound(policy: TabularDenoiser, tokens: Sequence[int]) -> float:
    """``mean over orders of the sum of log p(token | tokens before it)``: Jensen's bound on `random_order_logp`."""
    total, orders = 0.0, list(itertools.permutations(range(len(tokens))))
    for order in orders:
        for j, i in enumerate(order):
            mask = tuple(k in order[j:] for k in range(len(tokens)))
            total += hidden_logp(policy, tokens, mask)[i]
    return total / len(orders)


def renyi_bound(policy: TabularDenoiser, tokens: Sequence[int], beta: float) -> float:
    """``sum_i (1/beta) log(mean over orders of p(token i | tokens before it)^beta)``."""
    powers, orders = [0.0] * len(tokens), list(itertools.permutations(range(len(tokens))))
    for order in orders:
        for j, i in enumerate(order):
            mask = tuple(k in order[j:] for k in range(len(tokens)))
            powers[i] += math.exp(beta * hidden_logp(policy, tokens, mask)[i]) / len(orders)
    return sum(math.log(power) / beta for power in powers)


def every_size_and_order(length: int) -> Tensor:
    """``[L * L!, 1 + L]`` uniform numbers that bring up every mask size with every order of the positions once."""
    rows = [
        [(size + 0.5) / length, *((place + 0.5) / length for place in order)]
        for size in range(length)
        for order in itertools.permutations(range(length))
    ]
    return torch.tensor(rows, dtype=torch.float64)


def coupled_model(seed: int, coupling: float, *, length: int = 4, vocab: int = 3, base: int = 100) -> TabularDenoiser:
    """Logits that are the same in all states, plus `coupling` times what depends on the state."""
    policy = TabularDenoiser(1, length, vocab, seed=seed)
    shared = torch.randn(length, vocab, generator=torch.Generator().manual_seed(base), dtype=torch.float64)
    with torch.no_grad():
        policy.table.mul_(coupling).add_(shared)
    return policy
