"""Which scenes are usable: the progress reference is added, known planners are scored, and bad scenes are refused."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from rewards.epdms import score_epdms
from rewards.pdm_closed import attach_references
from rewards.pdms import score_pdms
from rewards.prepare import prepare_scene
from rewards.prepare_epdms import prepare_epdms
from rlhf_drive.errors import DataError
from rlhf_drive.scenes import NUM_POSES, POSE_DT_S, Scene, SceneReference, to_ego_frame
from rlhf_drive.scenes.importers.recorded import Refused

__all__ = ["CHALLENGING", "Judged", "judge", "judge_imported"]

CHALLENGING = 0.8
"""A scene is challenging if constant velocity scores below this and the human does not."""


@dataclass(frozen=True)
class Judged:
    """A scene with its reference, and what known planners score on it."""

    scene: Scene
    """With progress references and the challenging flag."""
    scores: dict[str, float]
    """Score by planner: human (where the scene holds the human's drive), pdm_closed, constant_velocity, stand_still."""
    metric: str = "pdms"
    """What it is: `pdms`, or `epdms` where only NAVSIM v2.2's reference is known."""


def judge(scene: Scene, *, min_human_pdms: float) -> Judged | Refused:
    """Add PDM-Closed's progress reference, score known planners, and refuse what the human fails on.

    Refused: NC or DAC of the human below 1, no human progress, or human PDMS below `min_human_pdms`.
    """
    try:
        scene = attach_references(scene)
        plans = _known_plans(scene.reference, scene.reference.pdm_reference_v1)
        result = score_pdms(prepare_scene(scene.reference), np.stack(list(plans.values())))
    except DataError as error:
        return Refused(scene.token, str(error))
    if not result.valid[0]:
        return Refused(scene.token, "the human plan cannot be scored")
    if result.nc[0] < 1 or result.dac[0] < 1 or result.ep[0] <= 0:
        return Refused(scene.token, "the human collides, leaves the road or makes no progress")
    if result.pdms[0] < min_human_pdms:
        return Refused(scene.token, f"the human scores {result.pdms[0]:.2f} PDMS, less than {min_human_pdms}")
    return _judged(scene, dict(zip(plans, result.pdms.tolist(), strict=True)), "pdms")


def judge_imported(scene: Scene, *, min_human_score: float) -> Judged | Refused:
    """Score known planners on a scene that brings its own progress reference, as NAVSIM's metric caches do.

    The reference is taken as it is, of whichever version it is; the other version's stays empty, since a cache does not
    hold what it would need. Refused: what cannot be scored, or a human below `min_human_score`. The human's collisions
    are no reason: the benchmark counts such scenes.
    """
    reference = scene.reference
    metric = "pdms" if len(reference.pdm_reference_v1) else "epdms"
    try:
        if metric == "pdms":
            plans = _known_plans(reference, reference.pdm_reference_v1)
            values = score_pdms(prepare_scene(reference), np.stack(list(plans.values()))).pdms
        else:
            plans = _known_plans(reference, reference.pdm_reference_v2)
            human_filter = "on" if "human" in plans else "off"
            prepared = prepare_epdms(reference)
            values = score_epdms(prepared, np.stack(list(plans.values())), human_filter=human_filter).epdms
    except DataError as error:
        return Refused(scene.token, str(error))
    scores = dict(zip(plans, values.tolist(), strict=True))
    if "human" in scores and not scores["human"] >= min_human_score:
        return Refused(scene.token, f"the human scores {scores['human']:.2f} {metric.upper()}, not {min_human_score}")
    return _judged(scene, scores, metric)


def _known_plans(reference: SceneReference, closed: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """``[8, 3]`` plans by planner."""
    straight = np.zeros((NUM_POSES, 3))
    straight[:, 0] = max(float(reference.ego_init[3]), 0.0) * POSE_DT_S * np.arange(1, NUM_POSES + 1)
    plans = {"human": reference.human_poses} if len(reference.human_poses) else {}
    plans["pdm_closed"] = to_ego_frame(closed[5::5], reference.ego_init[:3])
    return plans | {"constant_velocity": straight, "stand_still": np.zeros((NUM_POSES, 3))}


def _judged(scene: Scene, scores: dict[str, float], metric: str) -> Judged:
    hard = "human" in scores and scores["constant_velocity"] < CHALLENGING <= scores["human"]
    return Judged(replace(scene, challenging=hard), scores, metric)
