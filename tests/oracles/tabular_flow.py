"""A flow policy that is a table, and discrete flow written out densely: every path can be listed and added up."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_drive.policies.flow import DiscreteFlow
from rlhf_drive.policies.tokenizer import TrajectoryTokenizer
from rlhf_drive.policies.trace import DecodeTrace


class TabularFlow(torch.nn.Module):
    """Logits looked up by (scene, whole state, position), times ``1 + time``; float64. The grid's step is 0.5 m."""

    def __init__(self, length: int, vocab_size: int, seed: int, *, num_scenes: int = 1, scale: float = 1.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        shape = (num_scenes, vocab_size**length, length, vocab_size)
        self.table = torch.nn.Parameter(scale * torch.randn(shape, generator=generator, dtype=torch.float64))
        self.length, self.vocab_size = length, vocab_size
        tokenizer = TrajectoryTokenizer("waypoints", 0.0, 0.5 * (vocab_size - 1), 0.5)
        self.process = DiscreteFlow(tokenizer, beta_scale=2.0, beta_power=0.9, distance_scale_m=1.0)
        self.calls: list[tuple[int, int]] = []

    def action_features(
        self, state: Tensor, time: Tensor, context: Tensor, where: Tensor, record: object = None
    ) -> Tensor:
        assert len(state) % len(context) == 0
        self.calls.append((len(state), int(where.sum())))
        scene = context.repeat_interleave(len(state) // len(context))
        index = (state * self.vocab_size ** torch.arange(self.length)).sum(-1)
        # Looked up in one order, so that gradients add up in one order.
        rows = self.table.flatten(0, 1).index_select(0, scene * self.table.shape[1] + index)
        return (rows * (1.0 + time.double())[:, None, None])[where]

    def logits(self, features: Tensor) -> Tensor:
        return features

    def action_logits(
        self, state: Tensor, time: Tensor, context: Tensor, where: Tensor, record: object = None
    ) -> Tensor:
        return self.logits(self.action_features(state, time, context, where, record))


@dataclass(frozen=True)
class DenseFlow:
    """The path's formulas on V x V x V tables, the distance with loops."""

    vocab_size: int
    """V."""
    step: float
    """Metres between numbers."""
    c: float
    """Scale of beta."""
    a: float
    """Power of beta."""
    s: float
    """Distance scale (m)."""

    @staticmethod
    def of(process: DiscreteFlow) -> DenseFlow:
        path = process.path
        return DenseFlow(path.vocab_size, path.step, path.beta_scale, path.beta_power, path.distance_scale_m)

    def distance(self) -> Tensor:
        """``[V, V]``."""
        numbers = [self.step * v for v in range(self.vocab_size)]
        return torch.tensor(
            [[(2 - 2 * math.exp(-abs(x - y) / self.s)) ** 2 for y in numbers] for x in numbers], dtype=torch.float64
        )

    def beta(self, t: float) -> float:
        return self.c * (t / (1 - t)) ** self.a

    def p(self, t: float) -> Tensor:
        """``[x1, x]`` p_t(x | x1)."""
        return torch.softmax(-self.beta(t) * self.distance(), dim=1)

    def velocity(self, t: float) -> Tensor:
        """``[x1, x, y]`` u_t(y, x | x1) off the diagonal."""
        rate = self.c * self.a * (t / (1 - t)) ** (self.a - 1) / (1 - t) ** 2
        d, p = self.distance(), self.p(t)
        return p[:, None, :] * rate * (d[:, :, None] - d[:, None, :]).clamp(min=0.0)

    def kernel(self, t: float, h: float) -> Tensor:
        """``[x1, x, y]`` probability that x becomes y."""
        u = self.velocity(t)
        k = torch.zeros_like(u)
        for x1, x in itertools.product(range(self.vocab_size), repeat=2):
            total = float(u[x1, x].sum())
            if total > 0:
                k[x1, x] = (1 - math.exp(-h * total)) * u[x1, x] / total
            k[x1, x, x] += math.exp(-h * total)
        return k


@dataclass(frozen=True)
class AllPaths:
    """Every augmented path of a tabular flow policy: noise, end points drawn, and where the numbers moved."""

    trace: DecodeTrace
    """One row per path that can happen."""
    environment: Tensor
    """``[N]`` probability of the noise and of all moves, given the end points."""


def all_paths(policy: TabularFlow, times: list[float], *, temperature: float = 1.0, top_k: int = 0) -> AllPaths:
    """Paths through the times t_0 … t_(K-1), built by a loop over one path at a time."""
    v, length = policy.vocab_size, policy.length
    plans = list(itertools.product(range(v), repeat=length))
    dense = DenseFlow.of(policy.process)
    paths = [([plan], [], 1.0 / len(plans)) for plan in plans]
    for k, t in enumerate(times):
        last = k == len(times) - 1
        kernel = None if last else dense.kernel(t, times[k + 1] - t).tolist()
        grown = []
        for states, ends, probability in paths:
            for end in plans:
                if kernel is None:
                    grown.append((states, [*ends, end], probability))
                    continue
                for after in plans:
                    moves = [kernel[e][x][y] for e, x, y in zip(end, states[-1], after, strict=True)]
                    if all(moves):
                        grown.append(([*states, after], [*ends, end], probability * math.prod(moves)))
        paths = grown
    state = torch.tensor([states for states, _, _ in paths]).transpose(0, 1).contiguous()
    action = torch.tensor([ends for _, ends, _ in paths]).transpose(0, 1).contiguous()
    trace = DecodeTrace(
        state=state,
        action=action,
        scored=torch.ones_like(state, dtype=torch.bool),
        time=torch.tensor(times),
        logp=torch.zeros(state.shape),
        temperature=temperature,
        top_k=top_k,
        order="all",
        seed=0,
        weight_version=0,
    )
    return AllPaths(trace, torch.tensor([probability for _, _, probability in paths], dtype=torch.float64))


def distributions(policy: TabularFlow, state: Tensor, t: float, *, temperature: float = 1.0, top_k: int = 0) -> Tensor:
    """``[L, V]`` p(x1 | state) at one time in scene 0, by the plain formula; ties at the k-th logit do not occur."""
    index = sum(int(token) * policy.vocab_size**place for place, token in enumerate(state))
    logits = policy.table[0, index].detach() * (1.0 + t) / temperature
    if top_k:
        for row in logits:
            row[row.argsort(descending=True)[top_k:]] = -math.inf
    return logits.softmax(-1)


def end_masses(policy: TabularFlow, trace: DecodeTrace) -> Tensor:
    """``[N]`` probability of all end points of each path, given the states they were drawn in."""
    mass = torch.ones(len(trace), dtype=torch.float64)
    for k, t in enumerate(trace.time.tolist()):
        for state in itertools.product(range(policy.vocab_size), repeat=policy.length):
            p = distributions(policy, torch.tensor(state), t, temperature=trace.temperature, top_k=trace.top_k)
            here = (trace.state[k] == torch.tensor(state)).all(dim=1)
            drawn = torch.stack([p[place][trace.action[k, :, place]] for place in range(policy.length)])
            mass = torch.where(here, mass * drawn.prod(dim=0), mass)
    return mass
