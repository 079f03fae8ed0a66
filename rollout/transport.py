"""Scenes and rollouts as they travel between processes: numpy arrays, and nothing that a policy may not see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlhf_drive.policies import DecodeTrace, Decoding, Policy
from rlhf_drive.policies.inputs import ObservationBatch, stack_features
from rlhf_drive.scenes import Trajectories
from rollout.carriers import Rollout

__all__ = ["PackedRollout", "SampleCall", "SentFeatures", "SentScene"]


@dataclass(frozen=True)
class SentScene:
    """A scene as a worker gets it: its network inputs, and nothing of the reference."""

    token: str
    """Its name, which keys the random numbers."""
    features: Mapping[str, NDArray[np.float32]]
    """What :meth:`Policy.features` gave, about 30 kB."""


@dataclass(frozen=True)
class SampleCall:
    """One chunk, decoded as one batch."""

    scenes: tuple[SentScene, ...]
    """S scenes."""
    num_generations: int
    """G."""
    decoding: Decoding
    """How."""
    step: int
    """Keys the random numbers."""
    keep_experts: bool
    """Whether the trace takes the routing of each forward pass."""

    def __str__(self) -> str:
        return f"{len(self.scenes) * self.num_generations} plans of {len(self.scenes)} scenes of step {self.step}"


class SentFeatures:
    """Network inputs that came with the scenes; what a feature cache is in the driver."""

    def batch(self, policy: Policy, scenes: Sequence[SentScene]) -> ObservationBatch:
        """S scenes as tensors on the policy's device."""
        return stack_features([dict(scene.features) for scene in scenes]).to(policy.device)


@dataclass(frozen=True)
class PackedRollout:
    """A rollout as arrays: Ray passes those on without pickling their content."""

    scene_tokens: tuple[str, ...]
    """S scene names."""
    num_generations: int
    """G."""
    tokens: NDArray[np.int64]
    """``[N, L]``."""
    trace: Mapping[str, NDArray[Any]]
    """The trace's tensors by field."""
    settings: Mapping[str, Any]
    """The trace's other fields."""
    trajectories: Trajectories
    """``[N, T, 3]``."""

    @classmethod
    def of(cls, rollout: Rollout) -> PackedRollout:
        """Pack; tensors may be on any device."""
        values = {field.name: getattr(rollout.trace, field.name) for field in fields(DecodeTrace)}
        arrays = {name: value.cpu().numpy() for name, value in values.items() if isinstance(value, Tensor)}
        settings = {name: value for name, value in values.items() if name not in arrays}
        tokens = rollout.tokens.cpu().numpy()
        return cls(rollout.scene_tokens, rollout.num_generations, tokens, arrays, settings, rollout.trajectories)

    def unpacked(self, device: torch.device) -> Rollout:
        """The rollout with its tensors on `device`; arrays are copied, so that Ray can free its own."""
        trace: dict[str, Any] = {
            name: torch.from_numpy(np.array(value)).to(device) for name, value in self.trace.items()
        }
        plans = self.trajectories
        return Rollout(
            self.scene_tokens,
            self.num_generations,
            torch.from_numpy(np.array(self.tokens)).to(device),
            DecodeTrace(**trace, **self.settings),
            Trajectories(np.array(plans.poses), np.array(plans.scene_index), plans.dt_s),
        )
