"""Both exact likelihoods of a discrete flow against enumeration: every augmented path of a table model is listed."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from oracles.tabular import TabularDenoiser
from oracles.tabular_flow import AllPaths, DenseFlow, TabularFlow, all_paths, distributions, end_masses
from oracles.tiny_policy import ARCHITECTURE, observation
from torch import Tensor

from rlhf_drive.errors import ConfigError, DataError
from rlhf_drive.likelihood import flatten_steps, make_likelihood, trace_logp
from rlhf_drive.likelihood.base import TokenLogp
from rlhf_drive.likelihood.scoring import score_draws
from rlhf_drive.policies import Decoding, Policy, TrajectoryTokenizer
from rlhf_drive.policies.flow import decode_times
from rlhf_drive.policies.moe import RouterRecord
from rlhf_drive.policies.trace import DecodeTrace

SCENE = torch.tensor([0])
SIZES = [(1, 1), (1, 2), (1, 3), (2, 2)]
"""(L, K) of the models whose paths are listed; V = 3."""
MARGINAL = make_likelihood("marginal")


def paths_of(policy: TabularFlow, steps: int, *, temperature: float = 1.0, top_k: int = 0) -> AllPaths:
    return all_paths(policy, decode_times(steps).tolist(), temperature=temperature, top_k=top_k)


def augmented(policy: TabularFlow, paths: AllPaths) -> Tensor:
    """``[N]`` probability of every augmented path, by our likelihood and the enumerated moves."""
    logp, _ = trace_logp(policy, SCENE, paths.trace)
    return paths.environment * logp.sum(1).exp()


def marginal_sum(policy: TabularFlow, trace: DecodeTrace) -> Tensor:
    return MARGINAL(policy, SCENE, trace).logp.sum(1)


def states_of(trace: DecodeTrace) -> Tensor:
    """``[N]`` number of the path of states (the finished plan included) that each row goes through."""
    every = torch.cat([trace.state, trace.tokens[None]]).transpose(0, 1).flatten(1)
    return every.unique(dim=0, return_inverse=True)[1]


def total_by(group: Tensor, values: Tensor) -> Tensor:
    return torch.zeros(int(group.max()) + 1, dtype=values.dtype).index_add(0, group, values)


def by_group(group: Tensor, values: Tensor) -> Tensor:
    """One value per group, of values that are the same all over each."""
    out = torch.zeros(int(group.max()) + 1, dtype=values.dtype)
    out[group] = values
    torch.testing.assert_close(out[group], values, rtol=0, atol=1e-12)
    return out


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (0.6, 0), (1.5, 2)])
@pytest.mark.parametrize(("length", "steps"), SIZES)
def test_augmented_paths_sum_to_one(length: int, steps: int, temperature: float, top_k: int) -> None:
    policy = TabularFlow(length, 3, seed=1)
    paths = paths_of(policy, steps, temperature=temperature, top_k=top_k)
    ends = end_masses(policy, paths.trace)
    inside = ends > 0  # end points outside the support cannot be drawn: a trace holds none
    mass = augmented(policy, paths)[inside]
    torch.testing.assert_close(mass, (paths.environment * ends)[inside], rtol=1e-9, atol=0)
    assert mass.sum().item() == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize(("length", "steps"), SIZES)
def test_marginal_is_the_sum_over_end_points_and_sums_to_one(length: int, steps: int) -> None:
    policy = TabularFlow(length, 3, seed=2)
    paths = paths_of(policy, steps)
    group = states_of(paths.trace)
    brute = total_by(group, augmented(policy, paths))
    ours = by_group(group, marginal_sum(policy, paths.trace)).exp() / 3**length
    torch.testing.assert_close(ours, brute, rtol=1e-9, atol=0)
    assert ours.sum().item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (0.6, 0), (1.3, 2)])
def test_each_slot_is_the_log_of_a_loop_over_end_points(temperature: float, top_k: int) -> None:
    policy = TabularFlow(2, 4, seed=3)
    decoding = Decoding(3, "all", temperature, top_k)
    uniforms = torch.rand(40, 10, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    trace = policy.process.sample(policy, SCENE, uniforms, decoding)
    found = MARGINAL(policy, SCENE, trace, entropy=True)
    dense, times = DenseFlow.of(policy.process), [*trace.time.double().tolist(), 1.0]
    assert found.entropy is not None
    for k in range(3):
        kernel = dense.kernel(times[k], times[k + 1] - times[k]) if k < 2 else None
        for n in range(40):
            p = distributions(policy, trace.state[k, n], times[k], temperature=temperature, top_k=top_k)
            for place in range(2):
                before = int(trace.state[k, n, place])
                if kernel is None:
                    expected = float(p[place, trace.tokens[n, place]])
                else:
                    after = int(trace.state[k + 1, n, place])
                    expected = sum(float(p[place, a] * kernel[a, before, after]) for a in range(4))
                assert found.logp[n, 2 * k + place].item() == pytest.approx(math.log(expected), abs=1e-9)
                entropy = -float((p[place] * p[place].clamp(min=1e-300).log()).sum())
                assert found.entropy[n, 2 * k + place].item() == pytest.approx(entropy, abs=1e-9)
    assert bool(found.mask.all())


def test_one_step_needs_no_end_points() -> None:
    policy = TabularFlow(2, 3, seed=4)
    trace = paths_of(policy, 1).trace
    logp, _ = trace_logp(policy, SCENE, trace)
    torch.testing.assert_close(MARGINAL(policy, SCENE, trace).logp, logp, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("length", "steps"), SIZES)
def test_importance_sampling_is_exact_for_both_and_the_marginal_varies_less(length: int, steps: int) -> None:
    """``E_old[w f] = E_new[f]`` for a function of the plan, and of all states; weights average over end points."""
    old, new = TabularFlow(length, 3, seed=5), TabularFlow(length, 3, seed=6)
    paths = paths_of(old, steps)
    trace, mass = paths.trace, augmented(old, paths)
    wanted = augmented(new, paths)
    full = (trace_logp(new, SCENE, trace)[0] - trace_logp(old, SCENE, trace)[0]).sum(1).exp()
    slim = (marginal_sum(new, trace) - marginal_sum(old, trace)).exp()
    place = 3 ** torch.arange(length)
    reward = torch.randn(3**length, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for f in (reward[trace.tokens @ place], reward[trace.state[-1] @ place] * reward[trace.tokens @ place]):
        truth = (wanted * f).sum().item()
        assert (mass * full * f).sum().item() == pytest.approx(truth, abs=1e-6)
        assert (mass * slim * f).sum().item() == pytest.approx(truth, abs=1e-6)
    assert abs((mass * reward[trace.tokens @ place]).sum().item() - truth) > 1e-3  # the weights matter
    group = states_of(trace)
    averaged = total_by(group, mass * full) / total_by(group, mass)
    torch.testing.assert_close(averaged, by_group(group, slim), rtol=1e-9, atol=0)

    def variance(weight: Tensor) -> float:
        return float((mass * (weight - 1.0).square()).sum().detach())

    if steps == 1:
        assert variance(slim) == pytest.approx(variance(full), abs=1e-9)
    else:
        assert variance(slim) < 0.9 * variance(full)


def test_another_beta_is_another_likelihood() -> None:
    policy, other = TabularFlow(1, 3, seed=7), TabularFlow(1, 3, seed=7)
    other.process.path = replace(other.process.path, beta_scale=8.0)
    trace = paths_of(policy, 3).trace
    mine, theirs = (MARGINAL(p, SCENE, trace).logp for p in (policy, other))
    assert (mine - theirs)[:, :2].abs().max() > 0.1
    torch.testing.assert_close(mine[:, 2], theirs[:, 2], rtol=0, atol=1e-12)  # the last step knows no beta


def test_gradient_is_that_of_the_summed_paths() -> None:
    policy = TabularFlow(1, 3, seed=8)
    paths = paths_of(policy, 2)
    group = states_of(paths.trace)
    brute = total_by(group, paths.environment * trace_logp(policy, SCENE, paths.trace)[0].sum(1).exp()).log()
    weights = torch.linspace(-1, 1, len(brute), dtype=torch.float64)
    (expected,) = torch.autograd.grad((weights * brute).sum(), policy.table)
    first = torch.stack([(group == g).nonzero()[0, 0] for g in range(len(brute))])
    (found,) = torch.autograd.grad((weights * marginal_sum(policy, paths.trace.rows(first))).sum(), policy.table)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (0.7, 2), (1.5, 3)])
@pytest.mark.parametrize("steps", [1, 4])
def test_recomputed_trace_equals_behaviour(steps: int, temperature: float, top_k: int) -> None:
    policy = TabularFlow(2, 4, seed=9, num_scenes=2)
    decoding = Decoding(steps, "all", temperature, top_k)
    shape = policy.process.uniforms_shape(2, decoding)
    uniforms = torch.rand(64, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    trace = policy.process.sample(policy, torch.tensor([0, 1]), uniforms, decoding)
    logp, mask = trace_logp(policy, torch.tensor([0, 1]), trace)
    torch.testing.assert_close(logp.float(), flatten_steps(trace.logp), rtol=0, atol=2e-6)
    assert mask.shape == (64, 2 * steps)
    assert bool(mask.all())


def test_what_the_sampler_noted_is_not_the_marginal() -> None:
    assert not MARGINAL.behaviour
    policy = TabularFlow(1, 3, seed=10)
    trace = paths_of(policy, 3).trace
    logp, _ = trace_logp(policy, SCENE, trace)
    assert (MARGINAL(policy, SCENE, trace).logp - logp).abs().max() > 0.1


def test_an_end_point_that_fell_out_of_the_top_k_stays_possible() -> None:
    policy = TabularFlow(2, 4, seed=11)
    decoding = Decoding(3, "all", 1.0, 2)
    uniforms = torch.rand(200, 10, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    trace = policy.process.sample(policy, SCENE, uniforms, decoding)
    with torch.no_grad():
        policy.table.copy_(policy.table.roll(1, dims=-1))
    found = MARGINAL(policy, SCENE, trace).logp
    assert bool(found.isfinite().all())
    (gradient,) = torch.autograd.grad(found.sum(), policy.table)
    assert bool(gradient.isfinite().all())


def test_saturated_models_stay_finite() -> None:
    """Logits of 1,000 and a time next to 1: probabilities underflow, logarithms do not."""
    policy = TabularFlow(1, 7, seed=12, scale=300.0)
    policy.process.path = replace(policy.process.path, beta_scale=300.0)
    decoding = Decoding(20, "all", 1.0, 0)
    uniforms = torch.rand(100, 61, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    trace = policy.process.sample(policy, SCENE, uniforms, decoding)
    found = MARGINAL(policy, SCENE, trace, entropy=True)
    (gradient,) = torch.autograd.grad(found.logp.sum(), policy.table)
    assert all(bool(x.isfinite().all()) for x in (found.logp, found.entropy, gradient) if x is not None)


def scored(policy: TabularFlow, trace: DecodeTrace, **options: object) -> tuple[TokenLogp, Tensor]:
    """The likelihood of two scenes, and the gradient of a weighted sum of it."""
    found = MARGINAL(policy, torch.tensor([0, 1]), trace, **options)  # type: ignore[arg-type]
    weights = torch.linspace(-1, 1, found.logp.numel(), dtype=torch.float64).view_as(found.logp)
    return found, torch.autograd.grad((weights * found.logp).sum(), policy.table)[0]


@pytest.fixture
def sampled() -> tuple[TabularFlow, DecodeTrace]:
    policy = TabularFlow(2, 4, seed=13, num_scenes=2)
    uniforms = torch.rand(24, 10, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return policy, policy.process.sample(policy, torch.tensor([0, 1]), uniforms, Decoding(3, "all", 0.8, 3))


@pytest.mark.parametrize(("max_tokens", "passes"), [(0, 1), (16, 9), (40, 4), (144, 1)])
def test_passes_change_no_value(
    sampled: tuple[TabularFlow, DecodeTrace], max_tokens: int, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, trace = sampled
    whole, whole_gradient = scored(policy, trace, entropy=True)
    # Logits of ten positions at a time.
    monkeypatch.setattr("rlhf_drive.likelihood.passes.score_draws", partial(score_draws, limit=40))
    policy.calls.clear()
    with torch.no_grad():
        MARGINAL(policy, torch.tensor([0, 1]), trace, max_tokens=max_tokens)
    assert len(policy.calls) == passes
    part, gradient = scored(policy, trace, entropy=True, max_tokens=max_tokens)
    torch.testing.assert_close(part.logp, whole.logp, rtol=0, atol=1e-12)
    torch.testing.assert_close(part.entropy, whole.entropy, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient, whole_gradient, rtol=0, atol=1e-12)


def test_rows_and_steps_do_not_depend_on_their_company(sampled: tuple[TabularFlow, DecodeTrace]) -> None:
    policy, trace = sampled
    whole = MARGINAL(policy, torch.tensor([0, 1]), trace)
    index = torch.tensor([20, 13, 23])
    part = MARGINAL(policy, torch.tensor([1]), trace.rows(index))
    torch.testing.assert_close(part.logp, whole.logp[index], rtol=0, atol=1e-12)
    some = MARGINAL(policy, torch.tensor([0, 1]), trace, steps=torch.tensor([2, 0]))
    assert some.mask.view(24, 3, 2).all(dim=(0, 2)).tolist() == [True, False, True]
    torch.testing.assert_close(some.logp, torch.where(some.mask, whole.logp, 0.0), rtol=0, atol=1e-12)


def test_routing_is_kept_and_replayed() -> None:
    torch.manual_seed(0)
    policy = Policy(ARCHITECTURE, TrajectoryTokenizer("displacements", -5.0, 15.0, 0.1), "flow").eval()
    context, decoding = policy.encode([observation(0), observation(1)]), Decoding(3, "all", 1.0, 0)
    uniforms = torch.rand(6, 10, 16, generator=torch.Generator().manual_seed(0))
    trace = policy.process.sample(policy, context, uniforms, decoding, keep_experts=True)
    record = RouterRecord()
    found = MARGINAL(policy, context, replace(trace, experts=None), keep_experts=True, record=record)
    assert trace.experts is not None
    assert found.experts is not None
    assert torch.equal(found.experts, trace.experts)
    assert record.rows == 18
    with torch.no_grad():
        for layer in policy.decoder.layers:
            layer.moe.router.weight.neg_()  # type: ignore[union-attr]
    live = MARGINAL(policy, context, replace(trace, experts=None), keep_experts=True)
    replayed = MARGINAL(policy, context, trace, keep_experts=True)
    assert live.experts is not None
    assert not torch.equal(live.experts, trace.experts)
    assert replayed.experts is not None
    assert torch.equal(replayed.experts, trace.experts)
    assert (live.logp - replayed.logp).abs().max() > 1e-5


def test_a_real_policy_has_ratio_one_at_its_own_weights_and_moves_with_them() -> None:
    torch.manual_seed(1)
    policy = Policy(ARCHITECTURE, TrajectoryTokenizer("displacements", -5.0, 15.0, 0.1), "flow").eval()
    context, decoding = policy.encode([observation(0), observation(1)]), Decoding(4, "all", 1.0, 20)
    uniforms = torch.rand(8, 13, 16, generator=torch.Generator().manual_seed(0))
    trace = policy.process.sample(policy, context, uniforms, decoding)
    old = MARGINAL(policy, context, trace).logp.detach()
    new = MARGINAL(policy, context, trace, max_tokens=64).logp
    torch.testing.assert_close(new, old, rtol=0, atol=2e-5)
    logp, _ = trace_logp(policy, context, trace)
    torch.testing.assert_close(logp, flatten_steps(trace.logp), rtol=0, atol=2e-5)
    # A step up the gradient of the first rollout's log-probability raises it.
    new[0].sum().backward()
    with torch.no_grad():
        for parameter in policy.head.parameters():
            assert parameter.grad is not None
            parameter.add_(1e-4 * parameter.grad)
    assert MARGINAL(policy, context, trace).logp[0].sum() > old[0].sum() + 1e-3


def test_policies_without_end_points_are_refused() -> None:
    masked = TabularDenoiser(num_scenes=1, length=2, vocab_size=3, seed=0)
    trace = paths_of(TabularFlow(2, 3, seed=0), 1).trace
    with pytest.raises(ConfigError, match=r"'marginal'.*'trace'.*'flow'"):
        MARGINAL(masked, SCENE, trace)


def test_greedy_paths_have_no_likelihood_and_probes_are_not_drawn() -> None:
    policy = TabularFlow(1, 3, seed=0)
    trace = paths_of(policy, 2).trace
    with pytest.raises(ConfigError, match=r"rollout\.temperature"):
        MARGINAL(policy, SCENE, replace(trace, temperature=0.0))
    with pytest.raises(DataError, match="no probes"):
        MARGINAL.draw(trace, torch.rand(1))
    assert MARGINAL.probe_shape(2) is None
