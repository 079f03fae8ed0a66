"""Weights on their way from the process that trains to those that sample.

They travel as raw bytes in chunks of bounded size: numpy arrays that Ray writes straight into shared memory, which is
several times faster than pickled tensors. What is frozen (the base below LoRA adapters) goes once; afterwards only what
is trained goes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from rlhf_drive.errors import RolloutError
from rlhf_drive.policies import Policy
from rlhf_drive.policies.adapters import adapter_state, base_state

__all__ = [
    "Piece",
    "SentWeights",
    "WeightChanges",
    "WeightSender",
    "join_weights",
    "load_pieces",
    "named_weights",
    "pieces",
    "whole_weights",
]

Names = tuple[str, ...]


@dataclass(frozen=True)
class Piece:
    """Some bytes of one weight."""

    name: str
    """The weight's plain name, as checkpoints have it."""
    dtype: str
    """Its type, such as ``"bfloat16"``."""
    shape: tuple[int, ...]
    """Its shape."""
    start: int
    """Where the bytes begin in it."""
    data: NDArray[np.uint8]
    """The bytes."""


@dataclass(frozen=True)
class SentWeights:
    """Weights that are in the object store: references to chunks, which are lists of :class:`Piece`."""

    version: int
    """Which weights they are, as the caller of `push_weights` counts."""
    number: int
    """Number of the push, from 1."""
    trained: tuple[Any, ...]
    """Chunks of what is trained."""
    trained_bytes: int
    """Their size."""
    base_number: int
    """Number of the push that sent what is frozen."""
    base: tuple[Any, ...]
    """Chunks of what is frozen."""
    base_bytes: int
    """Their size."""

    def __str__(self) -> str:
        return f"weights version {self.version} ({(self.trained_bytes + self.base_bytes) / 1e6:.0f} MB)"


def named_weights(policy: Policy) -> dict[str, Tensor]:
    """All weights of a policy by plain name, adapters and persistent buffers included; the live tensors."""
    state = policy.state_dict(keep_vars=True)
    return {**base_state(policy, state), **adapter_state(policy, state)}


def _is_frozen(weight: Tensor) -> bool:
    return isinstance(weight, nn.Parameter) and not weight.requires_grad


def _is_divided(weight: Tensor) -> bool:
    """Whether it is a `DTensor`, whose module takes long to import and is there only where it is used."""
    return hasattr(weight, "full_tensor")


