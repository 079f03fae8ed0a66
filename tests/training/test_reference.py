"""Reference policies: they stay where the run started, or follow by TRL's formula."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from oracles.tiny_policy import ARCHITECTURE, observation
from torch import Tensor

from rlhf_drive.errors import CheckpointError, ConfigError
from rlhf_drive.policies import LoraSettings, Policy, TrajectoryTokenizer, add_lora
from rlhf_drive.policies.adapters import adapter_state
from rlhf_drive.training.ema import EmaWeights
from rlhf_drive.training.reference import AdapterReference, FrozenReference, ReferencePolicy, sync_due

TOKENIZER = TrajectoryTokenizer("displacements", -5.0, 15.0, 0.5)
STATE = torch.full((1, 16), TOKENIZER.vocab_size)


def make(seed: int = 0) -> Policy:
    torch.manual_seed(seed)
    return Policy(ARCHITECTURE, TOKENIZER)


def weights(policy: Policy) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in policy.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@torch.no_grad()
def logits(policy: Policy) -> Tensor:
    context = policy.encode([observation(0)])
    return policy.action_logits(STATE, torch.zeros(1), context, torch.ones_like(STATE, dtype=torch.bool))


def learn(policy: Policy, steps: int = 2) -> None:
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        context = policy.encode([observation(0)])
        found = policy.action_logits(STATE, torch.zeros(1), context, torch.ones_like(STATE, dtype=torch.bool))
        found.log_softmax(-1)[:, 3].sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def test_frozen_reference_is_the_policy_as_it_was() -> None:
    policy = make().train()
    logits(policy)
    policy.head.free.weight.grad = torch.ones_like(policy.head.free.weight)
    reference: ReferencePolicy = FrozenReference(policy)
    start, before = weights(policy), logits(policy.eval())
    policy.zero_grad(set_to_none=True)
    learn(policy)
    with reference.using() as frozen:
        assert frozen is not policy
        assert not frozen.training
        assert not any(p.requires_grad or p.grad is not None for p in frozen.parameters())
        assert equal(weights(frozen), start)
        assert torch.equal(logits(frozen), before)
    assert not torch.equal(logits(policy), before)
    assert any(p.requires_grad for p in policy.parameters())
    assert reference.state_dict() == {}


@pytest.mark.parametrize("alpha", [0.0, 0.01, 0.6, 1.0])
def test_sync_is_trls(alpha: float) -> None:
    callbacks = pytest.importorskip("trl.trainer.callbacks")
    policy, ours = make(0), make(1)
    theirs = copy.deepcopy(ours)
    reference = FrozenReference(ours)
    for seed in (2, 3):
        live = make(seed)
        reference.sync(live, alpha)
        callbacks.SyncRefModelCallback._sync_target_model(live, theirs, alpha)
    with reference.using() as frozen:
        for (name, value), expected in zip(frozen.named_parameters(), theirs.parameters(), strict=True):
            # 1.2e-7 is the distance of two neighbours at 1
            torch.testing.assert_close(value, expected, atol=1e-7, rtol=1.2e-7, msg=lambda m, n=name: f"{n}: {m}")
        assert not any(p.requires_grad for p in frozen.parameters())
    assert not equal(weights(policy), weights(theirs))


def test_sync_takes_the_policy_itself_and_keeps_what_is_alike_to_the_bit() -> None:
    policy = make(0)
    reference = FrozenReference(policy)
    for _ in range(20):
        reference.sync(policy, 0.6)
    with reference.using() as frozen:
        assert equal(weights(frozen), weights(policy))
    other = make(1)
    reference.sync(other, 1.0)
    with reference.using() as frozen:
        assert equal(weights(frozen), weights(other))
        learn(other)
        assert not equal(weights(frozen), weights(other))  # a copy, not the same memory


@pytest.mark.parametrize("sync_steps", [1, 3, 512])
def test_sync_is_due_when_trl_does_it(sync_steps: int) -> None:
    callbacks = pytest.importorskip("trl.trainer.callbacks")
    synced: list[int] = []

    class Callback(callbacks.SyncRefModelCallback):  # type: ignore[misc, name-defined]
        """Notes the steps after which it moves the reference."""

        @staticmethod
        def sync_target_model(model: int, target_model: object, alpha: float) -> None:
            """Instead of moving weights."""
            synced.append(model)

    callback = Callback(ref_model=object(), accelerator=None)
    args = SimpleNamespace(ref_model_sync_steps=sync_steps, ref_model_mixup_alpha=0.5)
    for done in range(1, 1200):  # global_step counts the steps done, this one included
        callback.on_step_end(args, SimpleNamespace(global_step=done), None, model=done)
    assert [done for done in range(1, 1200) if sync_due(done, sync_steps)] == synced
    with pytest.raises(ConfigError, match=r"rl\.ref_model_sync_steps = 0"):
        sync_due(5, 0)


def test_a_reference_that_moved_is_resumed_to_the_bit() -> None:
    start, live = make(0), make(1)
    reference = FrozenReference(start)
    reference.sync(live, 0.6)
    kept = {name: value.clone() for name, value in reference.state_dict().items()}
    resumed = FrozenReference(start)
    resumed.load_state_dict(kept)
    for one in (reference, resumed):
        one.sync(make(2), 0.4)
    assert equal(reference.state_dict(), resumed.state_dict())
    fresh = FrozenReference(start)
    fresh.load_state_dict({})
    assert fresh.state_dict() == {}
    with fresh.using() as frozen:
        assert equal(weights(frozen), weights(start))
    with pytest.raises(CheckpointError, match=r"reference policy of the checkpoint does not fit: .*head.table"):
        fresh.load_state_dict({n: v for n, v in kept.items() if n != "head.table"})


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_a_share_out_of_range_is_refused(alpha: float) -> None:
    with pytest.raises(ConfigError, match=r"rl\.ref_model_mixup_alpha = "):
        FrozenReference(make()).sync(make(), alpha)


def test_adapter_reference_is_the_start_policy_for_free() -> None:
    pytest.importorskip("peft")
    policy = make().eval()
    before = logits(policy)
    add_lora(policy, LoraSettings(rank=2, alpha=4.0, experts=True))
    reference: ReferencePolicy = AdapterReference(policy)
    learn(policy)
    after = logits(policy)
    assert not torch.equal(after, before)
    for _ in range(2):
        with reference.using() as frozen:
            assert frozen is policy
            assert torch.equal(logits(frozen), before)
        assert torch.equal(logits(policy), after)
    with pytest.raises(ConfigError, match=r"rl.sync_ref_model .* rl.lora_rank to 0"):
        reference.sync(policy, 0.5)
    assert torch.equal(logits(policy), after)
    assert reference.state_dict() == {}
    reference.load_state_dict({})
    with pytest.raises(CheckpointError, match="adapters are trained here"):
        reference.load_state_dict({"head.table": torch.zeros(1)})


def test_only_adapters_are_averaged_where_only_they_are_trained() -> None:
    pytest.importorskip("peft")
    policy = add_lora(make().eval(), LoraSettings(rank=2, alpha=4.0, experts=True))
    ema = EmaWeights(policy, 0.5)
    before = logits(policy)
    learn(policy)
    after = logits(policy)
    with ema.applied(policy):
        assert torch.equal(logits(policy), before)
        with AdapterReference(policy).using() as frozen:
            assert torch.equal(logits(frozen), before)
    assert torch.equal(logits(policy), after)
    sizes = sum(value.numel() for name, value in ema.state_dict().items() if name != "updates")
    assert sizes == sum(value.numel() for value in adapter_state(policy).values())
