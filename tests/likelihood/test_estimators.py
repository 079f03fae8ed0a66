"""All estimators side by side: what they have in common, and what tells each from its neighbours."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from oracles.bounds import coupled_model
from oracles.tabular import TabularDenoiser, outcome_probability

from rlhf_drive.errors import UnknownNameError
from rlhf_drive.likelihood import Probes, make_likelihood
from rlhf_drive.likelihood_fits import likelihoods_of
from rlhf_drive.policies.masked import sample
from rlhf_drive.policies.process import Decoding
from rlhf_drive.policies.trace import DecodeTrace

L, V = 4, 3
SCENE = torch.tensor([0])
CAUSAL = [[i] for i in range(L)]
NAMES = likelihoods_of("masked")


def rollouts(policy: TabularDenoiser, rows: int) -> DecodeTrace:
    uniforms = torch.rand(rows, 2, policy.length, generator=torch.Generator().manual_seed(0))
    return sample(policy, SCENE, uniforms, Decoding(policy.length, "causal", 1.0, 0))


def rows_of(
    name: str, policy: TabularDenoiser, trace: DecodeTrace, draws: int = 1, pairs: bool = False
) -> torch.Tensor:
    """``[N]`` the estimate, with the same random numbers for whoever asks."""
    estimator = make_likelihood(name, draws=draws, antithetic=pairs)
    shape = estimator.probe_shape(trace.state.shape[-1])
    probes: Probes | None = None
    if shape is not None:
        generator = torch.Generator().manual_seed(1)
        probes = estimator.draw(trace, torch.rand(len(trace), *shape, generator=generator))
        probes = replace(probes, negative=torch.arange(len(trace)) % 2 == 0)
    with torch.no_grad():
        found = estimator(policy, SCENE, trace, probes)
    assert found.mask.sum(1).tolist() == [trace.state.shape[-1]] * len(trace)
    return found.logp.sum(1)


@pytest.mark.parametrize("name", NAMES)
def test_ratio_is_one_at_the_weights_that_sampled_and_moves_with_them(name: str) -> None:
    old, new = coupled_model(0, 0.5), coupled_model(1, 0.5, base=101)
    trace = rollouts(old, 64)
    same = (rows_of(name, old, trace, 2) - rows_of(name, coupled_model(0, 0.5), trace, 2)).exp()
    assert torch.equal(same, torch.ones_like(same))
    moved = rows_of(name, new, trace, 2) - rows_of(name, old, trace, 2)
    assert float(moved.abs().mean()) > 0.1


def test_no_two_estimators_agree() -> None:
    policy = coupled_model(0, 1.0)
    trace = rollouts(policy, 64)
    found = {name: rows_of(name, policy, trace, 2) for name in NAMES}
    found |= {f"{name}, pairs": rows_of(name, policy, trace, 2, pairs=True) for name in ("elbo", "sandwich")}
    for one, other in itertools.combinations(found, 2):
        assert float((found[one] - found[other]).abs().mean()) > 0.1, (one, other)


def test_estimated_against_true_log_ratios() -> None:
    """Correlation and slope, for tokens that depend on each other weakly (0.25) and strongly (1.0)."""
    found: dict[tuple[str, float], tuple[float, float]] = {}
    for coupling in (0.25, 1.0):
        old, new = coupled_model(0, coupling), coupled_model(0, coupling)
        with torch.no_grad():
            new.table.add_(0.15 * coupled_model(1, coupling, base=101).table)
        trace = rollouts(old, 600)
        plans = trace.tokens.tolist()
        chances = {p: (outcome_probability(new, 0, p, CAUSAL), outcome_probability(old, 0, p, CAUSAL))
                   for p in map(tuple, plans)}  # fmt: skip
        true = torch.tensor([chances[tuple(p)] for p in plans], dtype=torch.float64).log()
        ratio = true[:, 0] - true[:, 1]
        for label, name, draws, pairs in (
            ("trace", "trace", 1, False), ("mean_field", "mean_field", 1, False), ("coupled", "coupled", 1, False),
            ("elbo 1", "elbo", 1, False), ("elbo 8", "elbo", 8, False), ("pairs 8", "elbo", 8, True),
            ("random_mask 1", "random_mask", 1, False), ("random_mask 8", "random_mask", 8, False),
        ):  # fmt: skip
            estimate = rows_of(name, new, trace, draws, pairs) - rows_of(name, old, trace, draws, pairs)
            both = torch.stack([ratio, estimate])
            covariance = torch.cov(both)
            slope = float(covariance[0, 1] / covariance[0, 0])
            found[label, coupling] = float(torch.corrcoef(both)[0, 1]), slope
    weak = {label: value for (label, coupling), value in found.items() if coupling == 0.25}
    strong = {label: value for (label, coupling), value in found.items() if coupling == 1.0}
    for table in (weak, strong):
        assert table["trace"] == pytest.approx((1.0, 1.0), abs=1e-9)
        assert all(correlation < 0.98 for label, (correlation, _) in table.items() if label != "trace")
        # More draws help, and pairs help more.
        assert table["elbo 1"][0] + 0.15 < table["elbo 8"][0] < table["pairs 8"][0] + 0.02
        assert table["random_mask 1"][0] + 0.15 < table["random_mask 8"][0]
        # Coupled masks over-scale what the mean of the lower bound gives.
        assert table["coupled"][1] > 1.2 * table["pairs 8"][1]
    assert weak["mean_field"][0] > 0.85
    assert strong["mean_field"][0] < 0.85
    assert strong["mean_field"][1] < 0.9
    assert 1.15 < weak["coupled"][1] < 1.6
    assert 0.4 < weak["elbo 1"][0] < 0.75
    assert 0.75 < weak["elbo 1"][1] < 1.25
    assert weak["pairs 8"][0] > 0.85


def test_unknown_names_get_a_hint() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'coupled'"):
        make_likelihood("couple")
