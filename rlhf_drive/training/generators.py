"""The random generators of a process: torch's, NumPy's global one and Python's. Their states, as tensors and numbers.

Samples, probes and masks of this project are keyed by step and need none of these. They are for dropout, and for a
user's reward or loss that draws from them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

__all__ = ["generator_states", "kept_generators", "restore_generators", "seed_generators"]


def seed_generators(seed: int) -> None:
    """Seed all of them, so that a run is the same one every time."""
    torch.manual_seed(seed)  # CUDA's too
    np.random.seed(seed % 2**32)  # noqa: NPY002  # the global one: users' functions draw from it
    random.seed(seed)


def generator_states() -> dict[str, Any]:
    """States of this process's generators: tensors and plain values, so that reading them runs nobody's code.

    Returns:
        `torch` and, where CUDA was used, `cuda` (one per GPU that the process sees): byte tensors; `numpy` and
        `python`: words of the Mersenne twister ``[624]`` or ``[625]`` int64, with what else they keep.
    """
    _, words, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002
    version, numbers, next_gauss = random.getstate()
    states = {
        "torch": torch.get_rng_state(),
        "numpy": {
            "words": torch.from_numpy(np.asarray(words, dtype=np.int64)), "position": int(position),
            "has_gauss": int(has_gauss), "gauss": float(gauss),
        },
        "python": {"version": version, "words": torch.tensor(numbers, dtype=torch.int64), "gauss": next_gauss},
    }  # fmt: skip
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = [state.cpu() for state in torch.cuda.get_rng_state_all()]
    return states


def restore_generators(states: Mapping[str, Any]) -> None:
    """Go on from :func:`generator_states`. What it does not hold stays, and so do GPUs that are not there any more."""
    if "torch" in states:
        torch.set_rng_state(states["torch"])
    if "numpy" in states:
        found = states["numpy"]
        words = found["words"].numpy().astype(np.uint32)
        np.random.set_state(("MT19937", words, found["position"], found["has_gauss"], found["gauss"]))  # noqa: NPY002
    if "python" in states:
        found = states["python"]
        random.setstate((found["version"], tuple(found["words"].tolist()), found["gauss"]))
    if "cuda" in states and torch.cuda.is_available():
        for device, state in zip(range(torch.cuda.device_count()), states["cuda"], strict=False):
            torch.cuda.set_rng_state(state, device)


@contextmanager
def kept_generators() -> Iterator[None]:
    """Within the block they may be seeded and drawn from; afterwards they are as before. Also a decorator."""
    before = generator_states()
    try:
        yield
    finally:
        restore_generators(before)
