"""Sets of hidden positions from uniform numbers, row by row."""

from __future__ import annotations

from torch import Tensor

__all__ = ["hide_some"]


def hide_some(uniform: Tensor, count: Tensor) -> Tensor:
    """`count` positions of each row, all sets of that size equally likely.

    Args:
        uniform: ``[..., L]`` in [0, 1).
        count: ``[...]`` long, 0 … L.

    Returns:
        ``[..., L]`` bool: the positions of the `count` smallest numbers.

    Example:
        >>> hide_some(torch.tensor([0.3, 0.9, 0.1]), torch.tensor(2)).tolist()
        [True, False, True]
    """
    place = uniform.argsort(dim=-1, stable=True).argsort(dim=-1)
    return place < count[..., None]
