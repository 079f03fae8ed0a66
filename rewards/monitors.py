"""Numbers that show a policy gaming its reward: how its plans move, and what each component still teaches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rewards.builtin import AGGREGATES
from rewards.carriers import EPDMS_COMPONENTS, PDMS_COMPONENTS, Scores
from rewards.plan_motion import (
    MOTION,
    MOVING_M,
    STANDSTILL_M,
    human_plan,
    motion_ratio,
    pdm_closed_plan,
    reach_m,
    reversing,
)
from rlhf_drive.scenes import Scene, Trajectories

__all__ = ["SCORER_COLUMNS", "batch_monitors", "component_monitors", "plan_monitors"]

Array = NDArray[np.float64]

SCORER_COLUMNS = frozenset(PDMS_COMPONENTS) | frozenset(EPDMS_COMPONENTS)
"""Columns in 0..1 whose ceiling is known to be 1."""
WITHOUT_WEIGHT = {"pdms": frozenset({"ddc"})}
"""Columns that a scorer reports and does not weigh: that such a one is at its ceiling is no news."""
_EQUAL = 1e-6
"""Values closer than this are the same."""


def batch_monitors(scenes: Sequence[Scene], trajectories: Trajectories, scores: Scores) -> dict[str, float]:
    """Monitors of one scored batch: :func:`plan_monitors` and :func:`component_monitors` of its valid rows.

    Args:
        scenes: S scenes.
        trajectories: N plans in their scene's t=0 ego frame.
        scores: Their N scores.

    Returns:
        Numbers by name `monitor/…`. What no row tells is left out; an empty batch gives none.

    Example:
        ``batch_monitors(scenes, trajectories, service.score(scenes, trajectories))["monitor/final_reversal"]``
    """
    rows = np.flatnonzero(scores.valid)
    plans = Trajectories(trajectories.poses[rows], trajectories.scene_index[rows], trajectories.dt_s)
    return {**plan_monitors(scenes, plans), **component_monitors(scores, trajectories.scene_index)}


def plan_monitors(scenes: Sequence[Scene], trajectories: Trajectories) -> dict[str, float]:
    """How plans move, against the human in the same scenes.

    Args:
        scenes: S scenes.
        trajectories: N plans in their scene's t=0 ego frame; rows that are not finite are left out.

    Returns:
        `monitor/final_reversal`: share whose last step reverses. `monitor/standstill`: share that never gets farther
        than `STANDSTILL_M`, of the plans in scenes whose reference (the human, else PDM-Closed) gets `MOVING_M` far.
        `monitor/Q_ratio` for each quantity Q of `MOTION`: :func:`rewards.plan_motion.motion_ratio` over the rows whose
        scene holds the human's drive. What no row tells is left out.
    """
    finite = np.isfinite(trajectories.poses).all(axis=(1, 2))
    plans, index = trajectories.poses[finite], trajectories.scene_index[finite]
    if len(plans) == 0:
        return {}
    result = {"monitor/final_reversal": float(reversing(plans).mean())}
    humans = [human_plan(scene) for scene in scenes]
    references = [
        pdm_closed_plan(scene) if human is None else human for scene, human in zip(scenes, humans, strict=True)
    ]
    rows, reference = _rows_with(references, index)
    moving = reach_m(reference) >= MOVING_M
    if moving.any():
        result["monitor/standstill"] = float((reach_m(plans[rows][moving]) < STANDSTILL_M).mean())
    rows, human = _rows_with(humans, index)
    if len(rows):
        for name, quantity in MOTION.items():
            result[f"monitor/{name}_ratio"] = motion_ratio(quantity, plans[rows], human)
    return result


def _rows_with(of_scenes: Sequence[Array | None], index: NDArray[np.int64]) -> tuple[NDArray[np.int64], Array]:
    """Rows whose scene has a plan of its own, and that plan ``[n, 8, 3]`` for each."""
    rows = np.array([n for n, i in enumerate(index.tolist()) if of_scenes[i] is not None], dtype=np.int64)
    found = [plan for n in rows.tolist() if (plan := of_scenes[int(index[n])]) is not None]
    return rows, np.array(found, dtype=np.float64).reshape(len(rows), -1, 3) if found else np.zeros((0, 1, 3))


def component_monitors(scores: Scores, scene_index: NDArray[np.int64]) -> dict[str, float]:
    """What each column of the scores still tells plans of one scene apart by.

    Args:
        scores: N rows; only valid ones, and of a column only its finite values, count.
        scene_index: ``[N]`` scene of each row; rows of one scene form a group.

    Returns:
        For each column C: `monitor/mean/C`. `monitor/ceiling/C`: share of rows at 1, or, in a column of the user's
        whose ceiling is not known, at the batch's maximum; left out for `WITHOUT_WEIGHT`. `monitor/group_spread/C`:
        share of groups of two rows or more in which the column differs. `monitor/variance_share/C`: squared
        correlation of the deviations from the group's mean of the column and of the total, that is the share of what
        a group learns from that follows this column alone; left out for aggregates and for a column that is the total
        itself.
    """
    result: dict[str, float] = {}
    for column, name in enumerate(scores.names):
        values = scores.components[:, column]
        rows = np.flatnonzero(scores.valid & np.isfinite(values))
        if len(rows) == 0:
            continue
        mine, total = values[rows], scores.total[rows]
        _, group = np.unique(scene_index[rows], return_inverse=True)
        ceiling = 1.0 if name in SCORER_COLUMNS else float(mine.max())
        result[f"monitor/mean/{name}"] = float(mine.mean())
        if name not in WITHOUT_WEIGHT.get(scores.scorer.name, ()):
            result[f"monitor/ceiling/{name}"] = float((mine >= ceiling - _EQUAL).mean())
        several = np.bincount(group) > 1
        if several.any():
            result[f"monitor/group_spread/{name}"] = float((_range(mine, group)[several] > _EQUAL).mean())
        if name not in AGGREGATES and np.abs(mine - total).max() > _EQUAL:
            share = _explained(_deviation(mine, group), _deviation(total, group))
            result |= {} if share is None else {f"monitor/variance_share/{name}": share}
    return result


def _range(values: Array, group: NDArray[np.int64]) -> Array:
    """Largest minus smallest value of each group."""
    high, low = np.full(group.max() + 1, -np.inf), np.full(group.max() + 1, np.inf)
    np.maximum.at(high, group, values)
    np.minimum.at(low, group, values)
    return high - low


def _deviation(values: Array, group: NDArray[np.int64]) -> Array:
    """Values minus the mean of their group."""
    return np.asarray(values - (np.bincount(group, weights=values) / np.bincount(group))[group])


def _explained(x: Array, y: Array) -> float | None:
    """Squared correlation of two deviations; None where one of them is zero throughout."""
    if max(np.abs(x).max(), 0.0) < _EQUAL or np.abs(y).max() < _EQUAL:
        return None
    return float((x @ y) ** 2 / ((x @ x) * (y @ y)))
