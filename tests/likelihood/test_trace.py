"""The trace likelihood against enumeration: every plan of a small table model is listed."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from oracles.tabular import (
    TabularDenoiser,
    adaptive_trace,
    all_outcomes,
    all_schedules,
    distribution,
    outcome_probability,
    scheduled_trace,
)

from rlhf_drive.errors import ConfigError
from rlhf_drive.likelihood import flatten_steps, trace_logp
from rlhf_drive.likelihood.trace import TraceLikelihood
from rlhf_drive.policies.masked import sample
from rlhf_drive.policies.process import DECODE_ORDERS, Decoding

MASKED_ORDERS = [order for order in DECODE_ORDERS if order != "all"]

L, V = 3, 3
SCENES = torch.tensor([0, 1])
SCHEDULES = [
    pytest.param(schedule, id="-".join("".join(map(str, positions)) for positions in schedule))
    for steps in (3, 2, 1)
    for schedule in all_schedules(L, steps)
]


@pytest.fixture
def policy() -> TabularDenoiser:
    return TabularDenoiser(num_scenes=2, length=L, vocab_size=V, seed=0)


def _plans() -> torch.Tensor:
    return all_outcomes(L, V).repeat(len(SCENES), 1)


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (0.6, 0), (1.0, 2), (1.7, 2)])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_probabilities_equal_enumeration_and_sum_to_one(
    policy: TabularDenoiser, schedule: list[list[int]], temperature: float, top_k: int
) -> None:
    plans = _plans()
    trace = scheduled_trace(plans, schedule, V, temperature=temperature, top_k=top_k)
    logp, mask = trace_logp(policy, SCENES, trace)
    scene = torch.arange(len(plans)) // (len(plans) // 2)
    expected = torch.tensor(
        [
            outcome_probability(policy, int(s), plan, schedule, temperature, top_k)
            for s, plan in zip(scene, plans.tolist(), strict=True)
        ],
        dtype=torch.float64,
    )
    reachable = expected > 0
    probability = logp.sum(1).exp().detach()
    torch.testing.assert_close(probability[reachable], expected[reachable], rtol=1e-10, atol=0)
    for s in range(2):
        assert float(probability[reachable & (scene == s)].sum()) == pytest.approx(1.0, abs=1e-10)
    assert bool((mask.sum(1) == L).all())
    # Plans outside the top-k are never sampled; their likelihood is finite all the same.
    assert bool(logp.isfinite().all())
    assert int(reachable.sum()) == 2 * (top_k or V) ** L


@pytest.mark.parametrize("steps", [3, 2])
def test_importance_sampling_identity_over_random_orders(policy: TabularDenoiser, steps: int) -> None:
    new = TabularDenoiser(num_scenes=2, length=L, vocab_size=V, seed=1)
    plans, scene = all_outcomes(L, V), 1
    value = torch.sin(1.7 * torch.arange(len(plans), dtype=torch.float64))
    weighted, expected, plain = 0.0, 0.0, 0.0
    schedules = all_schedules(L, steps)
    for schedule in schedules:
        trace = scheduled_trace(plans, schedule, V)
        context = torch.tensor([scene])
        weight = (trace_logp(new, context, trace)[0] - trace_logp(policy, context, trace)[0]).sum(1).exp()
        for plan, w, f in zip(plans.tolist(), weight.tolist(), value.tolist(), strict=True):
            old_probability = outcome_probability(policy, scene, plan, schedule)
            weighted += old_probability * w * f / len(schedules)
            plain += old_probability * f / len(schedules)
            expected += outcome_probability(new, scene, plan, schedule) * f / len(schedules)
    assert weighted == pytest.approx(expected, abs=1e-12)
    assert abs(plain - expected) > 0.05


def _state_confidence(policy: TabularDenoiser):  # type: ignore[no-untyped-def]
    def reveals(state: list[int], hidden: list[int]) -> set[tuple[int, int]]:
        best = max(hidden, key=lambda position: max(distribution(policy, 0, state, position)))
        return {(best, token) for token in range(V)}

    return reveals


def _sampled_confidence(policy: TabularDenoiser):  # type: ignore[no-untyped-def]
    def reveals(state: list[int], hidden: list[int]) -> set[tuple[int, int]]:
        rows = {position: distribution(policy, 0, state, position) for position in hidden}
        found = set()
        for draw in itertools.product(range(V), repeat=len(hidden)):
            drawn = dict(zip(hidden, draw, strict=True))
            best = max(hidden, key=lambda position: rows[position][drawn[position]])
            found.add((best, drawn[best]))
        return found

    return reveals


def test_state_confidence_order_is_exact_for_the_weights_that_sampled(policy: TabularDenoiser) -> None:
    trace = adaptive_trace(policy, _state_confidence(policy))
    logp, _ = trace_logp(policy, torch.tensor([0]), trace)
    assert len(trace) == V**L
    assert logp.sum(1).exp().sum().item() == pytest.approx(1.0, abs=1e-12)
    # For other weights the recorded schedule is part of the environment: still a probability, over the same paths.
    other = TabularDenoiser(num_scenes=2, length=L, vocab_size=V, seed=5)
    assert trace_logp(other, torch.tensor([0]), trace)[0].sum(1).exp().sum().item() == pytest.approx(1.0, abs=1e-12)
    own = adaptive_trace(other, _state_confidence(other))
    assert not torch.equal(own.scored, trace.scored)


def test_sampler_with_confidence_order_walks_the_enumerated_paths(policy: TabularDenoiser) -> None:
    paths = adaptive_trace(policy, _state_confidence(policy))
    known = {tuple(row) for row in flatten_steps(torch.where(paths.scored, paths.action, -1)).tolist()}
    uniforms = torch.rand(400, 2, L, generator=torch.Generator().manual_seed(3))
    decoding = Decoding(steps=L, order="confidence", temperature=1.0, top_k=0)
    drawn = sample(policy, torch.tensor([0]), uniforms, decoding)
    seen = {tuple(row) for row in flatten_steps(torch.where(drawn.scored, drawn.action, -1)).tolist()}
    assert seen <= known
    assert len(seen) > 20


def test_order_by_the_sampled_token_is_no_probability(policy: TabularDenoiser) -> None:
    """Why `low_confidence` is refused: the revealed token was chosen because it came out likely.

    The trace's product leaves the choice of position out, although that choice depended on the draws, so the "masses"
    of all paths the sampler can take do not add up to 1 and a ratio of two such products means nothing.
    """
    trace = adaptive_trace(policy, _sampled_confidence(policy))
    mass = trace_logp(policy, torch.tensor([0]), trace)[0].sum(1).exp().sum().item()
    assert len(trace) > V**L
    assert mass == pytest.approx(5.4036, abs=1e-3)
    with pytest.raises(ConfigError, match=r"low_confidence.*confidence"):
        Decoding(steps=L, order="low_confidence", temperature=1.0, top_k=0)


@pytest.mark.parametrize("order", MASKED_ORDERS)
@pytest.mark.parametrize(("steps", "temperature", "top_k"), [(3, 1.0, 0), (2, 0.7, 2), (1, 1.5, 1), (3, 1.0, 2)])
def test_recomputed_equals_behaviour_and_ratio_is_one(
    policy: TabularDenoiser, order: str, steps: int, temperature: float, top_k: int
) -> None:
    uniforms = torch.rand(64, 2, L, generator=torch.Generator().manual_seed(1))
    decoding = Decoding(steps=steps, order=order, temperature=temperature, top_k=top_k)
    trace = sample(policy, SCENES, uniforms, decoding)
    logp, mask = trace_logp(policy, SCENES, trace)
    torch.testing.assert_close(logp.float(), flatten_steps(trace.logp), rtol=0, atol=2e-6)
    ratio = (logp - flatten_steps(trace.logp)).sum(1).exp()
    torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=1e-5)
    assert bool((logp[~mask] == 0).all())


@pytest.mark.parametrize(("max_rows", "passes"), [(0, 1), (1, 3), (54, 3), (107, 3), (108, 2), (162, 1), (1000, 1)])
def test_chunks_change_no_value_and_no_gradient(policy: TabularDenoiser, max_rows: int, passes: int) -> None:
    trace = scheduled_trace(_plans(), [[1], [2], [0]], V, temperature=0.8, top_k=2)
    weights = torch.linspace(-1, 1, 54 * 9, dtype=torch.float64).view(54, 9)
    packed, _ = trace_logp(policy, SCENES, trace)
    (packed_grad,) = torch.autograd.grad((packed * weights).sum(), policy.table)
    policy.calls.clear()
    logp, _ = trace_logp(policy, SCENES, trace, max_rows=max_rows)
    (grad,) = torch.autograd.grad((logp * weights).sum(), policy.table)
    torch.testing.assert_close(logp, packed, rtol=0, atol=1e-12)
    torch.testing.assert_close(grad, packed_grad, rtol=0, atol=1e-12)
    assert len(policy.calls) == passes
    assert sum(rows for rows, _ in policy.calls) == 3 * 54
    # One head evaluation per scored position, not one per position of each state.
    assert sum(heads for _, heads in policy.calls) == 54 * L


def test_packed_equals_one_state_at_a_time(policy: TabularDenoiser) -> None:
    trace = scheduled_trace(_plans(), [[2], [0, 1]], V)
    packed, _ = trace_logp(policy, SCENES, trace)
    for n in range(len(trace)):
        row = trace.rows(torch.tensor([n]))
        for k in range(2):
            scored = torch.zeros_like(row.scored)
            scored[k] = row.scored[k]
            alone, mask = trace_logp(policy, SCENES[[n // 27]], replace(row, scored=scored))
            torch.testing.assert_close(alone[mask], packed[n : n + 1][mask], rtol=0, atol=1e-12)


def test_value_does_not_depend_on_batch_mates(policy: TabularDenoiser) -> None:
    trace = scheduled_trace(_plans(), [[0], [1], [2]], V)
    full, _ = trace_logp(policy, SCENES, trace)
    index = torch.tensor([30, 28, 53, 27])
    part, _ = trace_logp(policy, torch.tensor([1]), trace.rows(index))
    torch.testing.assert_close(part, full[index], rtol=0, atol=1e-12)
    swapped, _ = trace_logp(policy, torch.tensor([1, 0]), trace.rows(torch.arange(54).roll(27)))
    torch.testing.assert_close(swapped, full.roll(27, 0), rtol=0, atol=1e-12)


def test_steps_that_score_nothing_are_left_out(policy: TabularDenoiser) -> None:
    trace = scheduled_trace(_plans(), [[0], [1], [2]], V)
    full, _ = trace_logp(policy, SCENES, trace)
    scored = trace.scored.clone()
    scored[1] = False
    policy.calls.clear()
    logp, mask = trace_logp(policy, SCENES, replace(trace, scored=scored))
    assert policy.calls == [(2 * 54, 2 * 54)]
    expected = torch.where(flatten_steps(scored), full, 0.0)
    torch.testing.assert_close(logp, expected, rtol=0, atol=1e-12)
    assert torch.equal(mask, flatten_steps(scored))
    empty, _ = trace_logp(policy, SCENES, replace(trace, scored=torch.zeros_like(scored)))
    assert len(policy.calls) == 1
    assert empty.abs().sum() == 0


def test_greedy_trace_has_no_likelihood(policy: TabularDenoiser) -> None:
    trace = scheduled_trace(_plans(), [[0], [1], [2]], V, temperature=0.0)
    with pytest.raises(ConfigError, match=r"rollout\.temperature"):
        trace_logp(policy, SCENES, trace)


def test_estimator_equals_the_function_and_gives_entropies(policy: TabularDenoiser) -> None:
    trace = scheduled_trace(_plans(), [[1], [2], [0]], V, temperature=0.8, top_k=2)
    found = TraceLikelihood()(policy, SCENES, trace, entropy=True)
    logp, mask = trace_logp(policy, SCENES, trace)
    assert torch.equal(found.logp, logp)
    assert torch.equal(found.mask, mask)
    assert found.entropy is not None
    assert bool((found.entropy[~mask] == 0).all())
    for n in (0, 31):
        for k, positions in enumerate([[1], [2], [0]]):
            row = distribution(policy, n // 27, trace.state[k, n].tolist(), positions[0], 0.8, 2)
            if row[int(trace.action[k, n, positions[0]])] == 0.0:
                continue  # the action joins the support: tested by hand with the entropy itself
            expected = -sum(p * math.log(p) for p in row if p > 0)
            assert found.entropy[n, k * L + positions[0]].item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("max_tokens", "rows"), [(20 * L + 2, 20), (101 * L, 100), (162 * L, 162)])
def test_passes_are_bounded_in_tokens_and_computed_again(policy: TabularDenoiser, max_tokens: int, rows: int) -> None:
    trace = scheduled_trace(_plans(), [[1], [2], [0]], V, temperature=0.8)
    weights = torch.linspace(-1, 1, 54 * 9, dtype=torch.float64).view(54, 9)
    packed = TraceLikelihood()(policy, SCENES, trace, entropy=True)
    assert packed.entropy is not None
    (packed_grad,) = torch.autograd.grad(((packed.logp + packed.entropy) * weights).sum(), policy.table)
    policy.calls.clear()
    found = TraceLikelihood()(policy, SCENES, trace, entropy=True, max_tokens=max_tokens)
    assert found.entropy is not None
    passes = len(policy.calls)
    assert max(size for size, _ in policy.calls) <= rows
    assert passes == -(-162 // rows)
    (grad,) = torch.autograd.grad(((found.logp + found.entropy) * weights).sum(), policy.table)
    torch.testing.assert_close(found.logp, packed.logp, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.entropy, packed.entropy, rtol=0, atol=1e-12)
    torch.testing.assert_close(grad, packed_grad, rtol=0, atol=1e-12)
    assert len(policy.calls) == (2 * passes if passes > 1 else 1)
    with torch.no_grad():
        policy.calls.clear()
        TraceLikelihood()(policy, SCENES, trace, max_tokens=max_tokens)
    assert len(policy.calls) == passes


def test_steps_not_asked_for_are_not_evaluated(policy: TabularDenoiser) -> None:
    trace = scheduled_trace(_plans(), [[1], [2], [0]], V)
    full = TraceLikelihood()(policy, SCENES, trace, entropy=True)
    policy.calls.clear()
    found = TraceLikelihood()(policy, SCENES, trace, steps=torch.tensor([2, 0]), entropy=True)
    assert policy.calls == [(2 * 54, 2 * 54)]
    chosen = torch.tensor([True, False, True]).repeat_interleave(L)
    assert torch.equal(found.mask, full.mask & chosen)
    torch.testing.assert_close(found.logp, torch.where(chosen, full.logp, 0.0), rtol=0, atol=1e-12)
    assert full.entropy is not None
    assert found.entropy is not None
    torch.testing.assert_close(found.entropy, torch.where(chosen, full.entropy, 0.0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("m", [1, 2])
def test_drawn_steps_are_unbiased_for_sums_of_token_terms_and_not_for_products(policy: TabularDenoiser, m: int) -> None:
    """All subsets of m of K = 3 steps, each slot weighed K/m: the mean of a clipped token objective is the full one."""
    new = TabularDenoiser(num_scenes=2, length=L, vocab_size=V, seed=1)
    trace = scheduled_trace(_plans(), [[1], [2], [0]], V)
    trace_likelihood, advantage = TraceLikelihood(), torch.linspace(-1, 1, 54, dtype=torch.float64)[:, None]

    def ratios(steps: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        live, old = (trace_likelihood(p, SCENES, trace, steps=steps) for p in (new, policy))
        return (live.logp - old.logp).exp().detach(), live.mask

    def token_objective(steps: torch.Tensor | None) -> torch.Tensor:
        ratio, mask = ratios(steps)
        term = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        return torch.where(mask, term, 0.0).sum(1) * (1 if steps is None else 3 / len(steps))

    def rollout_ratio(steps: torch.Tensor | None) -> torch.Tensor:
        ratio, mask = ratios(steps)
        return torch.where(mask, ratio.log(), 0.0).sum(1).mul(1 if steps is None else 3 / len(steps)).exp()

    subsets = [torch.tensor(chosen) for chosen in itertools.combinations(range(3), m)]
    mean = torch.stack([token_objective(chosen) for chosen in subsets]).mean(0)
    torch.testing.assert_close(mean, token_objective(None), rtol=0, atol=1e-12)
    products = torch.stack([rollout_ratio(chosen) for chosen in subsets]).mean(0)
    assert float((products - rollout_ratio(None)).abs().mean()) > 0.1
