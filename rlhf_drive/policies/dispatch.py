"""Sending tokens to their experts and adding up what comes back: one interface, two kernels.

Pairs of token and expert are sorted by expert once, so that each expert works on one contiguous slice. `slices` takes
them one after the other; `grouped` hands all to ``torch.nn.functional.grouped_mm``, which needs no sizes on the host
and is the choice on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from rlhf_drive.errors import UnknownNameError, did_you_mean

__all__ = ["KERNELS", "Pairs", "mix_experts", "pick_kernel"]


@dataclass(frozen=True)
class Pairs:
    """P pairs of token and expert, sorted by expert."""

    token: Tensor
    """``[P]`` long: row of the token among all n."""
    counts: Tensor
    """``[E]`` long: pairs of each expert; adds up to P."""
    gate: Tensor
    """``[P]`` float32: weight of the expert's output in the token's."""


def _slices(x: Tensor, up: Tensor, down: Tensor, counts: Tensor) -> Tensor:
    """Expert after expert. Small slices stay in the cache, and one `unbind` lets the gradient of the weights be written
    once: that of ``up[e]`` would be a full ``[E, d, h]`` for every expert."""
    slices = zip(x.split(counts.tolist()), up.unbind(), down.unbind(), strict=True)
    return torch.cat([functional.gelu(piece @ w_up) @ w_down for piece, w_up, w_down in slices])


def _grouped(x: Tensor, up: Tensor, down: Tensor, counts: Tensor) -> Tensor:
    """All experts in one call a matrix. Its gradient refuses expanded tensors; none reach it, since the product with
    the gates comes after."""
    ends = counts.cumsum(0).to(torch.int32)
    return functional.grouped_mm(functional.gelu(functional.grouped_mm(x, up, offs=ends)), down, offs=ends)


KERNELS = {"slices": _slices, "grouped": _grouped}
"""``kernel(x [P, d], up [E, d, h], down [E, h, d], counts [E]) -> [P, d]``, rows sorted by expert, by name."""


def pick_kernel(up: Tensor) -> str:
    """`grouped` on a GPU where it has a kernel for the dtype and rows are aligned to 16 bytes, else `slices`."""
    aligned = all(size * up.element_size() % 16 == 0 for size in up.shape[1:])
    return "grouped" if up.is_cuda and aligned and up.dtype != torch.float64 else "slices"


def mix_experts(x: Tensor, up: Tensor, down: Tensor, pairs: Pairs, kernel: str = "auto") -> Tensor:
    """``out[i] = sum over pairs (i, e) of gate * gelu(x[i] @ up[e]) @ down[e]``; 0 for a token without a pair.

    The experts compute in the dtype of autocast where that is on, else in that of `x`; the sum over experts is taken in
    the gates' float32. On a CPU gradients are the same bits every time, on any number of threads: the gradient of
    ``x[token]`` would add a token's parts in an order that threads race for, that of `index_select` does not.

    Args:
        x: ``[n, d]`` tokens.
        up: ``[E, d, h]``.
        down: ``[E, h, d]``.
        pairs: Who goes where.
        kernel: A key of `KERNELS`, or `auto` for :func:`pick_kernel`.

    Returns:
        ``[n, d]`` in the dtype of `x`.

    Raises:
        UnknownNameError: There is no such kernel.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    up, down = up.to(dtype), down.to(dtype)
    name = pick_kernel(up) if kernel == "auto" else kernel
    if name not in KERNELS:
        raise UnknownNameError(f"Unknown dispatch kernel {name!r}. {did_you_mean(name, KERNELS)}")
    routed = KERNELS[name](x.to(dtype).index_select(0, pairs.token), up, down, pairs.counts)
    weighted = routed * pairs.gate[:, None]
    out = torch.zeros(x.shape, dtype=weighted.dtype, device=x.device)
    return out.index_add(0, pairs.token, weighted).to(x.dtype)
