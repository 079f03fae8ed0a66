"""EPDMS of NAVSIM v2.2: ``NC * DAC * DDC * TLC * (5 EP + 5 TTC + 2 LK + 2 HC + 2 EC) / 16`` of planned trajectories."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rewards.kernels.comfort_v2 import FRAME_LIMITS, frame_differences, history_comfort
from rewards.kernels.score import V2_RULES, StateMetrics, score_states
from rewards.kernels.simulate import NUM_STATES, STATE_SIZE, STEP_S, resample_plan, simulate_references
from rewards.prepare_epdms import HumanScores, PreparedEpdms, prepare_epdms
from rewards.two_frame import GAP_LIMIT_US, frame_offset
from rlhf_drive.errors import DataError
from rlhf_drive.scenes import NUM_POSES

__all__ = ["EpdmsResult", "PreparedEpdms", "combine_epdms", "prepare_epdms", "score_epdms"]

Columns = Mapping[str, NDArray[np.float64]]
_LOW_PROGRESS_M = 5.0
_FILTERED = ("nc", "dac", "ddc", "tlc", "ttc", "lk")


@dataclass(frozen=True)
class EpdmsResult:
    """Scores of B plans in one scene, each in [0, 1]; NaN in every float where `valid` is False.

    The sub-scores are after the human penalty filter where it is on.
    """

    valid: NDArray[np.bool_]
    """``[B]`` False for a plan (or previous plan) with a value that is not finite, or whose simulation overflows."""
    nc: NDArray[np.float64]
    """``[B]`` no at-fault collision, {0, .5, 1}."""
    dac: NDArray[np.float64]
    """``[B]`` drivable area compliance, {0, 1}."""
    ddc: NDArray[np.float64]
    """``[B]`` driving direction compliance, {0, .5, 1}."""
    tlc: NDArray[np.float64]
    """``[B]`` traffic light compliance, {0, 1}."""
    ep: NDArray[np.float64]
    """``[B]`` ego progress relative to PDM-Closed, 0..1."""
    ttc: NDArray[np.float64]
    """``[B]`` time to collision, {0, 1}."""
    lk: NDArray[np.float64]
    """``[B]`` lane keeping, {0, 1}."""
    hc: NDArray[np.float64]
    """``[B]`` comfort of the logged past and the plan together, {0, 1}."""
    ec: NDArray[np.float64]
    """``[B]`` extended comfort relative to the plan of the previous frame, {0, 1}; NaN without one."""
    epdms: NDArray[np.float64]
    """``[B]`` the score; without a plan of the previous frame, EC and its weight are left out."""
    raw: Columns
    """Every column above but `valid`, ``[B]`` each, before the human filter."""
    ec_rms: NDArray[np.float64]
    """``[B, 4]`` root mean squares behind EC, against `rewards.kernels.comfort_v2.FRAME_LIMITS`; NaN without EC."""
    history_comfort: NDArray[np.bool_]
    """``[B, 6]`` the single bounds of HC (`rewards.kernels.comfort.COMFORT_TESTS`)."""
    progress_m: NDArray[np.float64]
    """``[B]`` metres along the centreline, before any multiplier."""
    first_fault_step: NDArray[np.float64]
    """``[B]`` step (0.1 s) of the first at-fault contact; inf if none."""
    first_ttc_step: NDArray[np.float64]
    """``[B]`` start step of the first TTC failure; inf if none."""
    states: NDArray[np.float64]
    """``[B, 41, 11]`` simulated states in the t=0 ego frame."""
    previous_states: NDArray[np.float64]
    """``[B, 41, 11]`` those of the previous plans, in the ego frame of that time; ``[0, 41, 11]`` without any."""


class _Frames(NamedTuple):
    """The comparison with the previous frame: EC ``[B]``, its RMS ``[B, 4]``, the previous states, their validity."""

    ec: NDArray[np.float64]
    rms: NDArray[np.float64]
    states: NDArray[np.float64]
    valid: NDArray[np.bool_]


def combine_epdms(columns: Columns, *, with_ec: bool) -> NDArray[np.float64]:
    """EPDMS ``[B]`` from its columns.

    Args:
        columns: nc, dac, ddc, tlc, ep, ttc, lk, hc, and ec where it counts; ``[B]`` each.
        with_ec: Whether EC counts: the weights add up to 16 with it and to 14 without.
    """
    product = columns["nc"] * columns["dac"] * columns["ddc"] * columns["tlc"]
    weighted = 5.0 * columns["ep"] + 5.0 * columns["ttc"] + 2.0 * columns["lk"] + 2.0 * columns["hc"]
    if with_ec:
        return product * (weighted + 2.0 * columns["ec"]) / 16.0
    return product * weighted / 14.0


def _plans(poses: NDArray[np.floating], name: str) -> NDArray[np.float64]:
    plans = np.asarray(poses, dtype=np.float64)
    if plans.ndim != 3 or plans.shape[1:] != (NUM_POSES, 3):
        raise DataError(f"{name} must be [B, {NUM_POSES}, 3] (x, y, heading at 2 Hz); got shape {list(plans.shape)}.")
    return plans


def _simulate(ego_init: NDArray[np.float64], t0_us: int, plans: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore", over="ignore"):
        references = resample_plan(ego_init, t0_us, plans)
    return simulate_references(ego_init, references)


def _ego_progress(metrics: StateMetrics, reference_m: float) -> NDArray[np.float64]:
    """EP of v2: the plan's own unmasked progress over the larger masked one of the pair; 1 if neither passes 5 m."""
    own = metrics.progress_m * metrics.nc * metrics.dac * metrics.ddc * metrics.tlc
    most = np.maximum(own, reference_m)
    far = most > _LOW_PROGRESS_M
    progress = np.where(far, np.clip(metrics.progress_m / np.where(far, most, 1.0), 0.0, 1.0), 1.0)
    return np.where(metrics.valid, progress, np.nan)


