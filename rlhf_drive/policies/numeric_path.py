"""The probability path of discrete flow over numbers, and one Euler step along it (WAM-Flow 2512.06112; 2412.03487).

``p_t(x | x1) = softmax_x(-beta_t d(x, x1))`` with ``beta_t = c (t / (1 - t))^a``: uniform at t = 0, all on x1 at t = 1.
``d = (||e_x - e_x1||^2)^2`` for unit vectors e. WAM-Flow learns e by a triplet loss, so that embeddings lie in the
order of the numbers they stand for. Our tokens are numbers ``x_v = low + step * v`` on a uniform grid, so nothing is
left to learn: the features of an Ornstein-Uhlenbeck kernel are unit vectors with ``<e_x, e_y> = exp(-|x - y| / s)``,
hence ``d = (2 - 2 exp(-|x - y| / s))^2``, which grows with ``|x - y|`` alone. All sums over the vocabulary are
therefore differences of running sums over the offset ``|x - x1|``: nothing here is ever V x V.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_drive.errors import ConfigError

__all__ = ["EulerStep", "NumericPath"]


@dataclass(frozen=True)
class NumericPath:
    """The path of one number, such as ``NumericPath(401, 0.05, beta_scale=3.0, beta_power=0.9, distance_scale_m=4.0)``.

    Raises:
        ConfigError: A number of the path is not positive and finite.
    """

    vocab_size: int
    """V: numbers on the grid."""
    step: float
    """Metres between neighbouring numbers."""
    beta_scale: float
    """c: beta at t = 1/2; larger values concentrate on x1 earlier."""
    beta_power: float
    """a: how fast beta leaves 0 and goes to infinity."""
    distance_scale_m: float
    """s: numbers farther apart than a few of these (m) count as equally far."""

    def __post_init__(self) -> None:
        for name in ("beta_scale", "beta_power", "distance_scale_m"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"process.{name} of a flow policy must be a positive, finite number; got {value}.")

    def distance(self, device: torch.device | str = "cpu") -> Tensor:
        """``[V]`` float64: d of two numbers that are 0 … V-1 grid steps apart; increasing, at most 4."""
        offset = torch.arange(self.vocab_size, dtype=torch.float64, device=device) * self.step
        return (2.0 * torch.expm1(-offset / self.distance_scale_m)).square()

    def beta(self, time: Tensor) -> Tensor:
        """``c (t / (1 - t))^a``, float64, for t in [0, 1)."""
        t = time.double()
        return self.beta_scale * (t / (1.0 - t)) ** self.beta_power

    def beta_rate(self, time: Tensor) -> Tensor:
        """d beta / dt ``= c a (t / (1 - t))^(a - 1) / (1 - t)^2``, float64; infinite at t = 0 where a < 1."""
        t = time.double()
        c, a = self.beta_scale, self.beta_power
        return c * a * (t / (1.0 - t)) ** (a - 1.0) / (1.0 - t) ** 2

    def noised(self, tokens: Tensor, time: Tensor, uniform: Tensor) -> Tensor:
        """``x_t ~ p_t(. | tokens)``.

        Args:
            tokens: ``[N, L]`` long, x1.
            time: ``[N]`` in [0, 1).
            uniform: ``[N, L]`` in [0, 1).
        """
        weight = torch.exp(-self.beta(time)[:, None] * self.distance(tokens.device))
        running = weight.cumsum(dim=1)
        offset = _draw_offset(
            lambda m: running.gather(1, m), tokens, self.vocab_size - 1 - tokens, uniform, self.vocab_size
        )
        return tokens + offset


class EulerStep:
    """The x1-sampled Euler step from time t to t + h: what one number does, given the end point x1 drawn for it.

    Velocity ``u(y, x | x1) = p_t(y | x1) beta_rate_t [d(x, x1) - d(y, x1)]_+`` with total rate ``lambda = sum_y u``;
    the number jumps with probability ``1 - exp(-h lambda)``, to ``y ~ u / lambda``. The step knows no weights, so that
    the ratio of two policies' augmented paths needs the draws of x1 only.

    Args:
        path: The probability path.
        time: t, a float64 scalar tensor in (0, 1); it says on which device the step works.
        h: Length of the step.
    """

    def __init__(self, path: NumericPath, time: Tensor, h: float | Tensor) -> None:
        self.vocab_size, self.h = path.vocab_size, h
        self.distance = path.distance(time.device)
        self.beta, self.beta_rate = path.beta(time), path.beta_rate(time)
        weight = torch.exp(-self.beta * self.distance)
        # Running sums over the offset 0 … m.
        self.weight_sum = weight.cumsum(dim=0)
        self.distance_sum = (weight * self.distance).cumsum(dim=0)

    def _nearer(self, start: Tensor) -> Callable[[Tensor], Tensor]:
        """Running sum over offsets 0 … m of ``exp(-beta d)(d(start) - d)``, for m < start."""
        farthest = self.distance[start]
        return lambda m: farthest * self.weight_sum[m] - self.distance_sum[m]

    def _sides(self, x: Tensor, x1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Offset of x from x1, and how many numbers lie below and above x1 that are nearer to it than x."""
        start = (x - x1).abs()
        inner = (start - 1).clamp(min=0)
        return start, torch.minimum(inner, x1), torch.minimum(inner, self.vocab_size - 1 - x1)

    def _log_normaliser(self, x1: Tensor) -> Tensor:
        """``log sum_y exp(-beta d(y, x1))``."""
        return (self.weight_sum[x1] + self.weight_sum[self.vocab_size - 1 - x1] - 1.0).log()

    def rate(self, x: Tensor, x1: Tensor) -> Tensor:
        """lambda, the total rate at which x jumps, float64; x and x1 broadcast."""
        start, below, above = self._sides(x, x1)
        nearer = self._nearer(start)
        mass = nearer(below) + nearer(above) - nearer(torch.zeros_like(below))
        return self.beta_rate * mass * torch.exp(-self._log_normaliser(x1))

    def move(self, x: Tensor, x1: Tensor, whether: Tensor, where: Tensor) -> Tensor:
        """The number after the step.

        Args:
            x: Numbers now, long.
            x1: End points, of the same shape.
            whether: Uniform numbers that decide whether to jump.
            where: Uniform numbers that decide where to.
        """
        start, below, above = self._sides(x, x1)
        jumps = whether.double() < -torch.expm1(-self.h * self.rate(x, x1))
        offset = _draw_offset(self._nearer(start), below, above, where, self.vocab_size)
        return torch.where(jumps, x1 + offset, x)

    def logp(self, x: Tensor, y: Tensor, x1: Tensor) -> Tensor:
        """``log K_h(y | x, x1)``, float64, -inf where y cannot be reached; the arguments broadcast.

        ``-h lambda`` where y = x, else ``log(1 - exp(-h lambda)) + log(u(y, x | x1) / lambda)``.
        """
        rate = self.rate(x, x1)
        start, end = self.distance[(x - x1).abs()], self.distance[(y - x1).abs()]
        closer = start > end
        velocity = self.beta_rate.log() - self.beta * end - self._log_normaliser(x1)
        velocity = velocity + (start - end).clamp(min=0.0).log()
        jump = (-torch.expm1(-self.h * rate)).log() - rate.log() + velocity
        stay = torch.where(x == y, -self.h * rate, -torch.inf)
        return torch.where(closer, jump, stay)


def _draw_offset(
    running: Callable[[Tensor], Tensor], below: Tensor, above: Tensor, uniform: Tensor, size: int
) -> Tensor:
    """Signed offset from x1 with probability proportional to the weight of its size, by inverse transform.

    Args:
        running: Sum of the weights of offsets 0 … m, for long m of any shape `below` has; increasing in m.
        below: Largest offset downwards.
        above: Largest offset upwards.
        uniform: Random numbers in [0, 1).
        size: More than any offset.
    """
    zero, lower = running(torch.zeros_like(below)), running(below)
    target = uniform.double() * (lower + running(above) - zero)
    downwards = target < lower
    target = torch.where(downwards, target, target - lower + zero)
    low, high = torch.zeros_like(below), torch.where(downwards, below, above)
    for _ in range(size.bit_length()):
        middle = (low + high) // 2
        passed = running(middle) > target
        low, high = torch.where(passed, low, torch.minimum(middle + 1, high)), torch.where(passed, middle, high)
    return torch.where(downwards, -low, low)
