"""What the reward service needs from a simulator score: prepare a scene once, then score plans against it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rewards.carriers import PDMS_COMPONENTS
from rlhf_drive.scenes import SceneReference

__all__ = ["Scorer", "pdms_scorer"]


@dataclass(frozen=True)
class Scorer:
    """A simulator score as two functions."""

    name: str
    """Name and version, kept with every score."""
    prepare: Callable[[SceneReference], Any]
    """Everything about a scene that does not depend on the plan; may raise for a scene that cannot be scored."""
    score: Callable[[Any, NDArray[np.float64]], Mapping[str, NDArray[np.float64]]]
    """Prepared scene and plans ``[B, T, 3]`` in, each of `PDMS_COMPONENTS` ``[B]`` out; NaN where a plan has no score.
    Called from several threads at once; a row must not depend on the others."""


def pdms_scorer() -> Scorer:
    """PDMS of NAVSIM v1.1 in Numba. Compiles, or loads what was compiled before, on the first call of its functions."""
    from rewards.pdms import score_pdms
    from rewards.prepare import prepare_scene

    def score(prepared: Any, poses: NDArray[np.float64]) -> Mapping[str, NDArray[np.float64]]:
        result = score_pdms(prepared, poses)
        return {name: getattr(result, name) for name in PDMS_COMPONENTS}

    return Scorer("pdms (NAVSIM v1.1)", prepare_scene, score)
