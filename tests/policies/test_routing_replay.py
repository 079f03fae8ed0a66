"""Replayed routing: gates stay live, the ratio is 1 at the old weights and continuous away from them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from rlhf_drive.errors import DataError
from rlhf_drive.likelihood.base import tempered_logp
from rlhf_drive.policies import Architecture, DecodeTrace, Decoding, Policy, SceneContext, TrajectoryTokenizer, masked
from rlhf_drive.policies.moe import ROUTINGS, RouterRecord, SparseMoE
from rlhf_drive.policies.transformer import DecoderLayer

ARCHITECTURE = Architecture(
    d_model=32, num_heads=2, encoder_layers=1, decoder_layers=2, num_experts=4, experts_per_token=2, expert_dim=16,
    max_agents=6, max_polylines=8, points_per_polyline=5, dropout=0.0,
)  # fmt: skip
SCENES, GROUP = 2, 3


def make_policy(**sizes: Any) -> Policy:
    torch.manual_seed(0)
    policy = Policy(replace(ARCHITECTURE, **sizes), TrajectoryTokenizer("displacements", -5.0, 15.0, 0.5)).eval()
    with torch.no_grad():
        # A head that listens to the decoder, so that routing shows in the probabilities.
        for parameter in policy.head.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return policy


def make_context(policy: Policy, scenes: int = SCENES) -> SceneContext:
    """Scenes of random tokens."""
    tokens = torch.randn(scenes, 5, policy.architecture.d_model, generator=torch.Generator().manual_seed(1))
    cached = [layer.scene(tokens) for layer in policy.decoder.layers if isinstance(layer, DecoderLayer)]
    anchor = torch.linspace(0.0, 4.0, scenes * policy.tokenizer.length).view(scenes, -1)
    mask = torch.ones(scenes, 1, 1, 5, dtype=torch.bool)
    return SceneContext(tuple(k for k, _ in cached), tuple(v for _, v in cached), mask, tokens[:, 0], anchor)


def sample(policy: Policy, order: str = "random") -> DecodeTrace:
    uniforms = torch.rand(SCENES * GROUP, 2, policy.tokenizer.length, generator=torch.Generator().manual_seed(2))
    return masked.sample(policy, make_context(policy), uniforms, Decoding(4, order, 0.8, 0), keep_experts=True)


def logp(policy: Policy, trace: DecodeTrace, replay: bool) -> Tensor:
    """``[N]`` trace log-probability, state by state."""
    total = torch.zeros(len(trace))
    context = make_context(policy)
    for k in range(len(trace.time)):
        record = RouterRecord(replay=trace.experts[k]) if replay and trace.experts is not None else None
        scored = trace.scored[k]
        logits = policy.action_logits(trace.state[k], trace.time[k].expand(len(trace)), context, scored, record)
        values = tempered_logp(logits, trace.action[k][scored], trace.temperature, trace.top_k)
        total = total + torch.zeros(scored.shape).masked_scatter(scored, values).sum(dim=1)
    return total


def gated(moe: SparseMoE, x: Tensor, chosen: Tensor) -> Tensor:
    """The plain definition with the experts given: all of them on every token, gates a softmax over the chosen ones."""
    logits = x @ moe.router.weight.T
    every = torch.stack([functional.gelu(x @ moe.up[e]) @ moe.down[e] for e in range(len(moe.up))], dim=1)
    allowed = torch.zeros_like(logits, dtype=torch.bool).scatter(1, chosen, True)
    gate = logits.masked_fill(~allowed, -torch.inf).softmax(dim=-1)
    return moe.shared(x) + (gate[..., None] * every).sum(dim=1)


def test_replayed_experts_get_live_gates_with_gradient() -> None:
    torch.manual_seed(0)
    moe, x = SparseMoE(8, 16, experts=5, top_k=2), torch.randn(3, 4, 8, requires_grad=True)
    # Not what the live router would choose: its two last, not its two first.
    chosen = moe.router(x).flatten(0, 1).topk(5, dim=-1).indices[:, 3:].contiguous()
    record = RouterRecord(replay=chosen.view(3, 1, 8).to(torch.int16))
    mixed, plain = moe(x, record), gated(moe, x.flatten(0, 1), chosen).view_as(x)
    assert torch.allclose(mixed, plain, atol=1e-6)
    assert not torch.allclose(mixed, moe(x), atol=1e-2)
    assert torch.equal(record.choices(), record.replay)
    inputs = [x, moe.up, moe.down, moe.router.weight]
    for a, b in zip(
        torch.autograd.grad(mixed.square().sum(), inputs), torch.autograd.grad(plain.square().sum(), inputs),
        strict=True,
    ):  # fmt: skip
        assert torch.allclose(a, b, atol=1e-4)
        assert a.abs().max() > 1e-3


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("order", ["random", "confidence"])
def test_the_samplers_routing_replays_to_the_behaviour_probability(order: str, routing: str) -> None:
    policy = make_policy(routing=routing, capacity_factor=0.25)
    trace = sample(policy, order)
    assert trace.experts is not None
    # 16 tokens of 2 experts, or 4 experts of 4 tokens.
    assert trace.experts.shape == (4, SCENES * GROUP, 2, {"token_choice": 32, "expert_choice": 16}[routing])
    ratio = (logp(policy, trace, replay=True) - trace.logp.sum(dim=(0, 2))).exp()
    assert torch.allclose(ratio, torch.ones(len(trace)), atol=1e-5)


def test_rows_may_be_replayed_in_any_batch() -> None:
    policy = make_policy()
    trace = sample(policy)
    first = trace.rows(torch.arange(GROUP))
    assert first.experts is not None
    assert trace.experts is not None
    state, scored, context = first.state[1], first.scored[1], make_context(policy)
    one_scene = SceneContext(
        tuple(k[:1] for k in context.keys), tuple(v[:1] for v in context.values), context.mask[:1],
        context.summary[:1], context.anchor[:1],
    )  # fmt: skip
    alone = policy.action_logits(
        state, first.time[1].expand(GROUP), one_scene, scored, RouterRecord(replay=first.experts[1])
    )
    among = policy.action_logits(
        trace.state[1],
        trace.time[1].expand(len(trace)),
        context,
        trace.scored[1],
        RouterRecord(replay=trace.experts[1]),
    )
    assert torch.allclose(alone, among[: len(alone)], atol=1e-4)


def moved(policy: Policy, start: list[Tensor], way: list[Tensor], s: float) -> None:
    """Put the routers at ``start + s * way``."""
    with torch.no_grad():
        for layer, weight, step in zip(policy.decoder.layers, start, way, strict=True):
            layer.moe.router.weight.copy_(weight + s * step)


@torch.no_grad()
@pytest.mark.parametrize("routing", ROUTINGS)
def test_where_an_expert_flips_the_free_ratio_jumps_and_the_replayed_one_does_not(routing: str) -> None:
    policy = make_policy(routing=routing)
    for layer in policy.decoder.layers:
        layer.moe.down.mul_(4.0)
    trace = sample(policy)
    start = [layer.moe.router.weight.clone() for layer in policy.decoder.layers]
    way = [torch.randn(w.shape, generator=torch.Generator().manual_seed(3)) for w in start]
    low, high = 0.0, 0.5
    base = logp(policy, trace, replay=False)
    old, context, time = RouterRecord(), make_context(policy), torch.zeros(len(trace))
    policy.action_logits(trace.state[0], time, context, trace.scored[0], old)

    def flips(s: float) -> bool:
        moved(policy, start, way, s)
        record = RouterRecord()
        policy.action_logits(trace.state[0], time, context, trace.scored[0], record)
        return record.flips(old) > 0

    assert flips(high)
    assert not flips(low)
    for _ in range(16):
        middle = (low + high) / 2
        low, high = (low, middle) if flips(middle) else (middle, high)
    jump = {}
    for replay in (False, True):
        sides = []
        for s in (low, high):
            moved(policy, start, way, s)
            sides.append(logp(policy, trace, replay))
        jump[replay] = float((sides[1] - sides[0]).abs().max())
    # The weights on both sides differ by 1e-5 of the way: rounding, and no more, where the experts are replayed.
    assert jump[True] < 1e-3
    assert jump[False] > 20 * jump[True]
    # It is the update, not nothing, that the replayed ratio measures.
    moved(policy, start, way, 0.5)
    assert float((logp(policy, trace, replay=True) - base).abs().max()) > 1e-2


@pytest.mark.parametrize("routing", ROUTINGS)
def test_the_router_learns_under_replay(routing: str) -> None:
    policy = make_policy(routing=routing)
    trace = sample(policy)
    logp(policy, trace, replay=True).sum().backward()
    for layer in policy.decoder.layers:
        assert layer.moe.router.weight.grad.abs().max() > 1e-4


def test_routing_that_does_not_fit_is_refused() -> None:
    moe, x = SparseMoE(8, 16, experts=5, top_k=2), torch.randn(3, 4, 8)
    for shape in ((2, 1, 8), (3, 1, 4), (3, 0, 8)):
        with pytest.raises(DataError, match="cannot be replayed in MoE layer 0 with 3 rows of 8 choices"):
            moe(x, RouterRecord(replay=torch.zeros(shape, dtype=torch.int16)))


def test_a_record_serves_one_pass() -> None:
    moe, x, record = SparseMoE(8, 16, experts=5, top_k=2), torch.randn(3, 4, 8), RouterRecord()
    moe(x, record)
    with pytest.raises(DataError, match="serves one forward pass"):
        moe(x, record)


def test_choices_take_int32_where_int16_is_too_small() -> None:
    logits, chosen = torch.zeros(1, 40_000), torch.tensor([[39_999]])
    assert RouterRecord([logits], [chosen], rows=1).choices().tolist() == [[[39_999]]]


def gradients(policy: Policy, record: RouterRecord | None) -> list[Tensor]:
    """Of a loss that looks at the logits and, with a record, at the routers."""
    state = torch.randint(0, policy.vocab_size + 1, (SCENES * GROUP, 16), generator=torch.Generator().manual_seed(4))
    where = torch.ones_like(state, dtype=torch.bool)
    loss = policy.action_logits(state, torch.zeros(len(state)), make_context(policy), where, record).log_softmax(-1)
    total = loss[:, 3].sum() + (0.0 if record is None else record.balance_loss() + record.z_loss())
    parameters = list(policy.decoder.parameters())
    found = torch.autograd.grad(total, parameters, allow_unused=True)
    return [g for g in found if g is not None]


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("tied", [False, True], ids=["free", "tied"])
@pytest.mark.parametrize("recorded", [False, True], ids=["no record", "record"])
def test_checkpointed_layers_give_the_same_gradients_to_the_last_bit(tied: bool, recorded: bool, routing: str) -> None:
    policy = make_policy(dropout=0.1, routing=routing).train()
    if tied:
        with torch.no_grad():
            for layer in policy.decoder.layers:
                layer.moe.router.weight.zero_()
    results = []
    for policy.decoder.checkpointing in (False, True):
        torch.manual_seed(5)
        record = RouterRecord() if recorded else None
        results.append(gradients(policy, record))
        if record is not None:
            assert (len(record.chosen), len(record.logits)) == (2, 2)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("routing", ROUTINGS)
def test_a_layer_computed_again_keeps_its_experts_though_ties_fall_otherwise(
    monkeypatch: pytest.MonkeyPatch, routing: str
) -> None:
    policy = make_policy(routing=routing)
    with torch.no_grad():
        for layer in policy.decoder.layers:
            layer.moe.router.weight.zero_()
    expected = gradients(policy, None)
    topk, calls = Tensor.topk, 0

    def undecided(self: Tensor, k: int, dim: int = -1) -> Any:
        """Ties broken one way in the forward pass of both layers, the other way afterwards."""
        nonlocal calls
        calls += 1
        if calls <= len(policy.decoder.layers):
            return topk(self, k, dim=dim)
        found = topk(self.flip(dim), k, dim=dim)
        return type(found)((found.values, self.shape[dim] - 1 - found.indices))

    monkeypatch.setattr(Tensor, "topk", undecided)
    policy.decoder.checkpointing = True
    assert all(torch.equal(a, b) for a, b in zip(gradients(policy, None), expected, strict=True))
    assert calls == len(policy.decoder.layers)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_replay_and_checkpointing_go_together(routing: str) -> None:
    policy = make_policy(routing=routing)
    with torch.no_grad():
        trace = sample(policy)
    results = []
    for policy.decoder.checkpointing in (False, True):
        policy.zero_grad()
        logp(policy, trace, replay=True).sum().backward()
        results.append([p.grad.clone() for p in policy.decoder.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_checkpointed_layers_keep_little_for_the_backward_pass() -> None:
    """Bytes that the graph holds, weights too, counted where autograd saves them."""
    policy = make_policy(decoder_layers=4)
    state = torch.full((SCENES * GROUP, 16), policy.vocab_size)
    where, context = torch.ones_like(state, dtype=torch.bool), make_context(policy)
    held = {}
    for policy.decoder.checkpointing in (False, True):
        kept: dict[int, int] = {}

        def keep(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            policy.action_logits(state, torch.zeros(len(state)), context, where)
        held[policy.decoder.checkpointing] = sum(kept.values())
    assert held[True] < 0.4 * held[False]
