"""What is a function of the step alone: which scenes are visited, and how fast the policy learns."""

from __future__ import annotations

import functools
import math

import numpy as np
from numpy.typing import NDArray

__all__ = ["epoch_order", "learning_rate_scale", "scene_order"]


@functools.lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, count: int) -> NDArray[np.integer]:
    """``[count]`` the scenes in the order in which `epoch` visits them; read-only, 4 bytes a scene.

    The last few are kept, since a step of a million scenes would otherwise take longer to choose its scenes (15 ms)
    than all but the smallest policies to learn from them.
    """
    order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)
    compact = order.astype(np.int32) if count <= np.iinfo(np.int32).max else order
    compact.setflags(write=False)
    return compact


def scene_order(seed: int, step: int, count: int, batch: int) -> list[int]:
    """Indices of the scenes of one step: every epoch is a fresh permutation, cut into batches that straddle epochs.

    A function of (seed, step) alone, so a resumed run needs no iterator state.

    Args:
        seed: Seed of the run.
        step: 0-based step.
        count: Number of scenes, at least 1.
        batch: Indices a step; may exceed `count`.
    """
    chosen: list[int] = []
    position = step * batch
    while len(chosen) < batch:
        epoch, offset = divmod(position, count)
        taken = epoch_order(seed, epoch, count)[offset : offset + batch - len(chosen)].tolist()
        chosen += taken
        position += len(taken)
    return chosen


def learning_rate_scale(step: int, total: int, warmup_ratio: float) -> float:
    """Linear warm-up to 1 over ``warmup_ratio * total`` steps, then a cosine to 0 at `total`.

    Args:
        step: 0-based step about to be taken.
        total: Steps of the run.
        warmup_ratio: Share of steps spent warming up.
    """
    warmup = math.ceil(warmup_ratio * total)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