@torch.no_grad()
def whole_weights(policy: Policy, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Weights by plain name, whole and on the CPU, one after the other so that memory stays bounded.

    Where weights are divided among processes (FSDP2) all processes must go through this together.

    Args:
        policy: Whose weights.
        names: Which ones; all by default.
    """
    found = named_weights(policy)
    for name in found if names is None else names:
        weight: Any = found[name].detach()
        yield name, (weight.full_tensor() if _is_divided(weight) else weight).cpu().contiguous()


@torch.no_grad()
def join_weights(policy: Policy, names: Iterable[str]) -> None:
    """Another process's part in :func:`whole_weights` where weights are divided."""
    found = named_weights(policy)
    for name in names:
        weight: Any = found[name].detach()
        if _is_divided(weight):
            weight.full_tensor()


class WeightChanges:
    """Which weights must be sent: those that are trained always, frozen ones when they are not known yet or changed.

    Whether frozen weights changed, as where a checkpoint is restored, is told by sums over their bits. Neither address
    nor version counter of a tensor would do: adapters on expert weights touch both in every forward pass.
    """

    def __init__(self) -> None:
        self._known: tuple[Names, list[int]] | None = None

    def take(self, policy: Policy) -> tuple[Names | None, Names]:
        """Names of what is frozen, None where it is as it was at the last call; and names of what is trained.

        All processes must call this together where weights are divided among them, and all get the same.
        """
        weights = named_weights(policy)
        frozen = tuple(name for name, weight in weights.items() if _is_frozen(weight))
        now = frozen, _bit_sums([weights[name] for name in frozen])
        same, self._known = now == self._known, now
        return None if same else frozen, tuple(name for name in weights if name not in set(frozen))


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def _bit_sums(weights: Sequence[Tensor]) -> list[int]:
    """Two sums over the bits of each weight, of all its numbers and of every third one."""
    found = []
    for weight in weights:
        own: Any = weight.detach()
        own = (own.to_local() if _is_divided(own) else own).reshape(-1)
        numbers = own.view(_INTEGERS[own.element_size()])
        found += [numbers.sum(dtype=torch.int64), numbers[::3].sum(dtype=torch.int64)]
    if not found:
        return []
    sums = torch.stack(found)
    if any(_is_divided(weight) for weight in weights):
        dist.all_reduce(sums)  # so that all processes find the same
    result: list[int] = sums.tolist()
    return result


def pieces(weights: Iterable[tuple[str, Tensor]], chunk_bytes: int) -> Iterator[list[Piece]]:
    """Chunks of at most `chunk_bytes`; they view the tensors' memory. A weight may be spread over several."""
    chunk: list[Piece] = []
    room = chunk_bytes
    for name, weight in weights:
        flat = weight.reshape(-1).view(torch.uint8).numpy() if weight.numel() else np.zeros(0, np.uint8)
        dtype, shape = str(weight.dtype).removeprefix("torch."), tuple(weight.shape)
        start = 0
        while start < len(flat) or start == 0:
            part = flat[start : start + room]
            chunk.append(Piece(name, dtype, shape, start, part))
            room -= len(part)
            start += max(1, len(part))
            if room <= 0:
                yield chunk
                chunk, room = [], chunk_bytes
    if chunk:
        yield chunk


class WeightSender:
    """Puts a policy's weights into an object store, what is frozen once."""

    def __init__(self, put: Callable[[list[Piece]], Any], chunk_bytes: int) -> None:
        """Send nothing yet.

        Args:
            put: Stores a chunk, and copies it while it does; returns a reference.
            chunk_bytes: Size of a chunk; what is copied from a GPU or gathered at once is bounded by a weight's size.
        """
        self._put, self._chunk_bytes = put, chunk_bytes
        self._changes = WeightChanges()
        self._number = self._base_number = 0
        self._base: tuple[tuple[Any, ...], int] = ((), 0)

    def send(self, policy: Policy, version: int) -> SentWeights:
        """Put what the workers lack; collective where weights are divided among processes."""
        self._number += 1
        frozen, trained = self._changes.take(policy)
        if frozen is not None:
            self._base, self._base_number = self._stored(policy, frozen), self._number
        parts, size = self._stored(policy, trained)
        return SentWeights(version, self._number, parts, size, self._base_number, *self._base)

    def _stored(self, policy: Policy, names: Names) -> tuple[tuple[Any, ...], int]:
        references, size = [], 0
        for chunk in pieces(whole_weights(policy, names), self._chunk_bytes):
            references.append(self._put(chunk))
            size += sum(len(piece.data) for piece in chunk)
        return tuple(references), size


@torch.no_grad()
def load_pieces(weights: Mapping[str, Tensor], chunk: Sequence[Piece]) -> None:
    """Write a chunk into `weights` (:func:`named_weights`), which take on the types of what is sent.

    Raises:
        RolloutError: A name or a shape is unknown: the driver runs another version of rlhf-drive or of PEFT.
    """
    for piece in chunk:
        weight = weights.get(piece.name)
        if weight is None or tuple(weight.shape) != piece.shape:
            here = "no such weight" if weight is None else f"shape {list(weight.shape)}"
            raise RolloutError(
                f"Weight {piece.name!r} {list(piece.shape)} was sent to a rollout worker that has {here}. Give every "
                "machine the same version of rlhf-drive and its packages."
            )
        dtype = getattr(torch, piece.dtype)
        if weight.dtype != dtype:
            weight.data = torch.empty(piece.shape, dtype=dtype, device=weight.device)
        if not len(piece.data):
            continue
        target = weight.detach().view(-1).view(torch.uint8)[piece.start : piece.start + len(piece.data)]
        if target.device.type == "cpu":
            np.copyto(target.numpy(), piece.data)
        else:
            target.copy_(torch.from_numpy(piece.data.copy()))  # what Ray hands out is read-only
