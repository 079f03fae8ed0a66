"""A real policy in passes: the same values, gradients and routing however the rows are cut."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from oracles.tiny_policy import ARCHITECTURE, observation
from torch import Tensor

from rlhf_drive.likelihood import Probes, TokenLogp, flatten_steps, make_likelihood, tempered_logp
from rlhf_drive.likelihood_fits import likelihoods_of
from rlhf_drive.policies import DecodeTrace, Decoding, Policy, TrajectoryTokenizer
from rlhf_drive.policies.inputs import ObservationBatch
from rlhf_drive.policies.moe import RouterRecord

S, G, K, DRAWS = 2, 2, 4, 2
TOKENIZER = TrajectoryTokenizer("displacements", -5.0, 15.0, 0.5, num_poses=4)
NAMES = likelihoods_of("masked")


def moved(policy: Policy, by: float, seed: int = 1) -> Policy:
    """A copy with all weights disturbed."""
    other = copy.deepcopy(policy)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator))
    return other


@pytest.fixture(scope="module")
def policy() -> Policy:
    torch.manual_seed(3)
    return moved(Policy(ARCHITECTURE, TOKENIZER).eval(), 0.1, seed=0)


@cache
def scenes(*chosen: int) -> ObservationBatch:
    """Inputs of the network, which do not depend on its weights."""
    return Policy(ARCHITECTURE, TOKENIZER).batch([observation(s, agents=s + 1) for s in chosen])


@pytest.fixture(scope="module")
def trace(policy: Policy) -> DecodeTrace:
    uniforms = torch.rand(S * G, 2, policy.tokenizer.length, generator=torch.Generator().manual_seed(2))
    decoding = Decoding(K, "random", 0.8, 0)
    return policy.process.sample(policy, policy.encode(scenes(*range(S))), uniforms, decoding, keep_experts=True)


def free(trace: DecodeTrace) -> DecodeTrace:
    return replace(trace, experts=None)


def drawn(name: str, trace: DecodeTrace) -> Probes | None:
    estimator = make_likelihood(name, draws=DRAWS)
    shape = estimator.probe_shape(trace.state.shape[-1])
    if shape is None:
        return None
    probes = estimator.draw(trace, torch.rand(len(trace), *shape, generator=torch.Generator().manual_seed(5)))
    return replace(probes, negative=torch.arange(len(trace)) % 2 == 0)


def score(name: str, policy: Policy, trace: DecodeTrace, probes: Probes | None, **options: object) -> TokenLogp:
    estimator = make_likelihood(name, draws=DRAWS)
    return estimator(policy, policy.encode(scenes(*range(S))), trace, probes, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_packed_equals_one_row_at_a_time_with_its_own_context(policy: Policy, trace: DecodeTrace, name: str) -> None:
    probes, estimator = drawn(name, trace), make_likelihood(name, draws=DRAWS)
    with torch.no_grad():
        packed = score(name, policy, trace, probes).logp
        cut = score(name, policy, trace, probes, max_tokens=50).logp
        for n in range(S * G):
            index = torch.tensor([n])
            part = None if probes is None else probes.rows(index)
            alone = estimator(policy, policy.encode(scenes(n // G)), trace.rows(index), part).logp
            torch.testing.assert_close(alone, packed[index], rtol=0, atol=1e-5)
    torch.testing.assert_close(cut, packed, rtol=0, atol=1e-5)


def test_trace_equals_one_state_at_a_time_and_the_sampler(policy: Policy, trace: DecodeTrace) -> None:
    with torch.no_grad():
        packed = score("trace", policy, trace, None)
        for n in range(S * G):
            for k in range(K):
                context, scored = policy.encode(scenes(n // G)), trace.scored[k, n : n + 1]
                logits = policy.action_logits(trace.state[k, n : n + 1], trace.time[k : k + 1], context, scored)
                expected = tempered_logp(logits, trace.action[k, n][scored[0]], 0.8, 0)
                found = packed.logp[n].view(K, -1)[k][scored[0]]
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(packed.logp, flatten_steps(trace.logp), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["trace", "coupled"])
@pytest.mark.parametrize("replay", [False, True])
def test_passes_computed_again_give_the_same_gradient(
    policy: Policy, trace: DecodeTrace, name: str, replay: bool
) -> None:
    live, probes = moved(policy, 0.05), drawn(name, trace)
    parameters = list(live.parameters())
    source = trace if replay else free(trace)
    if replay and probes is not None:
        probes = replace(probes, experts=score(name, policy, trace, probes, keep_experts=True).experts)

    def run(max_tokens: int) -> tuple[Tensor, Tensor, list[Tensor]]:
        found = score(name, live, source, probes, max_tokens=max_tokens, entropy=True)
        assert found.entropy is not None
        loss = (found.logp * torch.linspace(-1, 1, found.logp.shape[1])).sum() + 0.1 * found.entropy.sum()
        grads = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        return found.logp, found.entropy, list(grads)

    logp, entropy, grads = run(0)
    cut_logp, cut_entropy, cut_grads = run(48)
    torch.testing.assert_close(cut_logp, logp, rtol=0, atol=2e-5)
    torch.testing.assert_close(cut_entropy, entropy, rtol=0, atol=2e-5)
    largest = max(float(grad.abs().max()) for grad in grads)
    assert largest > 0.1
    for cut, whole in zip(cut_grads, grads, strict=True):
        torch.testing.assert_close(cut, whole, rtol=0, atol=2e-5 * largest)


@pytest.mark.parametrize("name", NAMES)
def test_routing_is_kept_and_replayed(policy: Policy, trace: DecodeTrace, name: str) -> None:
    live, probes = moved(policy, 0.05), drawn(name, trace)
    with torch.no_grad():
        kept = score(name, policy, free(trace), probes, keep_experts=True)
        cut = score(name, policy, free(trace), probes, keep_experts=True, max_tokens=50)
        assert kept.experts is not None
        copies = K if name == "trace" else 1 if probes is None else len(probes.hidden)
        slots = policy.tokenizer.length * ARCHITECTURE.experts_per_token
        assert kept.experts.shape == (copies, S * G, ARCHITECTURE.decoder_layers, slots)
        torch.testing.assert_close(cut.experts, kept.experts, rtol=0, atol=0)
        if name in ("trace", "mean_field"):  # the sampler was in the same states
            assert trace.experts is not None
            assert torch.equal(kept.experts, trace.experts[:copies])
        old_trace = replace(trace, experts=kept.experts)
        old_probes = None if probes is None else replace(probes, experts=kept.experts)
        if probes is not None:  # the sampler was elsewhere
            old_trace = trace
        replayed = score(name, live, old_trace, old_probes, keep_experts=True, max_tokens=50)
        assert torch.equal(replayed.experts, kept.experts)  # type: ignore[arg-type]
        own = score(name, live, free(trace), probes, keep_experts=True)
        flips = (own.experts != kept.experts).float().mean()  # type: ignore[union-attr]
        assert 0.01 < float(flips) < 0.7
        assert float((own.logp - replayed.logp).abs().max()) > 1e-3
        # At the old weights a replay changes nothing: the ratio is 1.
        again = score(name, policy, old_trace, old_probes)
        torch.testing.assert_close(again.logp, kept.logp, rtol=0, atol=1e-6)


def test_routing_of_steps_left_out_cannot_be_replayed(policy: Policy, trace: DecodeTrace) -> None:
    with torch.no_grad():
        found = score("trace", policy, free(trace), None, keep_experts=True, steps=torch.tensor([3, 1]))
    assert found.experts is not None
    assert trace.experts is not None
    assert torch.equal(found.experts[[1, 3]], trace.experts[[1, 3]])
    assert bool((found.experts[[0, 2]] == -1).all())


@pytest.mark.parametrize("max_tokens", [0, 48])
def test_record_takes_the_first_pass_once(policy: Policy, trace: DecodeTrace, max_tokens: int) -> None:
    live, record = moved(policy, 0.05), RouterRecord()
    found = score("trace", live, trace, None, max_tokens=max_tokens, record=record)
    rows = K * S * G if max_tokens == 0 else max_tokens // policy.tokenizer.length
    assert record.rows == rows
    (found.logp.sum() + record.z_loss()).backward()  # type: ignore[no-untyped-call]
    assert len(record.chosen) == len(record.logits) == ARCHITECTURE.decoder_layers
    assert record.logits[0].shape == (rows * policy.tokenizer.length, ARCHITECTURE.num_experts)
    # The record holds what was replayed: the sampler's choices for the first rows, scene-major over (n, k).
    assert trace.experts is not None
    of_rows = trace.experts.transpose(0, 1).flatten(0, 1).view(S, G * K, 2, -1)[:, : rows // S].flatten(0, 1)
    assert torch.equal(record.choices(), of_rows)


def test_memory_kept_for_the_backward_pass_is_bounded(policy: Policy, trace: DecodeTrace) -> None:
    def kept(call: Callable[[], object]) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            call()
        return sum(sizes.values())

    context = policy.encode(scenes(*range(S)))
    estimator = make_likelihood("trace")
    whole = kept(lambda: estimator(policy, context, trace))
    cut = kept(lambda: estimator(policy, context, trace, max_tokens=48))
    assert cut < 0.05 * whole
