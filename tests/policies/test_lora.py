"""LoRA adapters: what they change and what they leave alone, by hand-computed weights and by the base policy's bits."""

from __future__ import annotations

import copy
import pickle
import sys
from dataclasses import replace

import pytest
import torch
from oracles.adapted_policy import BASE, BATCH, SETTINGS, STATE, TOKENIZER, adapted, logits, make, move, same_bits
from oracles.tiny_policy import ARCHITECTURE
from torch import Tensor

from rlhf_drive.errors import ConfigError
from rlhf_drive.likelihood.trace import trace_logp
from rlhf_drive.policies import Decoding, LoraSettings, add_lora, disable_adapter, masked, merged
from rlhf_drive.policies.adapters import adapter_state, base_state
from rlhf_drive.policies.lora import lora_settings
from rlhf_drive.policies.moe import RouterRecord, SparseMoE


@pytest.mark.parametrize("experts", [False, True])
def test_all_attention_and_experts_have_adapters_and_nothing_else_learns(experts: bool) -> None:
    policy = add_lora(copy.deepcopy(BASE), replace(SETTINGS, experts=experts))
    layers = [f"decoder.layers.{i}" for i in range(2)]
    expected = {f"{at}.attention.{w}.weight" for at in ("encoder.layers.0", *layers) for w in ("qkv", "out")}
    expected |= {f"{at}.{w}.weight" for at in layers for w in ("query", "key_value", "out")}
    if experts:
        expected |= {f"{at}.moe.{w}" for at in layers for w in ("up", "down")}
    factors = {f"{weight}.{factor}" for weight in expected for factor in ("lora_A", "lora_B")}
    assert set(adapter_state(policy)) == factors
    assert lora_settings(policy) == replace(SETTINGS, experts=experts)
    learning = [p for p in policy.parameters() if p.requires_grad]
    assert {id(p) for p in learning} == {id(p) for p in adapter_state(policy).values()}
    torch.autograd.backward(logits(policy).square().mean())
    # B is zero, so that at first only B has a gradient that is not.
    for name, factor in adapter_state(policy).items():
        assert factor.grad is not None, name
        assert bool(factor.grad.abs().max() > 0) == name.endswith("lora_B"), name
    assert all(p.grad is None for p in policy.parameters() if not p.requires_grad)


def test_an_update_moves_every_adapter_and_no_base_weight() -> None:
    policy = adapted()
    before = {name: factor.clone() for name, factor in adapter_state(policy).items()}
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-2)
    torch.autograd.backward(logits(policy).square().mean())
    optimizer.step()
    assert same_bits(base_state(policy), dict(BASE.state_dict()))
    assert [name for name, factor in adapter_state(policy).items() if torch.equal(factor, before[name])] == []


def test_fresh_adapters_change_no_bit() -> None:
    policy = add_lora(copy.deepcopy(BASE), SETTINGS)
    assert torch.equal(logits(policy), logits(BASE))
    assert (policy.describe(), policy.device, policy.training) == (BASE.describe(), BASE.device, False)


