"""Finished plans scored from corrupted copies: shared, keyed by the sample, and independent of the batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from oracles.bounds import hidden_logp
from oracles.tabular import TabularDenoiser, all_outcomes, scheduled_trace

from rlhf_drive.errors import ConfigError, DataError
from rlhf_drive.likelihood import Probes, TokenLogp, make_likelihood
from rlhf_drive.likelihood_fits import PROBED
from rlhf_drive.policies.trace import DecodeTrace

L, V = 3, 3
SCENES = torch.tensor([0, 1])
NAMES = ("mean_field", *PROBED)


@pytest.fixture
def policy() -> TabularDenoiser:
    return TabularDenoiser(2, L, V, seed=0)


def make_trace(temperature: float = 0.7, top_k: int = 0) -> DecodeTrace:
    plans = all_outcomes(L, V).repeat(2, 1)
    return scheduled_trace(plans, [[1], [0], [2]], V, temperature=temperature, top_k=top_k)


def draw(name: str, trace: DecodeTrace, draws: int = 4) -> Probes | None:
    estimator = make_likelihood(name, draws=draws)
    shape = estimator.probe_shape(L)
    if shape is None:
        return None
    uniforms = torch.rand(len(trace), *shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return replace(estimator.draw(trace, uniforms), negative=torch.arange(len(trace)) % 2 == 0)


def score(
    name: str, policy: TabularDenoiser, trace: DecodeTrace, probes: Probes | None, **options: object
) -> TokenLogp:
    scenes = options.pop("scenes", SCENES)
    return make_likelihood(name, draws=4)(policy, scenes, trace, probes, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("top_k", [0, 2])
def test_equals_a_loop_over_copies_and_positions(policy: TabularDenoiser, top_k: int) -> None:
    trace = make_trace(temperature=1.0)
    probes = draw("elbo", trace)
    assert probes is not None
    # What is hidden and not weighed stays hidden: the copy is not told by the weights.
    probes = replace(probes, weight=probes.weight * (torch.arange(L) > 0))
    found = score("elbo", policy, replace(trace, top_k=top_k), probes)
    if top_k:
        assert bool((found.logp != score("elbo", policy, trace, probes).logp).any())
        return
    for n in (0, 20, 27, 53):
        expected = [0.0] * L
        for p in range(4):
            mask = tuple(probes.hidden[p, n].tolist())
            values = hidden_logp(policy, trace.tokens[n].tolist(), mask, scene=n // 27)
            for i, value in enumerate(values):
                expected[i] += float(probes.weight[p, n, i]) * value
        torch.testing.assert_close(found.logp[n], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_packed_equals_one_copy_at_a_time(policy: TabularDenoiser, name: str) -> None:
    if name == "sandwich":
        pytest.skip("its copies do not add up; the sum over copies is tested through the lower bound")
    trace = make_trace()
    probes = draw(name, trace)
    packed = score(name, policy, trace, probes, entropy=True)
    if probes is None:
        probes = Probes(torch.ones(1, 54, L, dtype=torch.bool), torch.ones(1, 54, L))
    for n in range(0, 54, 5):
        row, index = trace.rows(torch.tensor([n])), torch.tensor([n])
        logp, entropy = torch.zeros(1, L, dtype=torch.float64), torch.zeros(1, L, dtype=torch.float64)
        for p in range(len(probes.hidden)):
            one = Probes(probes.hidden[p : p + 1], probes.weight[p : p + 1]).rows(index)
            alone = score("elbo", policy, row, one, scenes=SCENES[[n // 27]], entropy=True)
            assert alone.entropy is not None
            logp, entropy = logp + alone.logp, entropy + alone.entropy
        assert packed.entropy is not None
        torch.testing.assert_close(packed.logp[n : n + 1], logp, rtol=0, atol=1e-10)
        torch.testing.assert_close(packed.entropy[n : n + 1], entropy, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_batch_mates_and_order_change_nothing(policy: TabularDenoiser, name: str) -> None:
    trace = make_trace()
    probes = draw(name, trace)
    full = score(name, policy, trace, probes).logp
    index = torch.tensor([30, 28, 53, 27])
    part = score(name, policy, trace.rows(index), None if probes is None else probes.rows(index), scenes=SCENES[1:])
    torch.testing.assert_close(part.logp, full[index], rtol=0, atol=1e-12)
    turned = torch.arange(54).roll(27)
    swapped = score(
        name, policy, trace.rows(turned), None if probes is None else probes.rows(turned), scenes=SCENES.flip(0)
    )
    torch.testing.assert_close(swapped.logp, full[turned], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", PROBED)
def test_probes_are_keyed_by_the_row_and_touch_no_global_generator(name: str) -> None:
    trace, estimator = make_trace(), make_likelihood(name, draws=4)
    shape = estimator.probe_shape(L)
    assert shape is not None
    uniforms = torch.rand(len(trace), *shape, generator=torch.Generator().manual_seed(0))
    before = torch.get_rng_state()
    probes = estimator.draw(trace, uniforms)
    assert torch.equal(torch.get_rng_state(), before)
    index = torch.tensor([9, 2, 53])
    alone = estimator.draw(trace.rows(index), uniforms[index])
    assert torch.equal(alone.hidden, probes.hidden[:, index])
    assert torch.equal(alone.weight, probes.weight[:, index])
    assert torch.equal(estimator.draw(trace, uniforms).hidden, probes.hidden)
    assert len({tuple(row) for row in probes.hidden.transpose(0, 1).flatten(1).tolist()}) > 10
    assert bool((probes.weight[~probes.hidden] == 0).all())
    with pytest.raises(DataError, match=name):
        estimator.draw(trace, uniforms[:3])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("max_tokens", "rows"), [(40 * L + 2, 40), (10**6, 10**6)])
def test_passes_change_no_value_and_no_gradient(policy: TabularDenoiser, name: str, max_tokens: int, rows: int) -> None:
    trace = make_trace(top_k=2)
    probes = draw(name, trace)
    total = 54 * (1 if probes is None else len(probes.hidden))
    weights = torch.linspace(-1, 1, 54 * L, dtype=torch.float64).view(54, L)
    packed = score(name, policy, trace, probes, entropy=True)
    assert packed.entropy is not None
    (packed_grad,) = torch.autograd.grad((packed.logp * weights + packed.entropy).sum(), policy.table)
    policy.calls.clear()
    found = score(name, policy, trace, probes, entropy=True, max_tokens=max_tokens)
    assert found.entropy is not None
    sizes = [size for size, _ in policy.calls]
    assert max(sizes) <= rows
    assert sum(sizes) == total
    assert len(sizes) == max(1, -(-total // rows))
    (grad,) = torch.autograd.grad((found.logp * weights + found.entropy).sum(), policy.table)
    torch.testing.assert_close(found.logp, packed.logp, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.entropy, packed.entropy, rtol=0, atol=1e-12)
    torch.testing.assert_close(grad, packed_grad, rtol=0, atol=1e-12)
    # More than one pass under gradients: each is computed again, so that none keeps its activations.
    assert len(policy.calls) == (2 * len(sizes) if len(sizes) > 1 else 1)


def test_what_cannot_be_asked() -> None:
    policy, trace = TabularDenoiser(2, L, V, seed=0), make_trace()
    with pytest.raises(DataError, match="draw them once"):
        score("elbo", policy, trace, None)
    for name in NAMES:
        with pytest.raises(ConfigError, match="visits no decode steps"):
            score(name, policy, trace, draw(name, trace), steps=torch.tensor([0]))
    with pytest.raises(ConfigError, match=r"rollout\.temperature"):
        score("elbo", policy, make_trace(temperature=0.0), draw("elbo", trace))
