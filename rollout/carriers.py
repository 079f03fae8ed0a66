"""What sampling returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rlhf_drive.policies import DecodeTrace
from rlhf_drive.scenes import Trajectories

__all__ = ["Rollout"]


@dataclass(frozen=True)
class Rollout:
    """G sampled plans for each of S scenes; N = S * G rows, scene-major."""

    scene_tokens: tuple[str, ...]
    """S scene names."""
    num_generations: int
    """G."""
    tokens: Tensor
    """``[N, L]`` long, finished action tokens."""
    trace: DecodeTrace
    """How each row came about, with behaviour log-probabilities."""
    trajectories: Trajectories
    """``[N, T, 3]`` decoded plans in each scene's ego frame."""

    def __len__(self) -> int:
        return int(self.tokens.shape[0])
