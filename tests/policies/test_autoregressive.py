"""Autoregressive decoding: what the causal network sees, how it is sampled, and what it is trained on."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from oracles.tabular import CausalTable, all_outcomes
from oracles.tiny_policy import ARCHITECTURE, observation

from rlhf_drive.errors import ConfigError
from rlhf_drive.policies import Architecture, DecodeTrace, Decoding, Policy, TrajectoryTokenizer
from rlhf_drive.policies.autoregressive import CachedDenoiser, sample, sft_loss
from rlhf_drive.policies.masked import draw
from rlhf_drive.policies.moe import RouterRecord
from rlhf_drive.policies.transformer import SceneContext

L = 16
SCENES = [observation(0), observation(1, agents=2, lines=9), observation(2, agents=0)]
ALL_EXPERTS = replace(ARCHITECTURE, experts_per_token=ARCHITECTURE.num_experts)
"""Every expert sees every token, so that no product changes its size, and its rounding, with the routing."""


def build(
    encoding: str = "displacements", architecture: Architecture = ARCHITECTURE, process: str = "autoregressive"
) -> Policy:
    """A policy whose weights have all moved away from their start, so that nothing is hidden by a zero."""
    torch.manual_seed(3)
    policy = Policy(architecture, TrajectoryTokenizer(encoding, -5.0, 20.0, 0.1), process)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return policy.eval()


@pytest.fixture(scope="module")
def policy() -> Policy:
    return build()


@pytest.fixture(scope="module")
def context(policy: Policy) -> SceneContext:
    with torch.no_grad():
        return policy.encode(SCENES)


def uniforms(rows: int, length: int = L, seed: int = 0) -> torch.Tensor:
    return torch.rand(rows, 1, length, generator=torch.Generator().manual_seed(seed))


def decode(policy: Policy, context: SceneContext, rows: int, **options: float) -> DecodeTrace:
    decoding = Decoding(L, "causal", options.get("temperature", 1.0), int(options.get("top_k", 0)))
    return policy.process.sample(policy, context, uniforms(rows), decoding, keep_experts=True)


def whole_logits(policy: Policy, context: SceneContext, state: torch.Tensor, **options: Any) -> torch.Tensor:
    """``[N, L, V]`` of one forward over whole states."""
    everywhere = torch.ones_like(state, dtype=torch.bool)
    logits = policy.action_logits(state, torch.zeros(len(state)), context, everywhere, **options)
    return logits.view(*state.shape, -1)


@pytest.mark.parametrize("encoding", ["displacements", "waypoints"])
@torch.no_grad()
def test_logits_do_not_depend_on_their_own_or_later_tokens(encoding: str) -> None:
    policy = build(encoding, ALL_EXPERTS)
    context = policy.encode(SCENES[:1])
    generator = torch.Generator().manual_seed(1)
    plan = torch.randint(0, policy.vocab_size, (1, L), generator=generator)
    reference = whole_logits(policy, context, plan)
    for position in range(L):
        other = torch.randint(0, policy.vocab_size, (1, L), generator=generator)
        other[0, position:] = (plan[0, position:] + 1 + other[0, position:] % (policy.vocab_size - 1)) % 251
        for suffix in (other[:, position:], torch.full((1, L - position), policy.vocab_size)):
            changed = torch.cat([plan[:, :position], suffix], dim=1)
            assert bool((changed[:, position:] != plan[:, position:]).all())
            logits = whole_logits(policy, context, changed)
            assert torch.equal(logits[:, : position + 1], reference[:, : position + 1])
            if position + 1 < L:
                assert (logits[:, position + 1 :] - reference[:, position + 1 :]).abs().amax(dim=(0, 2)).min() > 1e-5


@torch.no_grad()
def test_every_earlier_token_reaches_the_logits(policy: Policy, context: SceneContext) -> None:
    plan = torch.full((3, L), 90)
    reference = whole_logits(policy, context, plan)
    for position in range(L - 1):
        changed = plan.clone()
        changed[:, position] = 60
        assert (whole_logits(policy, context, changed) - reference)[:, -1].abs().max() > 1e-5


def test_masked_and_autoregressive_policies_draw_the_same_weights() -> None:
    masked, causal = build(process="masked").state_dict(), build().state_dict()
    assert list(masked) == list(causal)
    assert all(torch.equal(masked[name], causal[name]) for name in masked)


@pytest.mark.parametrize("encoding", ["displacements", "waypoints"])
@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (0.7, 5), (0.0, 0)])
@torch.no_grad()
def test_cached_sampler_is_the_plain_loop(encoding: str, temperature: float, top_k: int) -> None:
    policy = build(encoding)
    context = policy.encode(SCENES)
    trace = decode(policy, context, 6, temperature=temperature, top_k=top_k)
    numbers = uniforms(6)
    for row in range(0, 6, 2 if top_k else 1):
        own = policy.encode([SCENES[row // 2]])
        plan = torch.full((1, L), policy.vocab_size)
        for position in range(L):
            assert torch.equal(trace.state[position, row], plan[0])
            # The row by itself, its whole state in one forward.
            logits = whole_logits(policy, own, plan)[:, position]
            token, logp = draw(logits, numbers[row : row + 1, 0, position], temperature, top_k)
            plan[0, position] = token
            assert trace.logp[position, row, position].item() == pytest.approx(logp.item(), abs=1e-5)
        assert trace.tokens[row].tolist() == plan[0].tolist()


@torch.no_grad()
def test_trace_scores_one_position_a_step(policy: Policy, context: SceneContext) -> None:
    trace = decode(policy, context, 3)
    assert trace.prefix
    assert torch.equal(trace.scored, torch.eye(L).bool()[:, None].expand(-1, 3, -1))
    assert bool((trace.logp[~trace.scored] == 0).all())
    assert trace.time.tolist() == [k / L for k in range(L)]
    assert (trace.state == policy.vocab_size).sum(dim=2)[:, 0].tolist() == list(range(L, 0, -1))


@torch.no_grad()
def test_batch_mates_change_nothing(policy: Policy, context: SceneContext) -> None:
    together = decode(policy, context, 12)
    decoding = Decoding(L, "causal", 1.0, 0)
    for s, scene in enumerate(SCENES):
        rows = torch.arange(4 * s, 4 * s + 4)[[2, 0]]
        alone = sample(policy, policy.encode([scene]), uniforms(12)[rows], decoding)
        assert torch.equal(alone.tokens, together.tokens[rows])
        torch.testing.assert_close(alone.logp, together.rows(rows).logp, rtol=0, atol=1e-5)


@torch.no_grad()
def test_routing_of_the_sampler_is_that_of_the_finished_plan(policy: Policy, context: SceneContext) -> None:
    trace = decode(policy, context, 6)
    record = RouterRecord()
    whole_logits(policy, context, trace.tokens, record=record)
    assert trace.experts is not None
    assert torch.equal(trace.experts[0], record.choices())
    assert len(trace.experts[0].unique()) == ARCHITECTURE.num_experts
    # A network without memory is asked for whole states; the last one holds all positions' routing.
    plain = Forgetful(policy)
    assert not isinstance(plain, CachedDenoiser)
    again = sample(plain, context, uniforms(6), Decoding(L, "causal", 1.0, 0), keep_experts=True)
    assert again.experts is not None
    assert torch.equal(again.experts, trace.experts)
    assert torch.equal(again.tokens, trace.tokens)
    assert again.rows(torch.tensor([4, 1])).experts is not None
    assert torch.equal(again.rows(torch.tensor([4, 1])).experts, trace.experts[:, [4, 1]])


class Forgetful:
    """The policy without `continuation`."""

    def __init__(self, policy: Policy) -> None:
        self.vocab_size, self.action_logits = policy.vocab_size, policy.action_logits


def test_sampler_frequencies_are_the_enumerated_probabilities() -> None:
    denoiser = CausalTable(num_scenes=1, length=2, vocab_size=3, seed=4)
    side = 200
    line = (torch.arange(side) + 0.5) / side
    grid = torch.cartesian_prod(line, line)[:, None]
    trace = sample(denoiser, torch.tensor([0]), grid, Decoding(2, "causal", 0.8, 2))
    counts = torch.bincount(trace.tokens[:, 0] * 3 + trace.tokens[:, 1], minlength=9)
    expected = [denoiser.probability(0, plan, 0.8, 2) for plan in all_outcomes(2, 3).tolist()]
    # Each conditional probability is off by at most half a grid line at either end.
    assert (counts / side**2).tolist() == pytest.approx(expected, abs=2 / side)
    assert sum(expected) == pytest.approx(1.0, abs=1e-12)


def test_probabilities_of_all_plans_of_a_network_sum_to_one() -> None:
    torch.manual_seed(0)
    tiny = Policy(ARCHITECTURE, TrajectoryTokenizer("displacements", 0.0, 4.0, 2.0, num_poses=2), "autoregressive")
    with torch.no_grad():
        for parameter in tiny.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        plans = all_outcomes(4, 3)
        loss = tiny.eval().process.sft_loss(tiny, plans, tiny.encode(SCENES[:1]), "causal", torch.Generator())
    probability = (-4 * loss).double().exp()
    assert probability.sum().item() == pytest.approx(1.0, abs=1e-5)
    assert probability.max() > 2 / 81


def test_sft_loss_is_the_mean_surprise_of_the_plans_tokens() -> None:
    denoiser = CausalTable(num_scenes=2, length=3, vocab_size=3, seed=0)
    plans = all_outcomes(3, 3).repeat(2, 1)
    loss = sft_loss(denoiser, plans, torch.tensor([0, 1]), "random", torch.Generator())
    expected = [-math.log(denoiser.probability(n // 27, plan)) / 3 for n, plan in enumerate(plans.tolist())]
    assert loss.tolist() == pytest.approx(expected, abs=1e-12)
    assert denoiser.calls == [(54, 3 * 54)]


@torch.no_grad()
def test_sft_loss_is_that_of_the_trace_that_draws_the_plan(policy: Policy, context: SceneContext) -> None:
    trace = decode(policy, context, 6)
    loss = policy.process.sft_loss(policy, trace.tokens, context, "causal", torch.Generator())
    torch.testing.assert_close(loss, -trace.logp.sum(dim=(0, 2)) / L, rtol=0, atol=1e-5)


def test_training_learns_y_from_the_x_before_it() -> None:
    torch.manual_seed(0)
    policy = Policy(ARCHITECTURE, TrajectoryTokenizer("displacements", -1.0, 1.0, 0.5, num_poses=2), "autoregressive")
    generator = torch.Generator().manual_seed(0)
    forward = torch.randint(0, 5, (100, 2, 1), generator=generator)
    plans = torch.cat([forward, 4 - forward], dim=2).flatten(1)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=2e-2)
    with torch.no_grad():
        context = policy.encode(SCENES[:1])
    losses = []
    for _ in range(40):
        loss = policy.process.sft_loss(policy, plans, context, "causal", generator).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # Without the x before it y has log 5 nats, as x has; with it none, so that half of log 5 is left on average.
    assert losses[0] > 0.9 * math.log(5)
    assert losses[-1] < 0.55 * math.log(5)


@pytest.mark.parametrize(("steps", "order"), [(8, "causal"), (L, "random"), (L, "all"), (1, "confidence")])
def test_other_schedules_are_refused_with_what_to_set(policy: Policy, steps: int, order: str) -> None:
    with pytest.raises(ConfigError, match=f"got {steps} steps in order '{order}'.*steps to 16 and order to causal"):
        policy.process.check(L, Decoding(steps, order, 1.0, 0))
    policy.process.check(L, Decoding(L, "causal", 1.0, 0))
    assert policy.process.uniforms_shape(L, Decoding(L, "causal", 1.0, 0)) == (1, L)


def test_layers_computed_again_in_the_backward_pass_stay_causal(policy: Policy) -> None:
    gradients = []
    for again in (False, True):
        policy.decoder.checkpointing = again
        plans = torch.randint(0, 90, (3, L), generator=torch.Generator().manual_seed(0))
        loss = policy.process.sft_loss(policy, plans, policy.encode(SCENES), "causal", torch.Generator()).mean()
        gradients.append(torch.autograd.grad(loss, [policy.decoder.position, policy.decoder.table.weight]))
    policy.decoder.checkpointing = False
    for kept, repeated in zip(*gradients, strict=True):
        assert kept.abs().max() > 1e-3
        torch.testing.assert_close(repeated, kept, rtol=0, atol=1e-7)
