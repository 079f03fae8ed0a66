"""What sampling returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
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
    versions: tuple[int, ...] = ()
    """S versions of the weights, by which each scene's group was sampled; all the trace's own by default."""

    def __post_init__(self) -> None:
        if not self.versions:
            object.__setattr__(self, "versions", (self.trace.weight_version,) * len(self.scene_tokens))

    def __len__(self) -> int:
        return int(self.tokens.shape[0])

    @classmethod
    def concatenate(cls, parts: Sequence[Rollout]) -> Rollout:
        """The scenes of several rollouts of one group size and decoding, one after the other."""
        if len(parts) == 1:
            return parts[0]
        group = parts[0].num_generations
        names = tuple(name for part in parts for name in part.scene_tokens)
        poses = np.concatenate([part.trajectories.poses for part in parts])
        return cls(
            scene_tokens=names,
            num_generations=group,
            tokens=torch.cat([part.tokens for part in parts]),
            trace=DecodeTrace.concatenate([part.trace for part in parts]),
            trajectories=Trajectories(poses, np.repeat(np.arange(len(names)), group)),
            versions=tuple(version for part in parts for version in part.versions),
        )

    def to(self, device: torch.device) -> Rollout:
        """The same rollout with its tensors on `device`."""
        return replace(self, tokens=self.tokens.to(device), trace=self.trace.to(device))

    def scenes(self, index: NDArray[np.int64]) -> Rollout:
        """The groups of the scenes at the places `index`, in that order."""
        group = self.num_generations
        rows = (index[:, None] * group + np.arange(group)).reshape(-1)
        where = torch.from_numpy(rows).to(self.tokens.device)
        return Rollout(
            scene_tokens=tuple(self.scene_tokens[i] for i in index.tolist()),
            num_generations=group,
            tokens=self.tokens[where],
            trace=self.trace.rows(where),
            trajectories=Trajectories(self.trajectories.poses[rows], np.repeat(np.arange(len(index)), group)),
            versions=tuple(self.versions[i] for i in index.tolist()),
        )
