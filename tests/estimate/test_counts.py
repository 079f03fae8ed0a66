"""Counts against the real module and torch's own counter of operations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from oracles.tiny_policy import observation
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rlhf_drive.config import Recipe, load_recipe
from rlhf_drive.estimate import count_parameters, network_of, step_of
from rlhf_drive.estimate.counts import decode_flops, decode_visits, encode_flops, head_flops, visits_of
from rlhf_drive.estimate.memory import decoder_saved, encoder_saved
from rlhf_drive.likelihood import make_likelihood
from rlhf_drive.likelihood.passes import RowScores, StateRows
from rlhf_drive.policies import Decoding, Policy
from rlhf_drive.policies.lora import LoraSettings, add_lora
from rlhf_drive.training.build import build_policy
from rlhf_drive.training.routing import freeze_router

PROCESSES = {
    "masked": (),
    "flow": (
        "process={name: flow, beta_scale: 3.0, beta_power: 0.9, distance_scale_m: 4.0}", "rollout.order=all",
        "compare.order=all",
    ),
    "autoregressive": ("process.name=autoregressive", "rollout.steps=16", "compare.steps=16"),
}  # fmt: skip
SIZES = (
    *("policy.max_agents=6", "policy.max_polylines=10", "policy.d_model=32", "policy.num_heads=2"),
    *("policy.decoder_layers=3", "policy.encoder_layers=1", "policy.num_experts=4", "policy.expert_dim=16"),
)
KINDS = [
    *(("masked", routing) for routing in ("token_choice", "expert_choice")),
    *(("flow", routing) for routing in ("token_choice", "expert_choice")),
    ("autoregressive", "token_choice"),
]
SCENES, PER_SCENE = 3, 4


def _recipe(process: str, routing: str, *more: str) -> Recipe:
    return load_recipe("quickstart", [*PROCESSES[process], f"policy.routing={routing}", *SIZES, *more])


def _policy(recipe: Recipe) -> Policy:
    return build_policy(recipe, torch.device("cpu")).eval()


def _observations() -> list[object]:
    """Of scenes with more agents and map pieces than the policy sees, so that it sees the most."""
    return [observation(i, agents=9, lines=40) for i in range(SCENES)]


@pytest.mark.parametrize(("process", "routing"), KINDS)
def test_parameters_are_those_of_the_module(process: str, routing: str) -> None:
    recipe = _recipe(process, routing)
    policy, net = _policy(recipe), network_of(recipe)
    assert count_parameters(net).total == sum(p.numel() for p in policy.parameters())
    freeze_router(policy)
    trained = count_parameters(net, frozen_router=True).trained
    assert trained == sum(p.numel() for p in policy.parameters() if p.requires_grad)


@pytest.mark.parametrize("experts", [True, False])
def test_adapters_are_those_that_peft_makes(experts: bool) -> None:
    pytest.importorskip("peft")
    recipe = _recipe("masked", "token_choice")
    policy = add_lora(_policy(recipe), LoraSettings(4, 8.0, experts))
    found = count_parameters(network_of(recipe), lora_rank=4, lora_experts=experts)
    assert found.trained == found.adapters == sum(p.numel() for p in policy.parameters() if p.requires_grad)
    assert found.total == sum(p.numel() for p in policy.parameters())


@pytest.mark.parametrize(("process", "routing"), KINDS)
@torch.no_grad()
def test_operations_are_those_that_torch_counts(process: str, routing: str) -> None:
    recipe = _recipe(process, routing)
    policy, net = _policy(recipe), network_of(recipe)
    batch = policy.batch(_observations())
    rows = SCENES * PER_SCENE
    state, everywhere = torch.randint(0, 9, (rows, net.length)), torch.ones(rows, net.length, dtype=torch.bool)
    with sdpa_kernel(SDPBackend.MATH):  # the CPU's own attention kernel is not counted
        with FlopCounterMode(display=False) as encoding:
            context = policy.encode(batch)
        with FlopCounterMode(display=False) as decoding:
            features = policy.action_features(state, torch.zeros(rows), context, everywhere)
        with FlopCounterMode(display=False) as reading:
            policy.logits(features)
    assert encoding.get_total_flops() == SCENES * encode_flops(net)
    assert decoding.get_total_flops() == pytest.approx(rows * decode_flops(net, PER_SCENE), rel=1e-12)
    assert reading.get_total_flops() == rows * net.length * head_flops(net)


@torch.no_grad()
def test_decoding_position_by_position_counts_as_one_pass_but_for_attention_to_what_is_to_come() -> None:
    recipe = _recipe("autoregressive", "token_choice")
    policy, net = _policy(recipe), network_of(recipe)
    context, rows = policy.encode(_observations()), SCENES * PER_SCENE
    past: list[list[torch.Tensor]] = [[] for _ in context.keys]
    state = torch.randint(0, 9, (rows, net.length))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        for position in range(net.length):
            policy.decoder.next(state, position, policy.values, context, past, None)
    # Position l attends to l + 1 positions: 4 d sum(l + 1) instead of 4 d L^2. The summary's map is made L times.
    d, n = net.width, net.length
    less = net.decoder_layers * (4 * d * n * n - 4 * d * n * (n + 1) // 2)
    again = (n - 1) * 2 * d * d / PER_SCENE
    deviations = 2 * 5 * d * (n - n // 2)
    expected = rows * (decode_flops(net, PER_SCENE) - less + again + deviations)
    assert counted.get_total_flops() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("process", "routing"), KINDS)
def test_a_backward_pass_takes_twice_as_many(process: str, routing: str) -> None:
    recipe = _recipe(process, routing)
    policy, net = _policy(recipe), network_of(recipe)
    rows = SCENES * PER_SCENE
    state, everywhere = torch.randint(0, 9, (rows, net.length)), torch.ones(rows, net.length, dtype=torch.bool)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        context = policy.encode(policy.batch(_observations()))
        policy.action_logits(state, torch.zeros(rows), context, everywhere).sum().backward()
    forward = SCENES * encode_flops(net) + rows * (decode_flops(net, PER_SCENE) + net.length * head_flops(net))
    # Inputs of the first layers have no gradient, so that a little less than 3 is needed.
    assert 0.94 * 3 * forward < counted.get_total_flops() <= 3 * forward


@pytest.mark.parametrize(("process", "routing"), KINDS)
def test_what_a_pass_keeps_is_what_autograd_saves(process: str, routing: str) -> None:
    recipe = _recipe(process, routing, "policy.d_model=64", "policy.expert_dim=32")
    policy, net = _policy(recipe), network_of(recipe)
    own = {t.untyped_storage().data_ptr() for t in (*policy.parameters(), *policy.buffers())}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    rows = SCENES * 8
    state, everywhere = torch.randint(0, 9, (rows, net.length)), torch.ones(rows, net.length, dtype=torch.bool)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        context = policy.encode(policy.batch(_observations()))
        policy.action_features(state, torch.zeros(rows), context, everywhere)
    expected = SCENES * encoder_saved(net) + rows * decoder_saved(net)
    assert sum(size for size, _ in kept.values()) == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize(
    ("process", "order", "steps"),
    [
        *(("masked", order, 8) for order in ("causal", "random", "confidence")),
        *(("masked", "confidence", 5), ("flow", "all", 4), ("autoregressive", "causal", 16)),
    ],
)
def test_decoding_visits_as_many_states_and_positions_as_it_does(process: str, order: str, steps: int) -> None:
    recipe = _recipe(process, "token_choice", f"rollout.order={order}", f"rollout.steps={steps}")
    policy, net = _policy(recipe), network_of(recipe)
    rows, seen = SCENES * 2, {"states": 0.0, "positions": 0}
    inner_decoder, inner_next, inner_logits = policy.decoder.forward, policy.decoder.next, policy.logits

    def decode(state: torch.Tensor, *args: object) -> torch.Tensor:
        seen["states"] += len(state)
        return inner_decoder(state, *args)

    def step(state: torch.Tensor, *args: object) -> torch.Tensor:
        seen["states"] += len(state) / net.length
        return inner_next(state, *args)

    def read(features: torch.Tensor) -> torch.Tensor:
        seen["positions"] += len(features)
        return inner_logits(features)

    policy.decoder.forward, policy.decoder.next, policy.logits = decode, step, read  # type: ignore[method-assign]
    decoding = Decoding(steps, order, 1.0, 0)
    context = policy.encode(_observations())
    uniforms = torch.rand(rows, *policy.process.uniforms_shape(net.length, decoding))
    trace = policy.process.sample(policy, context, uniforms, decoding)
    expected = decode_visits(net, step_of(recipe))
    assert (seen["states"], seen["positions"]) == (rows * expected.states, rows * expected.positions)
    seen["states"] = seen["positions"] = 0
    with torch.no_grad():
        make_likelihood("trace")(policy, context, trace)
    expected = visits_of(net, step_of(recipe))
    assert (seen["states"], seen["positions"]) == (rows * expected.states, rows * expected.positions)


@pytest.mark.parametrize("name", ["mean_field", "coupled", "elbo", "random_mask"])
def test_surrogates_visit_as_many_states_and_positions_on_average(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = _recipe("masked", "token_choice")
    net, step, rows = network_of(recipe), replace(step_of(recipe), likelihood=name, draws=2), 2000
    seen: dict[str, float] = {}

    def score(policy: object, context: object, given: StateRows, *args: object, **options: object) -> RowScores:
        seen["states"], seen["positions"] = len(given.state) / rows, float(given.scored.sum()) / rows
        return RowScores(torch.zeros(given.scored.shape), None, None)

    monkeypatch.setattr("rlhf_drive.likelihood.probes.score_rows", score)
    policy = _policy(recipe)
    state = torch.full((1, rows, net.length), net.vocabulary)
    scored = torch.ones_like(state, dtype=torch.bool)
    from rlhf_drive.policies import DecodeTrace

    trace = DecodeTrace(
        state=state, action=torch.zeros_like(state), scored=scored, time=torch.zeros(1), logp=torch.zeros(state.shape),
        temperature=1.0, top_k=0, order="random", seed=0, weight_version=0,
    )  # fmt: skip
    likelihood = make_likelihood(name, draws=2)
    shape = likelihood.probe_shape(net.length)
    probes = (
        likelihood.draw(trace, torch.rand(rows, *shape, generator=torch.Generator().manual_seed(0))) if shape else None
    )
    likelihood(policy, None, trace, probes)
    expected = visits_of(net, step)
    assert seen["states"] == expected.states
    assert seen["positions"] == pytest.approx(expected.positions, rel=0.05)
