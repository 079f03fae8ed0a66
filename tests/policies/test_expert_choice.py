"""Expert-choice routing: capacity, gates, isolation of rows, dropped tokens, replay."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from rlhf_drive.errors import ConfigError, DataError, UnknownNameError
from rlhf_drive.policies import Architecture, Policy, TrajectoryTokenizer, load_policy, save_policy
from rlhf_drive.policies.expert_choice import capacity, choose
from rlhf_drive.policies.moe import RouterRecord, SparseMoE

ARCHITECTURE = Architecture(
    d_model=16, num_heads=2, encoder_layers=1, decoder_layers=1, num_experts=4, experts_per_token=2, expert_dim=8,
    max_agents=4, max_polylines=4, points_per_polyline=5, dropout=0.0,
)  # fmt: skip
TOKENIZER = TrajectoryTokenizer("displacements", -5.0, 15.0, 0.5)


@pytest.fixture
def moe() -> SparseMoE:
    torch.manual_seed(0)
    return SparseMoE(8, 16, experts=5, top_k=2, routing="expert_choice", capacity_factor=0.25)


def dense(moe: SparseMoE, x: Tensor, chosen: Tensor | None = None) -> Tensor:
    """Row by row and expert by expert: softmax over experts, each takes its c best tokens, nothing renormalised."""
    out = moe.shared(x)
    for row in range(len(x)):
        share = (x[row] @ moe.router.weight.T).softmax(dim=-1)
        c = max(1, round(moe.capacity_factor * x.shape[1]))
        for e in range(len(moe.up)):
            best = share[:, e].argsort(descending=True)[:c] if chosen is None else chosen[row, e]
            taken = torch.zeros(x.shape[1], 1).index_fill(0, best, 1.0)
            expert = functional.gelu(x[row] @ moe.up[e]) @ moe.down[e]
            here = torch.zeros(len(x), 1, 1).index_fill(0, torch.tensor([row]), 1.0)
            out = out + here * (taken * share[:, e, None] * expert)
    return out


def assert_same_gradients(a: Tensor, b: Tensor, inputs: list[Tensor]) -> None:
    left = torch.autograd.grad(a.square().sum(), inputs)
    right = torch.autograd.grad(b.square().sum(), inputs)
    assert all(torch.allclose(x, y, atol=1e-4) for x, y in zip(left, right, strict=True))


@pytest.mark.parametrize(("length", "factor", "expected"), [(16, 0.25, 4), (32, 0.1, 3), (4, 0.01, 1), (5, 1.0, 5)])
def test_capacity_is_a_share_of_the_row(length: int, factor: float, expected: int) -> None:
    assert capacity(length, factor) == expected


def test_it_equals_the_dense_definition(moe: SparseMoE) -> None:
    x = torch.randn(3, 12, 8, requires_grad=True)
    sparse, plain = moe(x), dense(moe, x)
    assert torch.allclose(sparse, plain, atol=1e-6)
    assert_same_gradients(sparse, plain, [x, moe.up, moe.down, moe.router.weight])


def test_experts_rank_tokens_by_their_share_and_not_by_the_raw_logit() -> None:
    # The first token has the larger logit for expert 0, but wants expert 1 far more.
    logits = torch.tensor([[[5.0, 9.0], [4.0, 0.0]]])
    assert choose(logits, 1).tolist() == [[[1], [0]]]


def test_neither_batch_mates_nor_padding_rows_change_a_row(moe: SparseMoE) -> None:
    x = torch.randn(6, 12, 8)
    together = moe(x)
    for row in range(6):
        assert torch.allclose(together[row], moe(x[row : row + 1])[0], atol=1e-6)
    # Rows that would win every place if they competed with the others.
    padding = 100.0 * torch.randn(4, 12, 8)
    record, padded = RouterRecord(), RouterRecord()
    moe(x, record)
    assert torch.allclose(moe(torch.cat([padding, x, padding]), padded)[4:10], together, atol=1e-6)
    assert torch.equal(padded.choices()[4:10], record.choices())


def test_dropped_tokens_get_the_shared_expert_alone(moe: SparseMoE) -> None:
    x, record = torch.randn(1, 12, 8), RouterRecord()
    out = moe(x, record)
    taken = set(record.chosen[0].flatten().tolist())
    dropped = [i for i in range(12) if i not in taken]
    assert dropped
    assert torch.allclose(out[0, dropped], moe.shared(x)[0, dropped], atol=1e-7)
    assert record.dropped_frac() == pytest.approx(len(dropped) / 12)
    assert not torch.allclose(out[0, sorted(taken)], moe.shared(x)[0, sorted(taken)], atol=1e-3)


def test_replay_takes_the_recorded_tokens_with_live_gates(moe: SparseMoE) -> None:
    x, record = torch.randn(3, 12, 8, requires_grad=True), RouterRecord()
    before = moe(x, record)
    choices = record.choices()
    assert (choices.shape, choices.dtype) == ((3, 1, 5 * 3), torch.int16)
    assert torch.equal(moe(x, RouterRecord(replay=choices)), before)
    with torch.no_grad():
        moe.router.weight.add_(torch.randn_like(moe.router.weight))
    again = RouterRecord(replay=choices)
    after, plain = moe(x, again), dense(moe, x, record.chosen[0])
    assert torch.allclose(after, plain, atol=1e-6)
    assert not torch.allclose(after, moe(x), atol=1e-3)
    assert torch.equal(again.choices(), choices)
    assert_same_gradients(after, plain, [x, moe.up, moe.down, moe.router.weight])
    # By hand: places that the live router would have given to another token.
    live = choose((x @ moe.router.weight.T).detach(), 3)
    missed = sum(int(t) not in live[n, e].tolist() for n in range(3) for e in range(5) for t in record.chosen[0][n, e])
    assert again.replay_flip_frac() == pytest.approx(missed / 45)
    assert record.replay_flip_frac() == 0.0
    free = RouterRecord()
    moe(x, free)
    assert free.flips(record) == pytest.approx(missed / 45)


def test_load_is_even_and_statistics_work(moe: SparseMoE) -> None:
    record = RouterRecord()
    moe(torch.randn(3, 12, 8), record)
    assert record.load(0).tolist() == pytest.approx([0.2] * 5)
    assert record.load_cv() == pytest.approx(0.0, abs=1e-6)
    # Even load makes the loss E * sum_e P_e / E = 1, whatever the router says.
    assert record.balance_loss().item() == pytest.approx(1.0)
    assert record.z_loss().item() == pytest.approx(record.logits[0].logsumexp(-1).square().mean().item())


def test_rows_are_needed(moe: SparseMoE) -> None:
    with pytest.raises(DataError, match="needs rows of tokens"):
        moe(torch.randn(12, 8))


def test_unknown_routing_and_capacity_are_refused() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'expert_choice'"):
        replace(ARCHITECTURE, routing="expert_choise")
    for factor in (0.0, -0.1, 1.5, float("nan")):
        with pytest.raises(ConfigError, match="capacity_factor"):
            replace(ARCHITECTURE, capacity_factor=factor)
    with pytest.raises(UnknownNameError, match="Did you mean 'expert_choice'"):
        SparseMoE(8, 16, 5, 2, routing="expert_choise")


def test_a_causal_process_is_refused() -> None:
    with pytest.raises(ConfigError, match="may not look ahead"):
        Policy(replace(ARCHITECTURE, routing="expert_choice"), TOKENIZER, "autoregressive")


def test_routing_reaches_every_layer_and_survives_a_checkpoint(tmp_path: Path) -> None:
    policy = Policy(replace(ARCHITECTURE, routing="expert_choice", capacity_factor=0.5, decoder_layers=2), TOKENIZER)
    save_policy(policy, tmp_path)
    for loaded in (policy, load_policy(tmp_path)):
        found = [(layer.moe.routing, layer.moe.capacity_factor, layer.moe.layer) for layer in loaded.decoder.layers]
        assert found == [("expert_choice", 0.5, 0), ("expert_choice", 0.5, 1)]