def _frame_offset(prepared: PreparedEpdms) -> int:
    """Steps between the two frames."""
    if prepared.previous is None:
        raise DataError(
            "A plan of the previous frame was given, but the scene lacks SceneReference.prev_ego_init, the ego state "
            "of that frame. Import the scene with it, or score without the previous plan."
        )
    gap_us = prepared.t0_us - prepared.previous.t0_us
    offset = frame_offset(gap_us)
    if offset == 0:
        raise DataError(
            f"SceneReference.prev_t0_us lies {gap_us * 1e-6:g} s before t0_us; extended comfort (EC) compares frames "
            f"that are at least one step of {STEP_S:g} s and less than {GAP_LIMIT_US * 1e-6:g} s apart. Score "
            "without the previous plan."
        )
    return offset


def _compare_frames(
    prepared: PreparedEpdms, states: NDArray[np.float64], previous_BT3: NDArray[np.floating] | None
) -> _Frames:
    rows = len(states)
    if previous_BT3 is None:
        nothing = np.empty((0, NUM_STATES, STATE_SIZE))
        return _Frames(np.full(rows, np.nan), np.full((rows, 4), np.nan), nothing, np.ones(rows, dtype=np.bool_))
    plans = _plans(previous_BT3, "Plans of the previous frame")
    if len(plans) != rows:
        raise DataError(f"Every plan needs one of the previous frame; got {rows} plans and {len(plans)} previous ones.")
    offset = _frame_offset(prepared)
    assert prepared.previous is not None
    before = _simulate(prepared.previous.ego_init, prepared.previous.t0_us, plans)
    rms = np.empty((rows, len(FRAME_LIMITS)))
    frame_differences(states, before, offset, rms)
    ec = np.where((rms <= np.array(FRAME_LIMITS)).all(axis=1), 1.0, 0.0)
    finite = np.asarray(np.isfinite(before).all(axis=(1, 2)))
    return _Frames(ec, rms, before, finite)


def _forgive(raw: dict[str, NDArray[np.float64]], human: HumanScores | None) -> dict[str, NDArray[np.float64]]:
    """The columns with every sub-score 1 in which the human has exactly 0."""
    if human is None:
        raise DataError(
            "The human penalty filter needs SceneReference.human_poses, which this scene lacks. Set "
            'human_filter="off", or import the scene with its human plan.'
        )
    forgiven = {name: np.ones_like(raw[name]) for name in _FILTERED if getattr(human, name) == 0.0}
    return raw | forgiven


def score_epdms(
    prepared: PreparedEpdms,
    poses_BT3: NDArray[np.floating],
    previous_BT3: NDArray[np.floating] | None = None,
    *,
    human_filter: str = "on",
) -> EpdmsResult:
    """Score plans in one scene. Rows do not influence each other; the heavy parts release the GIL.

    Args:
        prepared: The scene.
        poses_BT3: ``[B, 8, 3]`` rear-axle poses in the t=0 ego frame at 0.5 … 4.0 s.
        previous_BT3: ``[B, 8, 3]`` the plans of the previous frame (about 0.5 s earlier), in the ego frame of that
            time. None leaves EC and its weight out for every row.
        human_filter: ``"on"`` sets sub-scores to 1 in which the human has 0; ``"off"`` does not;
            ``"pre_2025_09_29"`` does, but aggregates what they were before, as NAVSIM did until that day.

    Raises:
        DataError: A shape or `human_filter` is wrong, the filter is on and the scene has no human plan, or previous
            plans are given and the scene does not know that frame. Values that are not finite make their row invalid.

    Example:
        >>> result = score_epdms(prepare_epdms(scene.reference), poses_BT3, previous_BT3)  # doctest: +SKIP
        >>> result.epdms  # doctest: +SKIP
        array([0.91, 0.38])
    """
    if human_filter not in ("on", "off", "pre_2025_09_29"):
        raise DataError(f"human_filter must be 'on', 'off' or 'pre_2025_09_29'; got {human_filter!r}.")
    states = _simulate(prepared.ego_init, prepared.t0_us, _plans(poses_BT3, "Plans"))
    metrics = score_states(prepared.road, prepared.agents, states, rules=V2_RULES, lights=prepared.lights)
    tests = np.zeros((len(states), 6), dtype=np.bool_)
    history_comfort(prepared.history, states, tests)
    frames = _compare_frames(prepared, states, previous_BT3)
    valid = metrics.valid & frames.valid
    raw = {name: getattr(metrics, name) for name in _FILTERED}
    raw |= {"ep": _ego_progress(metrics, prepared.reference_progress_m), "hc": tests.all(axis=1).astype(np.float64)}
    raw |= {"ec": frames.ec}
    with_ec = previous_BT3 is not None
    raw["epdms"] = combine_epdms(raw, with_ec=with_ec)
    columns = raw if human_filter == "off" else _forgive(raw, prepared.human)
    if human_filter == "on":
        columns["epdms"] = combine_epdms(columns, with_ec=with_ec)
    masked = {name: np.where(valid, values, np.nan) for name, values in columns.items()}
    return EpdmsResult(
        valid=valid,
        **masked,
        raw={name: np.where(valid, values, np.nan) for name, values in raw.items()},
        ec_rms=np.where(valid[:, None], frames.rms, np.nan),
        history_comfort=tests & valid[:, None],
        progress_m=np.where(valid, metrics.progress_m, np.nan),
        first_fault_step=np.where(valid, metrics.first_fault_step, np.nan),
        first_ttc_step=np.where(valid, metrics.first_ttc_step, np.nan),
        states=states,
        previous_states=frames.states,
    )
