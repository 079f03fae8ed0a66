"""What goes into a reward and what comes out of scoring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rlhf_drive.errors import DataError
from rlhf_drive.scenes import Scene, Trajectories

__all__ = ["PDMS_COMPONENTS", "RewardInputs", "Scores"]

PDMS_COMPONENTS = ("nc", "dac", "ep", "ttc", "c", "ddc", "pdms")
"""Columns that every scoring yields: NAVSIM's sub-scores (no at-fault collision, drivable-area compliance, ego
progress, time to collision, comfort, driving-direction compliance) and their aggregate."""


@dataclass(frozen=True)
class RewardInputs:
    """What a reward function receives: N planned trajectories over S scenes, and NAVSIM's components if it asks."""

    scenes: Sequence[Scene]
    """S scenes; row n was planned for ``scenes[trajectories.scene_index[n]]``."""
    trajectories: Trajectories
    """N plans in their scene's t=0 ego frame."""
    pdms: Mapping[str, NDArray[np.float64]]
    """Each of `PDMS_COMPONENTS` by name, ``[N]`` in 0..1. Rows that could not be scored are left out beforehand."""


@dataclass(frozen=True)
class Scores:
    """Scored rollouts, row by row. A failed row is invalid with a reason; it is never a zero."""

    names: tuple[str, ...]
    """C component names, the columns of `components`."""
    components: NDArray[np.float64]
    """``[N, C]``; NaN where a component could not be computed."""
    total: NDArray[np.float64]
    """``[N]`` the reward that RL maximises; NaN where not valid."""
    valid: NDArray[np.bool_]
    """``[N]`` whether `total` is a number that may be learned from."""
    failures: Mapping[int, str] = field(default_factory=dict)
    """Reason by row index, for every row that is not valid."""
    scorer: str = "pdms (NAVSIM v1.1)"
    """Name and version of the scorer the numbers come from."""

    def __post_init__(self) -> None:
        n = len(self.total)
        if self.components.shape != (n, len(self.names)) or self.valid.shape != (n,):
            raise DataError(
                f"Scores of {n} rows and {len(self.names)} components need components [{n}, {len(self.names)}] "
                f"and valid [{n}]; got {self.components.shape} and {self.valid.shape}."
            )
        if bad := sorted(set(np.flatnonzero(~self.valid).tolist()) ^ set(self.failures)):
            raise DataError(f"Every invalid row needs a reason and no valid row may have one; rows {bad[:5]} disagree.")

    def __len__(self) -> int:
        return len(self.total)

    def component(self, name: str) -> NDArray[np.float64]:
        """Column `name`, ``[N]``."""
        return np.asarray(self.components[:, self.names.index(name)])