def test_the_seed_alone_draws_the_adapters() -> None:
    before = torch.get_rng_state()
    first, again, other = (adapter_state(add_lora(copy.deepcopy(BASE), SETTINGS, seed=s)) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert same_bits(first, again)
    name = "decoder.layers.0.moe.up.lora_A"
    assert not torch.equal(first[name], other[name])
    # Uniform within 1 / sqrt(in), in = 32: the deviation is that over sqrt(3).
    assert float(first[name].detach().abs().max()) <= 32**-0.5
    assert float(first[name].detach().std()) == pytest.approx((32 * 3) ** -0.5, rel=0.1)


def test_attention_weights_change_by_alpha_over_rank_times_b_a() -> None:
    policy = adapted(replace(SETTINGS, experts=False))
    plain, factors = copy.deepcopy(BASE), adapter_state(policy)
    with torch.no_grad():
        for name in {name.rpartition(".")[0] for name in factors}:
            plain.get_parameter(name).add_(6.0 / 4 * factors[f"{name}.lora_B"] @ factors[f"{name}.lora_A"])
    assert (logits(policy) - logits(BASE)).abs().max() > 0.1
    assert torch.allclose(logits(policy), logits(plain), atol=1e-4, rtol=1e-5)


def test_each_experts_weights_change_by_alpha_over_rank_times_its_own_b_a() -> None:
    policy = adapted()
    x = torch.randn(40, 32, generator=torch.Generator().manual_seed(1))
    plain, factors = copy.deepcopy(BASE.decoder.layers[1].moe), adapter_state(policy)
    assert isinstance(plain, SparseMoE)
    with torch.no_grad():
        for name, weight in (("up", plain.up), ("down", plain.down)):
            a, b = (factors[f"decoder.layers.1.moe.{name}.{factor}"] for factor in ("lora_A", "lora_B"))
            for e in range(4):
                # Rows 4e … 4e+3 of A, and every fourth column of B from e on: x @ W[e] gains (x @ A^T) @ B^T.
                weight[e] += 6.0 / 4 * (b[:, e::4] @ a[4 * e : 4 * e + 4]).T
    record, plain_record = RouterRecord(), RouterRecord()
    moe = policy.decoder.layers[1].moe
    moe.get_base_layer().layer = plain.layer = 0
    output = moe(x, record)
    assert torch.equal(record.chosen[0], (plain(x, plain_record), plain_record.chosen[0])[1])
    assert len(record.chosen[0].unique()) == 4
    assert torch.allclose(output, plain(x), atol=1e-5)
    assert (output - BASE.decoder.layers[1].moe(x)).abs().max() > 0.1


def test_an_experts_adapter_reaches_the_tokens_routed_to_it_alone() -> None:
    policy = adapted()
    moe = policy.decoder.layers[0].moe
    x, record = torch.randn(40, 32, generator=torch.Generator().manual_seed(1)), RouterRecord()
    before = moe(x, record)
    with torch.no_grad():
        adapter_state(policy)["decoder.layers.0.moe.up.lora_A"][8:12] *= 2.0  # rank 4: the factors of expert 2
    changed = (moe(x) - before).abs().amax(dim=1) > 1e-6
    routed = (record.chosen[0] == 2).any(dim=1)
    assert torch.equal(changed, routed)
    assert 0 < int(routed.sum()) < 40


def test_switched_off_adapters_leave_the_base_to_the_bit() -> None:
    policy = adapted()
    moved = logits(policy)
    next(iter(adapter_state(policy).values())).requires_grad_(False)  # a caller's choice, to be kept
    learning = [p.requires_grad for p in policy.parameters()]
    with disable_adapter(policy) as reference:
        assert reference is policy
        assert torch.equal(logits(reference), logits(BASE))
        with disable_adapter(policy):
            pass
        assert torch.equal(logits(policy), logits(BASE))
    assert torch.equal(logits(policy), moved)
    assert [p.requires_grad for p in policy.parameters()] == learning
    with pytest.raises(ZeroDivisionError), disable_adapter(policy):
        raise ZeroDivisionError
    assert torch.equal(logits(policy), moved)


def test_the_reference_without_adapters_equals_a_frozen_copy_of_the_base() -> None:
    frozen, policy = copy.deepcopy(BASE).requires_grad_(False), adapted()
    uniforms = torch.rand(6, 2, 16, generator=torch.Generator().manual_seed(0))
    trace = masked.sample(policy, policy.encode(BATCH), uniforms, Decoding(4, "random", 1.0, 0))
    live, mask = trace_logp(policy, policy.encode(BATCH), trace)
    with torch.no_grad(), disable_adapter(policy) as reference:
        free, _ = trace_logp(reference, reference.encode(BATCH), trace)
    expected, _ = trace_logp(frozen, frozen.encode(BATCH), trace)
    assert torch.equal(free, expected)
    assert (live - free)[mask].abs().max() > 1e-3
    assert live.requires_grad
    assert not free.requires_grad


@pytest.mark.parametrize("experts", [False, True])
def test_merged_equals_unmerged(experts: bool) -> None:
    policy = adapted(replace(SETTINGS, experts=experts))
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    plain = merged(policy)
    assert type(plain.decoder.layers[0].moe) is type(BASE.decoder.layers[0].moe)
    assert list(plain.state_dict()) == list(BASE.state_dict())
    assert lora_settings(plain) is None
    assert all(p.requires_grad for p in plain.parameters())
    moved, expected = logits(plain).log_softmax(-1).exp(), logits(policy).log_softmax(-1).exp()
    assert torch.allclose(moved, expected, atol=1e-5)
    assert (expected - logits(BASE).softmax(-1)).abs().max() > 1e-2
    assert same_bits(dict(policy.state_dict()), before)
    assert plain.trained_on == policy.trained_on
    assert torch.equal(logits(merged(plain)), logits(plain))


@pytest.mark.parametrize(
    ("process", "routing"),
    [("masked", "expert_choice"), ("flow", "token_choice"), ("autoregressive", "token_choice")],
)
def test_adapters_fit_every_process_and_routing(process: str, routing: str) -> None:
    base = make(architecture=replace(ARCHITECTURE, routing=routing), process=process)
    policy = move(add_lora(copy.deepcopy(base), SETTINGS))
    assert (logits(policy) - logits(base)).abs().max() > 0.1
    with disable_adapter(policy):
        assert torch.equal(logits(policy), logits(base))
    assert torch.allclose(logits(merged(policy)).softmax(-1), logits(policy).softmax(-1), atol=1e-5)
    if process == "autoregressive":  # its cached path, token by token, goes through the same adapters
        following = policy.continuation(policy.encode(BATCH))
        state = STATE.clamp(max=TOKENIZER.vocab_size - 1)
        everywhere = torch.ones_like(state, dtype=torch.bool)
        whole = policy.action_logits(state, torch.zeros(6), policy.encode(BATCH), everywhere).view(6, 16, -1)
        for position in range(16):
            assert torch.allclose(following(state, position, None), whole[:, position], atol=1e-3)


def test_copies_and_pickles_keep_the_adapters() -> None:
    policy = adapted()
    for other in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
        assert torch.equal(logits(other), logits(policy))
        assert lora_settings(other) == SETTINGS
        with torch.no_grad():
            adapter_state(other)["decoder.layers.0.query.weight.lora_B"].zero_()
        assert not torch.equal(logits(other), logits(policy))
    fresh = add_lora(copy.deepcopy(BASE), SETTINGS)
    fresh.load_state_dict(policy.state_dict())
    assert torch.equal(logits(fresh), logits(policy))


def test_routing_is_noted_and_replayed_through_adapters() -> None:
    policy = adapted()
    live = RouterRecord()
    expected = logits(policy, live)
    with disable_adapter(policy):
        base = RouterRecord()
        logits(policy, base)
    assert live.flips(base) > 0  # the adapters move the routing
    assert torch.equal(logits(policy, RouterRecord(replay=live.choices())), expected)
    replayed = RouterRecord(replay=base.choices())
    assert not torch.equal(logits(policy, replayed), expected)
    assert torch.equal(replayed.choices(), base.choices())


def test_layers_computed_again_give_the_same_gradients() -> None:
    policy = adapted()
    gradients: list[dict[str, Tensor | None]] = []
    for again in (False, True):
        policy.decoder.checkpointing = again
        policy.zero_grad(set_to_none=True)
        torch.autograd.backward(logits(policy).square().mean())
        gradients.append({name: factor.grad for name, factor in adapter_state(policy).items()})
    for name, plain in gradients[0].items():
        other = gradients[1][name]
        assert plain is not None, name
        assert other is not None, name
        assert torch.equal(plain, other), name
    assert all(p.grad is None for p in policy.parameters() if not p.requires_grad)


def test_adapters_of_a_bfloat16_policy_are_float32() -> None:
    policy = add_lora(copy.deepcopy(BASE).to(torch.bfloat16), SETTINGS)
    assert {factor.dtype for factor in adapter_state(policy).values()} == {torch.float32}
    x = torch.randn(20, 32).bfloat16()
    moe = policy.decoder.layers[0].moe
    assert moe(x, RouterRecord()).dtype == torch.bfloat16
    assert policy.decoder.layers[0].attention.qkv(x).dtype == torch.bfloat16


def test_unusable_requests_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for settings, message in (({"rank": 0}, "LoRA rank is 0"), ({"alpha": 0.0}, "alpha is 0"),
                              ({"alpha": float("nan")}, "alpha is nan")):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            replace(SETTINGS, **settings)
    # expert_dim 16 is the shortest side with experts, d_model 32 without.
    with pytest.raises(ConfigError, match="rank 17 exceeds 16"):
        add_lora(copy.deepcopy(BASE), replace(SETTINGS, rank=17))
    assert lora_settings(add_lora(copy.deepcopy(BASE), LoraSettings(17, 1.0, False))) == LoraSettings(17, 1.0, False)
    with pytest.raises(ConfigError, match="has LoRA adapters already"):
        add_lora(adapted(), SETTINGS)
    with pytest.raises(ConfigError, match="no adapters to switch off"), disable_adapter(copy.deepcopy(BASE)):
        pass
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r'pip install "rlhf-drive\[lora\]"'):
        add_lora(copy.deepcopy(BASE), SETTINGS)
