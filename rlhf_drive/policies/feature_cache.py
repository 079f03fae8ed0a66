"""Network inputs of scenes, computed once and kept: tensorising costs more than a forward pass of a small policy."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from rlhf_drive.policies.inputs import ObservationBatch, stack_features
from rlhf_drive.policies.policy import Policy
from rlhf_drive.scenes import Scene

__all__ = ["FeatureCache"]


class FeatureCache:
    """Least-recently-used cache of feature arrays by scene token (about 30 kB a scene).

    Policies of different architecture or tokenizer may share it: what they see of a scene is kept apart.
    """

    def __init__(self, capacity: int = 20_000) -> None:
        self.capacity = capacity
        self._features: OrderedDict[Hashable, dict[str, NDArray[np.float32]]] = OrderedDict()

    def batch(self, policy: Policy, scenes: Sequence[Scene]) -> ObservationBatch:
        """The observations of S scenes as tensors on the policy's device. Only ``scene.observation`` is read."""
        rows = []
        for scene in scenes:
            key = (scene.token, policy.architecture, policy.tokenizer)
            if key not in self._features:
                self._features[key] = policy.features(scene.observation)
                if len(self._features) > self.capacity:
                    self._features.popitem(last=False)
            self._features.move_to_end(key)
            rows.append(self._features[key])
        return stack_features(rows).to(policy.device)
