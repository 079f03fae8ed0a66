"""Random numbers keyed by what a sample is, not by where or when it is drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["row_uniforms"]


def row_uniforms(
    seed: int,
    step: int,
    scene_tokens: Sequence[str],
    num_generations: int,
    shape: tuple[int, ...],
    *,
    purpose: str = "",
) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1) for every row, a function of (seed, step, scene token, sample) alone.

    Args:
        seed: Seed of the run.
        step: RL step, so that a scene met again is sampled afresh.
        scene_tokens: S scene names.
        num_generations: G.
        shape: Numbers a row needs, such as ``(2, L)``.
        purpose: What they are for: other purposes get other numbers.

    Returns:
        ``[S * G, *shape]`` float64, scene-major. Worker count, batch split and batch mates do not enter.
    """
    rows = np.empty((len(scene_tokens) * num_generations, *shape))
    for s, token in enumerate(scene_tokens):
        for g in range(num_generations):
            key = hashlib.blake2b(f"{purpose}{seed}/{step}/{g}/{token}".encode(), digest_size=16).digest()
            generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
            rows[s * num_generations + g] = generator.random(shape)
    return rows
