"""A scene made ready for EPDMS: what v2.2 needs beyond the road, and what the human and PDM-Closed achieve in it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rewards.kernels.boxes import EGO_HALF_LENGTH_M, EGO_HALF_WIDTH_M, REAR_AXLE_TO_CENTER_M, boxes_touch
from rewards.kernels.collisions import AgentBoxes, RedLights
from rewards.kernels.score import V2_RULES, Road, StateMetrics, score_states
from rewards.kernels.simulate import NUM_STATES, resample_plan, simulate_references
from rewards.prepare import prepare_agents, prepare_ego, prepare_lights, prepare_road
from rlhf_drive.errors import DataError
from rlhf_drive.scenes import SceneReference, to_ego_frame

__all__ = ["HumanScores", "PreparedEpdms", "PreviousFrame", "prepare_epdms", "prepare_history", "prepare_traffic"]

_HISTORY_STEP_US = 100_000
_LONGEST_PAST_US = 10_000_000


@dataclass(frozen=True)
class HumanScores:
    """What the human driver achieves alone in the scene. HC and EP are 1 by construction and left out."""

    nc: float
    """No at-fault collision, {0, .5, 1}."""
    dac: float
    """Drivable area compliance, {0, 1}."""
    ddc: float
    """Driving direction compliance, {0, .5, 1}."""
    tlc: float
    """Traffic light compliance, {0, 1}."""
    ttc: float
    """Time to collision, {0, 1}."""
    lk: float
    """Lane keeping, {0, 1}."""


@dataclass(frozen=True)
class PreviousFrame:
    """The ego when the previous plan was made."""

    t0_us: int
    """Its time (microseconds)."""
    ego_init: NDArray[np.float64]
    """``[11]`` its state in its own frame: the pose is 0, 0, 0."""


@dataclass(frozen=True)
class PreparedEpdms:
    """All that EPDMS needs of one scene, float64, in the t=0 ego frame (rear axle, x forward, y left)."""

    road: Road
    """Map polygons and centreline."""
    agents: AgentBoxes
    """Logged road users over 41 steps, without those that touch the ego at t=0."""
    lights: RedLights
    """Red connectors on the route."""
    ego_init: NDArray[np.float64]
    """``[11]`` ego state at t=0; its pose is 0, 0, 0."""
    t0_us: int
    """Time of t=0 (microseconds)."""
    history: NDArray[np.float64]
    """``[H, 3]`` heading, ax, ay of the past every 0.1 s (:func:`prepare_history`)."""
    previous: PreviousFrame | None
    """The previous frame; None if the scene does not know it."""
    human: HumanScores | None
    """The human alone; None if the scene holds no human plan."""
    reference_progress_m: float
    """Progress of PDM-Closed of v2.2 times its NC, DAC, DDC and TLC: the other half of the pair that EP compares."""


def prepare_traffic(reference: SceneReference) -> AgentBoxes:
    """Logged agents of the first 41 steps, without any whose box touches the ego box at t=0 (static ones too).

    This is NAVSIM v2.2's non-reactive log replay. Such an agent is absent for the whole horizon.
    """
    valid = reference.agent_valid[:, :NUM_STATES]
    local, half_size = to_ego_frame(reference.agent_pose[:, 0], reference.ego_init[:3]), reference.agent_size / 2.0
    ego = (REAR_AXLE_TO_CENTER_M, 0.0, 1.0, 0.0, EGO_HALF_LENGTH_M, EGO_HALF_WIDTH_M)
    kept = np.asarray(valid.any(axis=1))
    for a in np.flatnonzero(valid[:, 0]):
        x, y, heading = (float(v) for v in local[a])
        kept[a] = not boxes_touch(*ego, x, y, math.cos(heading), math.sin(heading), half_size[a, 0], half_size[a, 1])
    return prepare_agents(
        reference.agent_pose[kept, :NUM_STATES],
        reference.agent_velocity[kept, :NUM_STATES],
        valid[kept],
        reference.agent_size[kept],
        reference.agent_type[kept],
        reference.ego_init[:3],
    )


def prepare_history(reference: SceneReference) -> NDArray[np.float64]:
    """Heading, ax, ay ``[H, 3]`` of the logged past, every 0.1 s from its first time, without the last sample.

    NAVSIM takes ``arange(start, end, 0.1 s)``, which leaves out the end, and then drops one more: of a log that spans
    1.5 s it uses 14 samples, -1.5 … -0.2 s, and the sample at -0.1 s is missing. Of one a few microseconds longer it
    uses 15. Headings are relative to t=0 and continuous.

    Raises:
        DataError: The scene has no past, or its times do not rise, or do not lead up to t=0 within 10 s.
    """
    if len(reference.past_states) < 2:
        raise DataError(
            f"EPDMS needs the logged past for history comfort (HC): SceneReference.past_states must be [4, 11]; got "
            f"shape {list(reference.past_states.shape)}. Import the scene with its history, or score PDMS."
        )
    times = reference.past_times_us
    if (np.diff(times) <= 0).any():
        raise DataError(f"SceneReference.past_times_us must rise; got {times.tolist()}.")
    span, late = int(times[-1] - times[0]), abs(int(times[-1]) - reference.t0_us)
    if late >= _HISTORY_STEP_US or not 2 * _HISTORY_STEP_US < span < _LONGEST_PAST_US:
        raise DataError(
            f"SceneReference.past_times_us must lead up to t0_us within {_LONGEST_PAST_US * 1e-6:g} s; got "
            f"{(times - reference.t0_us).tolist()} us relative to it. Give both from one clock."
        )
    query = np.arange(times[0], times[-1], _HISTORY_STEP_US, dtype=np.int64)[:-1]
    at, known = (query - times[0]).astype(np.float64), (times - times[0]).astype(np.float64)
    heading = np.unwrap(reference.past_states[:, 2] - reference.ego_init[2])
    columns = (heading, reference.past_states[:, 5], reference.past_states[:, 6])
    return np.ascontiguousarray(np.stack([np.interp(at, known, column) for column in columns], axis=1))


def _check_reference(reference: SceneReference) -> None:
    if reference.pdm_reference_v2.shape != (NUM_STATES, 3):
        raise DataError(
            f"SceneReference.pdm_reference_v2 must be [{NUM_STATES}, 3] to normalise ego progress; got shape "
            f"{list(reference.pdm_reference_v2.shape)}. Compute it with rewards.pdm_closed.attach_references, "
            "or, for a NAVSIM metric cache, import the cache of v2.2."
        )


def _multiplied_progress(metrics: StateMetrics) -> float:
    if not metrics.valid[0]:
        raise DataError("SceneReference.pdm_reference_v2 leads to simulated states that are not finite.")
    return float((metrics.progress_m * metrics.nc * metrics.dac * metrics.ddc * metrics.tlc)[0])


def _human_scores(metrics: StateMetrics) -> HumanScores:
    if not metrics.valid[0]:
        raise DataError("SceneReference.human_poses leads to simulated states that are not finite.")
    return HumanScores(*(float(getattr(metrics, name)[0]) for name in ("nc", "dac", "ddc", "tlc", "ttc", "lk")))


def prepare_epdms(reference: SceneReference, *, road: Road | None = None) -> PreparedEpdms:
    """Everything of a scene that does not depend on the plan.

    The previous frame and the human plan may be missing: scoring says so if it needs them.

    Args:
        reference: The scene.
        road: Its road, where :func:`rewards.prepare.prepare_road` has made it already.

    Raises:
        DataError: `past_states` is missing, or `pdm_reference_v2` has not been computed yet or cannot be simulated.
    """
    _check_reference(reference)
    origin = reference.ego_init[:3]
    road = prepare_road(reference) if road is None else road
    agents, lights, ego_init = prepare_traffic(reference), prepare_lights(reference), prepare_ego(reference)
    plans = [to_ego_frame(reference.pdm_reference_v2, origin)]
    if len(reference.human_poses):
        plans.append(resample_plan(ego_init, reference.t0_us, reference.human_poses[None])[0])
    achieved = [
        score_states(road, agents, simulate_references(ego_init, plan[None]), rules=V2_RULES, lights=lights)
        for plan in plans
    ]
    previous = None
    if len(reference.prev_ego_init):
        before = reference.prev_ego_init.copy()
        before[:3] = 0.0
        previous = PreviousFrame(reference.prev_t0_us, before)
    return PreparedEpdms(
        road=road,
        agents=agents,
        lights=lights,
        ego_init=ego_init,
        t0_us=reference.t0_us,
        history=prepare_history(reference),
        previous=previous,
        human=_human_scores(achieved[1]) if len(achieved) > 1 else None,
        reference_progress_m=_multiplied_progress(achieved[0]),
    )
