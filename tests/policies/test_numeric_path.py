"""The probability path of discrete flow and its Euler step, against dense tables and finite differences."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from oracles.tabular_flow import DenseFlow

from rlhf_drive.policies.flow import START_TIME
from rlhf_drive.policies.numeric_path import EulerStep, NumericPath

PATH = NumericPath(7, 0.5, beta_scale=3.0, beta_power=0.9, distance_scale_m=2.0)
DENSE = DenseFlow(7, 0.5, 3.0, 0.9, 2.0)


def triples(size: int) -> tuple[torch.Tensor, ...]:
    """(x1, x, y), each ``[V, V, V]``."""
    return torch.meshgrid(*[torch.arange(size)] * 3, indexing="ij")


def scalar(t: float) -> torch.Tensor:
    return torch.tensor(t, dtype=torch.float64)


def test_distance_has_the_order_of_the_numbers() -> None:
    distance = PATH.distance()
    torch.testing.assert_close(distance, DENSE.distance()[0], rtol=0, atol=1e-15)
    assert bool((distance.diff() > 0).all())
    # Offsets of 1 and 4 steps are 0.5 and 2 m; s = 2 m.
    assert distance[1].item() == pytest.approx((2 - 2 * math.exp(-0.25)) ** 2, rel=1e-12)
    assert distance[4].item() == pytest.approx((2 - 2 / math.e) ** 2, rel=1e-12)


def test_distance_is_that_of_unit_vectors_whose_products_are_the_kernels() -> None:
    """The metric exists: a Gram matrix with unit diagonal and positive eigenvalues is one of unit vectors."""
    offset = 0.5 * (torch.arange(7)[:, None] - torch.arange(7)).abs().double()
    gram = torch.exp(-offset / 2.0)
    values, vectors = torch.linalg.eigh(gram)
    assert values.min() > 0
    embedding = vectors * values.sqrt()
    squared = torch.cdist(embedding, embedding).square()
    torch.testing.assert_close(squared.square(), PATH.distance()[(offset / 0.5).long()], rtol=0, atol=1e-12)


@pytest.mark.parametrize("t", [0.0, START_TIME, 0.3, 0.8])
def test_noised_follows_the_path(t: float) -> None:
    count = 7000
    uniform = ((torch.arange(count) + 0.5) / count).double().expand(7, count)
    noised = PATH.noised(torch.arange(7)[:, None].expand(7, count), torch.full((7,), t), uniform)
    frequency = torch.stack([torch.bincount(row, minlength=7) for row in noised]) / count
    # One draw per quantile: a frequency is exact to one count.
    torch.testing.assert_close(frequency.double(), DENSE.p(t), rtol=0, atol=1.1 / count)


def test_each_row_is_noised_at_its_own_time() -> None:
    tokens = torch.full((3, 500), 2)
    noised = PATH.noised(tokens, torch.tensor([0.0, 0.5, 0.999]), torch.linspace(0, 0.999, 500).expand(3, 500))
    off = (noised != 2).double().mean(dim=1)
    expected = [1 - DENSE.p(t)[2, 2].item() for t in (0.0, 0.5, 0.999)]
    assert off.tolist() == pytest.approx(expected, abs=0.005)


def test_path_starts_uniform_and_ends_at_the_plan() -> None:
    tokens = torch.arange(7).repeat(1000)[None]
    uniform = torch.rand(2, 7000, generator=torch.Generator().manual_seed(0)).double()
    start, end = (PATH.noised(tokens, torch.tensor([t]), uniform[i : i + 1]) for i, t in enumerate((0.0, 1 - 2**-24)))
    assert torch.equal(end, tokens)
    counts = torch.bincount(start[0] * 7 + tokens[0], minlength=49).double()
    # Chi-square with 36 degrees of freedom: 99.9 % of draws stay below 68.
    assert float(((counts - 7000 / 49).square() / (7000 / 49)).sum()) < 68


@pytest.mark.parametrize("t", [0.05, 0.4, 0.85])
def test_velocity_drives_the_path(t: float) -> None:
    """Kolmogorov's forward equation: dp_t(y)/dt = sum_x p_t(x) u(y, x) - p_t(y) lambda(y), here with our rates."""
    x1, x, y = triples(7)
    step = EulerStep(PATH, scalar(t), 1e-9)
    rate = step.rate(x[:, :, 0], x1[:, :, 0])
    flow = torch.where(x == y, 0.0, step.logp(x, y, x1).exp() / 1e-9)  # K_h / h -> u as h -> 0
    p = DENSE.p(t)
    gained = (p[:, :, None] * flow).sum(dim=1) - p * rate
    eps = 1e-6
    slope = (DENSE.p(t + eps) - DENSE.p(t - eps)) / (2 * eps)
    torch.testing.assert_close(gained, slope, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(flow, DENSE.velocity(t), rtol=1e-5, atol=1e-9)


def test_beta_rate_is_the_slope_of_beta() -> None:
    t = torch.tensor([START_TIME, 0.2, 0.5, 0.9], dtype=torch.float64)
    eps = 1e-7
    slope = (PATH.beta(t + eps) - PATH.beta(t - eps)) / (2 * eps)
    torch.testing.assert_close(PATH.beta_rate(t), slope, rtol=1e-6, atol=0)
    # By hand at t = 1/2: c = 3 and c a 4 = 10.8.
    assert [PATH.beta(scalar(0.5)).item(), PATH.beta_rate(scalar(0.5)).item()] == pytest.approx([3.0, 10.8], abs=1e-12)


@pytest.mark.parametrize(("t", "h"), [(START_TIME, 0.25), (0.25, 0.25), (0.5, 0.5), (0.9, 0.05), (0.5, 4.0)])
def test_kernel_equals_the_dense_one_and_its_rows_sum_to_one(t: float, h: float) -> None:
    x1, x, y = triples(7)
    kernel = EulerStep(PATH, scalar(t), h).logp(x, y, x1).exp()
    torch.testing.assert_close(kernel, DENSE.kernel(t, h), rtol=0, atol=1e-12)
    torch.testing.assert_close(kernel.sum(dim=2), torch.ones(7, 7, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("t", [START_TIME, 0.4, 0.9])
def test_moves_follow_the_kernel(t: float) -> None:
    """A grid of (whether, where) numbers gives the kernel's probabilities to one cell."""
    h, side = 0.2, 80
    step = EulerStep(PATH, scalar(t), h)
    whether, where = torch.meshgrid(*[(torch.arange(side) + 0.5) / side] * 2, indexing="ij")
    dense = DENSE.kernel(t, h)
    for x1, x in itertools.product(range(7), repeat=2):
        moved = step.move(torch.full((side, side), x), torch.full((side, side), x1), whether, where)
        frequency = torch.bincount(moved.flatten(), minlength=7) / side**2
        torch.testing.assert_close(frequency.double(), dense[x1, x], rtol=0, atol=2.5 / side)
        assert bool(((moved == x) | ((moved - x1).abs() < abs(x - x1))).all())


def test_wide_vocabularies_stay_narrow_in_memory_and_exact() -> None:
    """WAM's 20,001 numbers: a V x V table would take 3.2 GB."""
    path = NumericPath(20001, 0.01, beta_scale=3.0, beta_power=0.9, distance_scale_m=4.0)
    step = EulerStep(path, scalar(0.6), 0.1)
    x, x1 = torch.tensor([12345]), torch.tensor([9876])
    d = path.distance()[(torch.arange(20001) - x1).abs()]
    weight = torch.exp(-path.beta(scalar(0.6)) * d)
    velocity = weight / weight.sum() * path.beta_rate(scalar(0.6)) * (d[x] - d).clamp(min=0)
    torch.testing.assert_close(step.rate(x, x1), velocity.sum()[None], rtol=1e-10, atol=0)
    kernel = step.logp(x, torch.arange(20001), x1).exp()
    assert kernel.sum().item() == pytest.approx(1.0, abs=1e-10)
    uniform = (torch.arange(5000) + 0.5).double() / 5000
    moved = step.move(x.expand(5000), x1.expand(5000), torch.zeros(5000), uniform)
    mean = (velocity * torch.arange(20001)).sum() / velocity.sum()
    assert moved.double().mean().item() == pytest.approx(mean.item(), abs=2.0)


@pytest.mark.parametrize(
    ("c", "a", "s"), [(3.0, 0.9, 4.0), (0.5, 0.9, 4.0), (30.0, 0.9, 4.0), (3.0, 3.0, 4.0), (3.0, 0.9, 20.0)]
)
def test_every_option_of_the_path_changes_noise_and_jumps_as_its_formula_says(c: float, a: float, s: float) -> None:
    path, dense = NumericPath(41, 0.5, c, a, s), DenseFlow(41, 0.5, c, a, s)
    uniform = ((torch.arange(4000) + 0.5) / 4000).double()[None]
    offset = (torch.arange(41) - 20).abs()
    noised = path.noised(torch.full((1, 4000), 20), torch.tensor([0.7]), uniform)
    spread = (noised - 20).abs().double().mean().item()
    assert spread == pytest.approx(float((dense.p(0.7)[20] * offset).sum()), abs=0.01)
    chance = -torch.expm1(-0.02 * EulerStep(path, scalar(0.7), 0.02).rate(torch.tensor(24), torch.tensor(20))).item()
    assert chance == pytest.approx(1.0 - dense.kernel(0.7, 0.02)[20, 24, 24].item(), abs=1e-12)
    usual = DenseFlow(41, 0.5, 3.0, 0.9, 4.0)
    if dense != usual:
        assert abs(spread - float((usual.p(0.7)[20] * offset).sum())) > 0.2
        assert abs(chance - (1.0 - usual.kernel(0.7, 0.02)[20, 24, 24].item())) > 0.02
