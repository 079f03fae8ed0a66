"""The sparse mixture of experts."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from rlhf_drive.policies.moe import RouterRecord, SparseMoE


@pytest.fixture
def moe() -> SparseMoE:
    torch.manual_seed(0)
    return SparseMoE(8, 16, experts=5, top_k=2)


def dense(moe: SparseMoE, x: torch.Tensor) -> torch.Tensor:
    """Every expert on every token, then the gates: the plain definition."""
    logits = moe.router(x)
    every = torch.stack([functional.gelu(x @ moe.up[e]) @ moe.down[e] for e in range(len(moe.up))], dim=1)
    value, chosen = logits.topk(moe.top_k, dim=-1)
    gate = torch.zeros_like(logits).scatter(1, chosen, value.softmax(dim=-1))
    return moe.shared(x) + (gate[..., None] * every).sum(dim=1)


def test_sorted_dispatch_equals_the_dense_definition(moe: SparseMoE) -> None:
    x = torch.randn(37, 8, requires_grad=True)
    sparse, plain = moe(x), dense(moe, x)
    assert torch.allclose(sparse, plain, atol=1e-6)
    for a, b in zip(
        torch.autograd.grad(sparse.square().sum(), [x, moe.up, moe.router.weight], retain_graph=True),
        torch.autograd.grad(plain.square().sum(), [x, moe.up, moe.router.weight]),
        strict=True,
    ):
        assert torch.allclose(a, b, atol=1e-4)


def test_a_tokens_output_does_not_depend_on_its_batch_mates(moe: SparseMoE) -> None:
    x = torch.randn(20, 8)
    assert torch.allclose(moe(x)[3], moe(x[3:4])[0], atol=1e-6)


def test_balance_loss_is_one_when_balanced_and_e_when_collapsed() -> None:
    balanced = RouterRecord([torch.zeros(4, 4)], [torch.arange(4)[:, None]])
    assert balanced.balance_loss().item() == pytest.approx(1.0)
    assert balanced.load_cv() == pytest.approx(0.0)
    logits = torch.full((4, 4), -100.0)
    logits[:, 2] = 0.0
    collapsed = RouterRecord([logits], [torch.full((4, 1), 2)])
    assert collapsed.balance_loss().item() == pytest.approx(4.0)
    # One of four experts has all the load: mean 1/4, std sqrt(3)/4.
    assert collapsed.load_cv() == pytest.approx(3**0.5)


def test_flips_count_slots_whose_expert_is_new_to_the_token() -> None:
    old = RouterRecord([], [torch.tensor([[0, 1], [2, 3]])])
    # First token: the same two in another order; second: one of two is new.
    assert RouterRecord([], [torch.tensor([[1, 0], [2, 4]])]).flips(old) == pytest.approx(0.25)


def test_z_loss_is_the_squared_log_partition() -> None:
    record = RouterRecord([torch.zeros(3, 4)], [torch.zeros(3, 1, dtype=torch.long)])
    assert record.z_loss().item() == pytest.approx(torch.log(torch.tensor(4.0)).item() ** 2)


def test_gradients_are_the_same_bits_every_time_on_several_threads() -> None:
    """Three experts a token: the order in which its three parts are added shows in the last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.manual_seed(0)
        moe, x = SparseMoE(96, 8, experts=4, top_k=3), torch.randn(4096, 96, requires_grad=True)
        first, *others = (torch.autograd.grad(moe(x).square().sum(), [x, moe.up, moe.router.weight]) for _ in range(6))
        assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
    finally:
        torch.set_num_threads(threads)
