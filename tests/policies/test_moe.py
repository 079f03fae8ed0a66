"""The sparse mixture of experts."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from rlhf_drive.errors import UnknownNameError
from rlhf_drive.policies.dispatch import KERNELS, pick_kernel
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


@pytest.mark.parametrize("kernel", list(KERNELS))
@pytest.mark.parametrize("unused", [0, 2], ids=["all experts", "idle experts"])
def test_dispatch_equals_the_dense_definition(moe: SparseMoE, kernel: str, unused: int) -> None:
    x = torch.randn(37, 8)
    x[:, 0] = 1.0
    x.requires_grad_()
    with torch.no_grad():
        # Experts that nobody wants, in the middle of the others.
        moe.router.weight[1 : 1 + unused, 0] = -100.0
    moe.kernel, record = kernel, RouterRecord()
    sparse, plain = moe(x, record), dense(moe, x)
    assert int((record.load(0) == 0).sum()) == unused
    assert torch.allclose(sparse, plain, atol=1e-6)
    for a, b in zip(
        torch.autograd.grad(sparse.square().sum(), [x, moe.up, moe.down, moe.router.weight], retain_graph=True),
        torch.autograd.grad(plain.square().sum(), [x, moe.up, moe.down, moe.router.weight]),
        strict=True,
    ):
        assert torch.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("kernel", list(KERNELS))
def test_kernels_take_expanded_gradients(moe: SparseMoE, kernel: str) -> None:
    moe.kernel, x = kernel, torch.randn(37, 8, requires_grad=True)
    moe(x).sum().backward()
    expected = torch.autograd.grad(dense(moe, x).sum(), [x, moe.up])
    assert torch.allclose(x.grad, expected[0], atol=1e-5)
    assert torch.allclose(moe.up.grad, expected[1], atol=1e-5)


def test_unknown_kernels_are_refused_and_a_cpu_takes_slices(moe: SparseMoE) -> None:
    assert pick_kernel(moe.up) == "slices"
    moe.kernel = "grouped_mm"
    with pytest.raises(UnknownNameError, match="Unknown dispatch kernel 'grouped_mm'"):
        moe(torch.randn(3, 8))


@pytest.mark.parametrize("kernel", list(KERNELS))
@pytest.mark.parametrize("whole", [True, False], ids=["bfloat16 weights", "autocast"])
def test_logits_and_gates_stay_in_float32(moe: SparseMoE, whole: bool, kernel: str) -> None:
    """Router weights that bfloat16 holds exactly, and logits that differ by less than it can tell apart."""
    moe.kernel, record = kernel, RouterRecord()
    with torch.no_grad():
        moe.router.weight.copy_(1.0)
        moe.router.weight[:, 0] = torch.tensor([256.0, 257.0, 258.0, 259.0, 260.0]).to(torch.bfloat16)
    x = torch.ones(4, 8)
    expected = torch.tensor([263.0, 263.0, 265.0, 267.0, 267.0])  # 257 and 259 round to even neighbours, 256 and 260
    if whole:
        moe = moe.to(torch.bfloat16)
        out = moe(x.to(torch.bfloat16), record)
    else:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = moe(x, record)
    assert record.logits[0].dtype == torch.float32
    assert torch.equal(record.logits[0], expected.expand(4, 5))
    assert out.dtype == (torch.bfloat16 if whole else torch.float32)
    reference = dense(moe.float(), x)
    assert torch.allclose(out.float(), reference, rtol=0.05, atol=0.05)
    assert not torch.equal(out.float(), reference)


@pytest.mark.parametrize("kernel", list(KERNELS))
def test_experts_compute_in_the_dtype_of_autocast(moe: SparseMoE, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, run = [], KERNELS[kernel]

    def spy(*inputs: torch.Tensor) -> torch.Tensor:
        seen.extend(value.dtype for value in inputs[:3])
        return run(*inputs)

    monkeypatch.setitem(KERNELS, kernel, spy)
    moe.kernel = kernel
    with torch.autocast("cpu", dtype=torch.bfloat16):
        moe(torch.randn(3, 8))
    assert seen == [torch.bfloat16] * 3


def test_no_tokens_give_no_tokens(moe: SparseMoE) -> None:
    assert moe(torch.randn(0, 8)).shape == (0, 8)


def test_gradients_flow_through_autocast(moe: SparseMoE) -> None:
    x = torch.randn(37, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = moe(x)
    got = torch.autograd.grad(out.square().sum(), [x, moe.up, moe.router.weight])
    want = torch.autograd.grad(dense(moe, x).square().sum(), [x, moe.up, moe.router.weight])
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() < 0.03 * b.norm()


def test_nothing_is_dropped_when_tokens_choose(moe: SparseMoE) -> None:
    record = RouterRecord()
    moe(torch.randn(3, 4, 8), record)
    assert record.dropped_frac() == 0.0


def test_replay_flips_count_what_the_live_router_would_have_chosen_otherwise() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0]])
    replayed = RouterRecord([logits], [torch.tensor([[0, 2], [2, 3]])], replay=torch.zeros(0), rows=2)
    # The first token's own choice is 0 and 1: one slot of four differs.
    assert replayed.replay_flip_frac() == pytest.approx(0.25)


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
