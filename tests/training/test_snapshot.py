"""A snapshot brings weights, buffers and optimizer back to the bit, so that a run repeats itself."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from rlhf_drive.training.snapshot import Snapshot


class Net(nn.Module):
    """Two layers, one frozen, and a buffer that every pass moves."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6, dtype=dtype)
        self.second = nn.Linear(6, 2, dtype=dtype)
        self.first.bias.requires_grad_(False)
        self.register_buffer("seen", torch.zeros(6))
        self.register_buffer("count", torch.tensor(0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Passes, and counts."""
        hidden = self.first(x).tanh()
        self.seen.mul_(0.5).add_(hidden.detach().float().mean(0))
        self.count.add_(1)
        return self.second(hidden)


def make(dtype: torch.dtype, optimizer: str) -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(1)
    net = Net(dtype)
    learned = [p for p in net.parameters() if p.requires_grad]
    if optimizer == "adamw":
        return net, torch.optim.AdamW(learned, lr=0.05, weight_decay=0.1, amsgrad=True)
    return net, torch.optim.SGD(learned, lr=0.05, momentum=0.9)


def learn(net: Net, optimizer: torch.optim.Optimizer, seeds: range) -> list[float]:
    losses = []
    for seed in seeds:
        for group in optimizer.param_groups:
            group["lr"] *= 0.9
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed)).to(net.first.weight.dtype)
        loss = net(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
    return losses


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("before", [0, 3])
def test_a_restored_run_repeats_itself_to_the_bit(dtype: torch.dtype, optimizer: str, before: int) -> None:
    net, opt = make(dtype, optimizer)
    learn(net, opt, range(before))
    start = copy.deepcopy((net.state_dict(), opt.state_dict(), net.count))
    snapshot = Snapshot(net, opt)
    first = learn(net, opt, range(10, 14))
    end = copy.deepcopy((net.state_dict(), opt.state_dict(), net.count))
    assert not same(start[0], end[0])
    for _ in range(2):  # a snapshot survives its use
        net(torch.ones(1, 4, dtype=dtype)).sum().backward()
        snapshot.restore()
        assert all(p.grad is None for p in net.parameters())
        assert same([net.state_dict(), opt.state_dict(), net.count], list(start))
        assert learn(net, opt, range(10, 14)) == first
        assert same([net.state_dict(), opt.state_dict(), net.count], list(end))


def test_moments_keep_their_own_precision() -> None:
    """torch's own load_state_dict would cast float32 moments of bfloat16 weights to bfloat16."""
    net, opt = make(torch.bfloat16, "adamw")
    learn(net, opt, range(2))
    for values in opt.state.values():
        values["exp_avg"] = values["exp_avg"].float() + 1e-6
    moments = [values["exp_avg"].clone() for values in opt.state.values()]
    snapshot = Snapshot(net, opt)
    for values in opt.state.values():
        values["exp_avg"].zero_()
    snapshot.restore()
    assert same([values["exp_avg"] for values in opt.state.values()], moments)
