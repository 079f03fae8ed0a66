"""What goes into a reward and what comes out of scoring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rlhf_drive.errors import DataError
from rlhf_drive.scenes import Scene, Trajectories

__all__ = ["EPDMS_COMPONENTS", "PDMS_COMPONENTS", "Failure", "FailureKind", "RewardInputs", "ScorerInfo", "Scores"]

PDMS_COMPONENTS = ("nc", "dac", "ep", "ttc", "c", "ddc", "pdms")
"""Columns of NAVSIM v1.1: no at-fault collision, drivable-area compliance, ego progress, time to collision, comfort,
driving-direction compliance (weight 0), and their aggregate."""
EPDMS_COMPONENTS = ("nc", "dac", "ddc", "tlc", "ep", "ttc", "lk", "hc", "ec", "epdms")
"""Columns of NAVSIM v2.2: as above, with traffic-light compliance, lane keeping, history comfort and two-frame extended
comfort. `ec` is NaN where no plan of the previous frame is given; `epdms` then leaves EC and its weight out."""

FailureKind = Literal[
    "invalid_plan", "invalid_scene", "raised", "timeout", "not_finite", "wrong_output", "unavailable", "worker_died"
]


@dataclass(frozen=True)
class Failure:
    """Why a row has no score."""

    source: str
    """What failed: `plan`, `scene`, `scorer`, `worker`, the column of a gate or term, or their `total`."""
    kind: FailureKind
    """How: the plan holds NaN, the scene cannot be prepared, a function raised, ran out of time, gave NaN or infinity,
    or gave something that is not its values, a component is not available, or the worker died."""
    reason: str
    """One line with the scene and the message."""

    def __str__(self) -> str:
        return self.reason


@dataclass(frozen=True)
class ScorerInfo:
    """Which scorer a number comes from. Scores of different scorers must never be compared."""

    name: str
    """`pdms`, `epdms`, or the name of a backend."""
    version: str
    """What it follows, such as `NAVSIM v2.2`."""
    human_filter: Literal["on", "off", "pre_2025_09_29", "none"] = "none"
    """NAVSIM's human penalty filter; `none` where the version has no such filter."""
    traffic: str = "log replay"
    """How other road users move."""

    def __str__(self) -> str:
        filtered = "" if self.human_filter == "none" else f", human filter {self.human_filter}"
        return f"{self.name.upper()} ({self.version}{filtered}, {self.traffic})"


@dataclass(frozen=True)
class RewardInputs:
    """What a reward function receives: N planned trajectories over S scenes, and the scorer's components if it asks."""

    scenes: Sequence[Scene]
    """S scenes; row n was planned for ``scenes[trajectories.scene_index[n]]``."""
    trajectories: Trajectories
    """N plans in their scene's t=0 ego frame."""
    components: Mapping[str, NDArray[np.float64]]
    """Each of the scorer's columns (`PDMS_COMPONENTS` or `EPDMS_COMPONENTS`) by name, ``[N]`` in 0..1. Rows that could
    not be scored are left out beforehand; `ec` is NaN where there is no plan of the previous frame."""
    previous: Trajectories | None = None
    """N plans of the previous frame (0.5 s earlier) in that frame's ego frame, row by row; None where not sampled."""


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
    scorer: ScorerInfo
    """Name, version and settings of the scorer that the numbers come from."""
    failures: Mapping[int, Failure] = field(default_factory=dict)
    """Reason by row index, for every row that is not valid."""

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

    def rows(self, index: NDArray[np.int64]) -> Scores:
        """The rows `index`, in its order."""
        failures = {new: self.failures[old] for new, old in enumerate(index.tolist()) if old in self.failures}
        return Scores(self.names, self.components[index], self.total[index], self.valid[index], self.scorer, failures)

    @classmethod
    def concatenate(cls, parts: Sequence[Scores]) -> Scores:
        """The rows of several scorings, one after the other.

        Raises:
            DataError: There are no parts, or they have different columns or scorers.
        """
        if len({(part.names, part.scorer) for part in parts}) != 1:
            kinds = sorted({f"{part.scorer} {part.names}" for part in parts})
            raise DataError(f"Only scores of one scorer with the same columns can be joined; got {kinds or 'nothing'}.")
        starts = np.cumsum([0, *(len(part) for part in parts)]).tolist()
        return cls(
            names=parts[0].names,
            components=np.concatenate([part.components for part in parts]),
            total=np.concatenate([part.total for part in parts]),
            valid=np.concatenate([part.valid for part in parts]),
            scorer=parts[0].scorer,
            failures={
                start + row: failure
                for start, part in zip(starts, parts, strict=False)
                for row, failure in part.failures.items()
            },
        )
