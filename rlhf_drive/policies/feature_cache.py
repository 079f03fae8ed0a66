"""Network inputs of scenes, computed once and kept: tensorising costs more than a forward pass of a small policy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rlhf_drive.policies.inputs import ObservationBatch, stack_features
from rlhf_drive.policies.policy import Policy
from rlhf_drive.scenes import Scene
from rlhf_drive.scenes.recently_used import RecentlyUsed

__all__ = ["FeatureCache"]

MAX_BYTES = 512 * 2**20
"""Memory of a process's features: about 17,000 scenes of 30 kB."""
ENTRY_BYTES = 1500
"""Of an entry beside its numbers: key, dictionary and array objects."""

Features = dict[str, NDArray[np.float32]]


class FeatureCache:
    """Least-recently-used cache of feature arrays by scene token; threads may share it.

    Policies of different architecture or tokenizer may share it: what they see of a scene is kept apart.

    Args:
        max_bytes: Memory of the entries together.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._recent: RecentlyUsed[Features] = RecentlyUsed(max_bytes, _size_of)

    def __len__(self) -> int:
        return len(self._recent)

    @property
    def nbytes(self) -> int:
        """Memory of what is there."""
        return self._recent.size

    def batch(self, policy: Policy, scenes: Sequence[Scene]) -> ObservationBatch:
        """The observations of S scenes as tensors on the policy's device. Only ``scene.observation`` is read."""
        return stack_features(self.rows(policy, scenes)).to(policy.device)

    def rows(self, policy: Policy, scenes: Sequence[Scene]) -> list[Features]:
        """The feature arrays of S scenes, as they travel to other processes; not to be written to."""
        return [self._features(policy, scene) for scene in scenes]

    def _features(self, policy: Policy, scene: Scene) -> Features:
        key = (scene.token, policy.architecture, policy.tokenizer)
        return self._recent.get(key, lambda: policy.features(scene.observation))


def _size_of(features: Features) -> int:
    """Bytes of an entry; an array that is part of another one keeps the whole of it alive."""
    arrays = (array if array.base is None else array.base for array in features.values())
    return ENTRY_BYTES + sum(array.nbytes for array in arrays)
