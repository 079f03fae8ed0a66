"""Where a partly decoded plan has got to, beside the anchor plan: what closed-loop decoding needs to know."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_drive.policies.tokenizer import MIN_STEP_M

__all__ = ["DEVIATION_FEATURES", "plan_deviation", "walk"]

DEVIATION_FEATURES = 5


def walk(numbers: Tensor, encoding: str) -> tuple[Tensor, Tensor]:
    """Positions ``[N, T, 2]`` (m) and directions of travel ``[N, T]`` (rad) of plans given as numbers ``[N, L]``.

    The arithmetic of :class:`~rlhf_drive.policies.tokenizer.TrajectoryTokenizer`, in float32 on the numbers' device.
    """
    steps = numbers.unflatten(1, (-1, 2))
    if encoding == "waypoints":
        moved = torch.diff(steps, dim=1, prepend=torch.zeros_like(steps[:, :1]))
        return steps, torch.atan2(moved[..., 1], moved[..., 0].clamp(min=1e-3))
    dx, dy = steps.unbind(dim=-1)
    turns = torch.where((dx.square() + dy.square() >= MIN_STEP_M**2) & (dx > 0), torch.atan2(dy, dx), 0.0)
    after = turns.cumsum(dim=1)
    before = after - turns
    cos, sin = before.cos(), before.sin()
    moved = torch.stack([cos * dx - sin * dy, sin * dx + cos * dy], dim=-1)
    return moved.cumsum(dim=1), after


def plan_deviation(numbers: Tensor, anchor: Tensor, encoding: str) -> Tensor:
    """Features ``[N, T, 5]`` of how far the plan lies from the anchor plan before each of its steps.

    Along and left of the anchor's direction, each coarse and fine, and the difference in direction.

    Args:
        numbers: ``[N, L]`` metres, hidden ones filled with the anchor's; rows scene-major.
        anchor: ``[S, L]`` metres.
        encoding: The tokenizer's.
    """
    position, heading = walk(numbers, encoding)
    anchor_position, anchor_heading = (
        part.repeat_interleave(len(numbers) // len(anchor), dim=0) for part in walk(anchor, encoding)
    )
    delta = position - anchor_position
    cos, sin = anchor_heading.cos(), anchor_heading.sin()
    along = cos * delta[..., 0] + sin * delta[..., 1]
    left = cos * delta[..., 1] - sin * delta[..., 0]
    features = [along / 10.0, along.tanh(), left / 2.0, (2.0 * left).tanh(), 5.0 * (heading - anchor_heading)]
    now = torch.stack(features, dim=-1)[:, :-1]
    return torch.cat([torch.zeros_like(now[:, :1]), now], dim=1)
