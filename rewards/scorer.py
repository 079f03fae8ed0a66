"""Simulator scores by name: what prepares a scene once and scores plans against it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from rewards.carriers import EPDMS_COMPONENTS, PDMS_COMPONENTS, ScorerInfo
from rlhf_drive.errors import ConfigError, did_you_mean
from rlhf_drive.registry import Registry
from rlhf_drive.scenes import SceneReference

__all__ = ["HUMAN_FILTERS", "SCORERS", "Scorer", "epdms_scorer", "pdms_scorer"]

Poses = NDArray[np.float64]
HUMAN_FILTERS = ("on", "off", "pre_2025_09_29")
"""Settings of NAVSIM's human penalty filter: as v2.2 has it, without, and with the aggregate not recomputed, which is
what checkouts before 2025-09-29 report."""


@dataclass(frozen=True)
class Scorer:
    """A simulator score as two functions."""

    info: ScorerInfo
    """Name, version and settings, kept with every score."""
    columns: tuple[str, ...]
    """Names of the components that `score` returns, the aggregate last."""
    prepare: Callable[[str, SceneReference], Any]
    """Token and reference of a scene in, everything about it that does not depend on the plan out; may raise for a
    scene that cannot be scored."""
    score: Callable[[Any, Poses, Poses | None], Mapping[str, NDArray[np.float64]]]
    """Prepared scene, plans ``[B, 8, 3]`` and, where there are any, the plans of the previous frame ``[B, 8, 3]`` in;
    each of `columns` ``[B]`` out, NaN where a plan has no score. Called from several threads at once; a row must not
    depend on the others."""
    optional: frozenset[str] = frozenset()
    """Columns that may be NaN in a row that is scored otherwise."""


SCORERS: Registry[Callable[..., Scorer]] = Registry("scorer")
"""Functions that make a scorer, by name; keyword-only parameters are their options."""


@SCORERS.register("pdms")
def pdms_scorer() -> Scorer:
    """PDMS of NAVSIM v1.1: ``nc * dac * (5 ep + 5 ttc + 2 c) / 12``.

    Compiles, or loads what was compiled before, on the first call of its functions.
    """

    def prepare(token: str, reference: SceneReference) -> Any:
        from rewards.prepare import prepare_scene

        return prepare_scene(reference)

    def score(prepared: Any, poses: Poses, previous: Poses | None) -> Mapping[str, NDArray[np.float64]]:
        from rewards.pdms import score_pdms

        result = score_pdms(prepared, poses)
        return {name: getattr(result, name) for name in PDMS_COMPONENTS}

    return Scorer(ScorerInfo("pdms", "NAVSIM v1.1"), PDMS_COMPONENTS, prepare, score)


@SCORERS.register("epdms")
def epdms_scorer(*, human_filter: str = "on") -> Scorer:
    """EPDMS of NAVSIM v2.2: ``nc * dac * ddc * tlc * (5 ep + 5 ttc + 2 lk + 2 hc + 2 ec) / 16``.

    EC needs the plan of the previous frame; without one it and its weight are left out, as NAVSIM does.

    Args:
        human_filter: `on`, `off` or `pre_2025_09_29` (`HUMAN_FILTERS`).

    Raises:
        ConfigError: `human_filter` is none of them.
    """
    if human_filter not in HUMAN_FILTERS:
        raise ConfigError(f"Unknown human_filter {human_filter!r}. {did_you_mean(human_filter, HUMAN_FILTERS)}")

    def prepare(token: str, reference: SceneReference) -> Any:
        from rewards.epdms import prepare_epdms

        return prepare_epdms(reference)

    def score(prepared: Any, poses: Poses, previous: Poses | None) -> Mapping[str, NDArray[np.float64]]:
        from rewards.epdms import score_epdms

        result = score_epdms(prepared, poses, previous, human_filter=human_filter)
        return {name: getattr(result, name) for name in EPDMS_COMPONENTS}

    info = ScorerInfo("epdms", "NAVSIM v2.2", cast(Any, human_filter))
    return Scorer(info, EPDMS_COMPONENTS, prepare, score, optional=frozenset({"ec"}))
