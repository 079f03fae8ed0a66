"""Tensors that are cut over processes: this process's piece, the whole, and cutting one like another.

Under FSDP2 a weight, its gradient and its moments are `DTensor`s. What works element by element works on the pieces
alone and needs nobody else; the whole takes all processes. A tensor that is not cut is its own piece and its own whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

__all__ = ["cut_like", "joined", "piece", "whole", "whole_values"]


def piece(tensor: Tensor) -> Tensor:
    """What this process holds of it: a view, so that writing into it changes the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of it, on every process. Collective where it is cut."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def cut_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which every process has, cut as another one is cut: no process hears of the others."""
    if not isinstance(like, DTensor):
        return tensor
    cut = distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return cut.clone()  # a view would keep the whole in memory


def joined(own: Tensor, like: Tensor) -> Tensor:
    """The whole of pieces that were cut as `like` is, on the CPU; `own` itself where `like` is whole. Collective."""
    if not isinstance(like, DTensor):
        return own
    pieces = DTensor.from_local(own, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())
    return pieces.full_tensor().cpu()


def whole_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """`whole` of each tensor among some values, the rest as it is. Collective where any is cut."""
    return {name: whole(value) if isinstance(value, Tensor) else value for name, value in values.items()}
