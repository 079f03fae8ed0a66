"""PDMS of NAVSIM v1.1: ``NC * DAC * (5 EP + 5 TTC + 2 C) / 12`` of planned trajectories."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rewards.kernels.score import V1_RULES, StateMetrics, score_states
from rewards.kernels.simulate import resample_plan, simulate_references
from rewards.prepare import PreparedScene, ReferencePlan
from rlhf_drive.errors import DataError
from rlhf_drive.scenes import NUM_POSES

__all__ = ["PdmsResult", "ego_progress", "score_pdms", "score_states"]

_LOW_PROGRESS_M = 5.0


@dataclass(frozen=True)
class PdmsResult:
    """Scores of B plans in one scene, each in [0, 1]; NaN in every float where `valid` is False."""

    valid: NDArray[np.bool_]
    """``[B]`` False for a plan with a value that is not finite, or whose simulation overflows."""
    nc: NDArray[np.float64]
    """``[B]`` no at-fault collision, {0, .5, 1}."""
    dac: NDArray[np.float64]
    """``[B]`` drivable area compliance, {0, 1}."""
    ep: NDArray[np.float64]
    """``[B]`` ego progress relative to PDM-Closed."""
    ttc: NDArray[np.float64]
    """``[B]`` time to collision, {0, 1}."""
    c: NDArray[np.float64]
    """``[B]`` comfort, {0, 1}."""
    ddc: NDArray[np.float64]
    """``[B]`` driving direction compliance, {0, .5, 1}; reported, weight 0 in v1.1."""
    pdms: NDArray[np.float64]
    """``[B]`` the score."""
    progress_m: NDArray[np.float64]
    """``[B]`` metres along the centreline, before any multiplier."""
    first_fault_step: NDArray[np.float64]
    """``[B]`` step (0.1 s) of the first at-fault contact; inf if none."""
    first_ttc_step: NDArray[np.float64]
    """``[B]`` start step of the first TTC failure; inf if none."""
    comfort: NDArray[np.bool_]
    """``[B, 6]`` the single comfort bounds (`rewards.kernels.comfort.COMFORT_TESTS`)."""
    states: NDArray[np.float64]
    """``[B, 41, 11]`` simulated states in the t=0 ego frame."""


def ego_progress(metrics: StateMetrics, reference: ReferencePlan) -> NDArray[np.float64]:
    """EP ``[B]`` of v1.1: progress times NC times DAC, relative to the larger of the plan's own and the reference's.

    If neither gets beyond 5 m it is 1, or 0 for a plan with NC or DAC 0. Each plan meets the reference alone: other
    plans of the batch play no part.
    """
    own = metrics.progress_m * metrics.nc * metrics.dac
    most = np.maximum(own, reference.progress_m * reference.nc * reference.dac)
    stuck = np.where(metrics.nc * metrics.dac == 0.0, 0.0, 1.0)
    far = most > _LOW_PROGRESS_M
    progress = np.where(far, own / np.where(far, most, 1.0), stuck)
    return np.where(metrics.valid, progress, np.nan)


def score_pdms(prepared: PreparedScene, poses_BT3: NDArray[np.floating]) -> PdmsResult:
    """Score plans in one scene. Rows do not influence each other; the heavy parts release the GIL.

    Args:
        prepared: The scene.
        poses_BT3: ``[B, 8, 3]`` rear-axle poses in the t=0 ego frame at 0.5 … 4.0 s.

    Raises:
        DataError: The shape is wrong. Values that are not finite make their row invalid instead.

    Example:
        >>> result = score_pdms(prepare_scene(scene.reference), poses_BT3)  # doctest: +SKIP
        >>> result.pdms  # doctest: +SKIP
        array([0.93, 0.41])
    """
    poses = np.asarray(poses_BT3, dtype=np.float64)
    if poses.ndim != 3 or poses.shape[1:] != (NUM_POSES, 3):
        raise DataError(f"Plans must be [B, {NUM_POSES}, 3] (x, y, heading at 2 Hz); got shape {list(poses.shape)}.")
    with np.errstate(invalid="ignore", over="ignore"):
        references = resample_plan(prepared.ego_init, prepared.t0_us, poses)
    states = simulate_references(prepared.ego_init, references)
    metrics = score_states(prepared.road, prepared.agents, states, rules=V1_RULES)
    ep = ego_progress(metrics, prepared.reference)
    return PdmsResult(
        valid=metrics.valid,
        nc=metrics.nc,
        dac=metrics.dac,
        ep=ep,
        ttc=metrics.ttc,
        c=metrics.c,
        ddc=metrics.ddc,
        pdms=metrics.nc * metrics.dac * (5.0 * ep + 5.0 * metrics.ttc + 2.0 * metrics.c) / 12.0,
        progress_m=metrics.progress_m,
        first_fault_step=metrics.first_fault_step,
        first_ttc_step=metrics.first_ttc_step,
        comfort=metrics.comfort,
        states=states,
    )
