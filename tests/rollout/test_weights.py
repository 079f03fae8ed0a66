"""Weights on their way: byte for byte what was trained, the frozen ones once, and never a half that fits nowhere."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from oracles.adapted_policy import BASE, SETTINGS, adapted, logits, make, move
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from rlhf_drive.errors import RolloutError
from rlhf_drive.policies import add_lora
from rlhf_drive.policies.adapters import adapter_state
from rollout import Follower
from rollout.weights import Piece, SentWeights, WeightSender, load_pieces, named_weights, pieces, whole_weights


class Store:
    """An object store that notes what is put into it."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.sizes: list[int] = []

    def put(self, chunk: list[Piece]) -> bytes:
        self.names += [piece.name for piece in chunk]
        self.sizes.append(sum(len(piece.data) for piece in chunk))
        return pickle.dumps(chunk)


def load(policy: Any, sent: SentWeights) -> None:
    weights = named_weights(policy)
    for reference in (*sent.base, *sent.trained):
        load_pieces(weights, pickle.loads(reference))


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_weights_arrive_to_the_bit_in_any_chunk_size() -> None:
    generator = torch.Generator().manual_seed(0)
    source = {
        "a": torch.randn(7, 5, generator=generator), "b": torch.randn(11, generator=generator).bfloat16(),
        "c": torch.tensor([1, -2, 3]), "d": torch.zeros(0, 4), "e": torch.tensor(2.5, dtype=torch.float64),
        "f": torch.tensor([True, False]), "g": torch.randn(6, 4, generator=generator).T,
    }  # fmt: skip
    source["a"][0, 0] = torch.nan
    total = sum(t.numel() * t.element_size() for t in source.values())
    for size in (1, 13, 64, 10_000):
        chunks = list(pieces(((name, t.contiguous()) for name, t in source.items()), size))
        assert all(sum(len(p.data) for p in chunk) <= size for chunk in chunks)
        assert sum(len(p.data) for chunk in chunks for p in chunk) == total
        target = {name: torch.empty(t.shape, dtype=torch.float32) for name, t in source.items()}
        for chunk in chunks:
            load_pieces(target, chunk)
        assert {n: (t.dtype, bits(t)) for n, t in target.items()} == {n: (t.dtype, bits(t)) for n, t in source.items()}


def test_chunks_view_the_weights_instead_of_copying_them() -> None:
    weight = torch.zeros(1000)
    (chunk,) = pieces([("w", weight)], 10_000)
    weight[3] = 1.0
    assert chunk[0].data.view("float32")[3] == 1.0


def test_a_policy_gets_every_weight_of_another() -> None:
    source, target, store = make(seed=1), make(seed=2), Store()
    with torch.no_grad():
        for parameter in source.head.parameters():
            parameter.data = parameter.data.bfloat16()
    sent = WeightSender(store.put, 5_000).send(source, 3)
    load(target, sent)
    assert {n: bits(t) for n, t in target.state_dict().items()} == {n: bits(t) for n, t in source.state_dict().items()}
    assert target.head.table.dtype is torch.bfloat16
    assert (sent.version, sent.trained_bytes, sent.base_bytes) == (3, sum(store.sizes), 0)
    assert max(store.sizes) <= 5_000


def test_frozen_weights_go_once_and_adapters_every_time() -> None:
    source, target, store = adapted(), add_lora(make(seed=9), SETTINGS), Store()
    sender = WeightSender(store.put, 10_000)
    first = sender.send(source, 1)
    everything = len(store.names)
    move(source)
    second = sender.send(source, 2)
    factors = adapter_state(source)
    assert set(store.names[everything:]) == set(factors)
    assert second.trained_bytes == sum(4 * factor.numel() for factor in factors.values())
    base = sum(t.numel() * t.element_size() for t in BASE.state_dict().values())
    assert (first.base_bytes, second.base, second.base_number) == (base, first.base, first.number)
    load(target, second)  # also what a worker loads that starts now
    assert {n: bits(t) for n, t in named_weights(target).items()} == {
        n: bits(t) for n, t in named_weights(source).items()
    }


def test_forward_passes_and_copies_leave_frozen_weights_as_they_are() -> None:
    source, store = adapted(), Store()
    sender = WeightSender(store.put, 10**9)
    first = sender.send(source, 1)
    logits(source)
    assert sender.send(source, 2).base_number == first.number
    assert sender.send(copy.deepcopy(source), 3).base_number == first.number


@pytest.mark.parametrize("change", ["written", "permuted", "thawed"])
def test_frozen_weights_that_changed_go_again(change: str) -> None:
    source, store = adapted(), Store()
    sender = WeightSender(store.put, 10**9)
    sender.send(source, 1)
    weight = named_weights(source)["head.table"]
    if change == "written":  # as a checkpoint is restored
        with torch.no_grad():
            weight.add_(1.0)
    elif change == "permuted":
        with torch.no_grad():
            weight[:2, 0] = torch.tensor([1.0, 2.0])
            sender.send(source, 2)
            weight[:2, 0] = torch.tensor([2.0, 1.0])
    else:
        weight.requires_grad_(True)
    second = sender.send(source, 3)
    assert second.base_number == second.number
    assert ("head.table" in {p.name for p in pickle.loads(second.trained[0])}) == (change == "thawed")


def test_weights_that_fit_nowhere_are_refused() -> None:
    (chunk,) = pieces(whole_weights(BASE, ["head.table"]), 10**9)
    with pytest.raises(RolloutError, match=r"'head\.table' \[\d+, 16\] was sent to .* that has no such weight"):
        load_pieces({}, chunk)
    with pytest.raises(RolloutError, match=r"that has shape \[2, 16\].*same version"):
        load_pieces({"head.table": torch.zeros(2, 16)}, chunk)


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_divided_weights_are_made_whole_one_by_one(group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make(seed=4)
    expected = {name: bits(t) for name, t in named_weights(policy).items()}
    mesh = init_device_mesh("cpu", (1,))
    for module in policy.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                divided = torch.nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)]))
                module._parameters[name] = divided
    asked: list[int] = []
    whole = torch.distributed.tensor.DTensor.full_tensor
    monkeypatch.setattr(
        torch.distributed.tensor.DTensor, "full_tensor", lambda self, **o: (asked.append(1), whole(self, **o))[1]
    )
    parts = whole_weights(policy)
    name, first = next(parts)
    assert (bits(first), len(asked)) == (expected[name], 1)
    assert {name: bits(t) for name, t in parts} | {name: bits(first)} == expected
    count, _ = len(asked), asked.clear()
    follower = Follower()
    follower.push_weights(policy, 1)
    assert len(asked) == count  # as often as the main process, or both would wait for ever
    for p in policy.parameters():
        p.requires_grad_(p.shape[0] == 32)
    asked.clear()
    sender, frozen = WeightSender(Store().put, 10**9), sum(not p.requires_grad for p in policy.parameters())
    for push in (sender.send, follower.push_weights):
        for version in (2, 3):
            push(policy, version)
    assert len(asked) == 2 * (count + count - frozen)
