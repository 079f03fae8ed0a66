"""PDM-Closed, the rule-based planner that NAVSIM normalises ego progress with.

Forecast the others, unroll 15 proposals along the centreline, simulate and score them, take the best (the first on
ties) and carry it on by one second. The result is the path of the driver model, not the simulated one, and there is no
emergency brake. Follows NAVSIM v1.1 and v2.2 `pdm_planner/abstract_pdm_closed_planner.py`; the route search is left
out, the scene supplies the centreline. One planner per scene: NAVSIM's caches share one among scenes and never clear
its set of ignored objects, which makes them depend on the order of processing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rewards.kernels.collisions import AgentBoxes, RedLights
from rewards.kernels.score import Road
from rewards.kernels.simulate import NUM_STATES, interpolate_poses, query_times_us, simulate_references
from rewards.pdm_forecast import build_forecast
from rewards.pdm_leaders import Surroundings, find_surroundings
from rewards.pdm_paths import build_paths
from rewards.pdm_proposals import Proposals, continue_proposal, unroll_proposals
from rewards.pdm_scoring import Version, forecast_agents, forecast_lights, score_proposals
from rewards.prepare import prepare_ego, prepare_road
from rlhf_drive.errors import DataError
from rlhf_drive.scenes import Scene, SceneReference, to_ego_frame, to_world_frame

__all__ = ["PdmClosedPlan", "attach_references", "plan_pdm_closed"]

_FALLBACK_SPEED_MPS = 15.0
_STEP_US = 100_000


@dataclass(frozen=True)
class PdmClosedPlan:
    """The chosen plan and how it came about. World frame; metres, seconds, radians."""

    trajectory: NDArray[np.float64]
    """``[51, 3]`` rear-axle poses every 0.1 s; row 0 is the ego projected onto the chosen path."""
    reference: NDArray[np.float64]
    """``[41, 3]`` the same at NAVSIM's truncated query times: what ego progress is normalised with."""
    proposals: NDArray[np.float64]
    """``[15, 51, 3]`` all proposals, ``5 * path + speed fraction``; 0 after step 40 except for the chosen one."""
    idm: NDArray[np.float64]
    """``[15, 51, 2]`` arclength on the proposal's path and speed."""
    lead: NDArray[np.float64]
    """``[15, 51, 3]`` leader used at each step: arclength, speed, rear length."""
    scores: NDArray[np.float64]
    """``[15]`` the planner's own scores."""
    best: int
    """Index of the chosen proposal."""


@dataclass(frozen=True)
class _Search:
    """All that both versions share: proposals, their simulation, and what they are scored on."""

    reference: SceneReference
    speed_limit: float
    around: Surroundings
    proposals: Proposals
    states: NDArray[np.float64]
    road: Road
    agents: AgentBoxes
    lights: RedLights


def _search(reference: SceneReference) -> _Search:
    """Unroll and simulate the proposals of a scene in its t=0 ego frame."""
    limit = _FALLBACK_SPEED_MPS if np.isnan(reference.speed_limit) else reference.speed_limit
    if not 0.0 < limit < np.inf:
        raise DataError(f"SceneReference.speed_limit must be positive, or NaN where unknown; got {limit} m/s.")
    ego_init = prepare_ego(reference)
    forecast = build_forecast(reference)
    paths = build_paths(to_ego_frame(reference.centerline, reference.ego_init[:3]))
    around = find_surroundings(paths, forecast.shapes, limit)
    proposals = unroll_proposals(around, initial_speed=float(ego_init[3]), speed_limit=limit)
    states = simulate_references(ego_init, proposals.poses[:, :NUM_STATES])
    if not np.isfinite(states).all():
        raise DataError(
            "A proposal of PDM-Closed leads to states that are not finite; look at ego_init and centerline."
        )
    agents, lights = forecast_agents(forecast, reference), forecast_lights(forecast)
    return _Search(reference, limit, around, proposals, states, prepare_road(reference), agents, lights)


def _choose(search: _Search, version: Version) -> PdmClosedPlan:
    """Take the best proposal of a search by the rules of one version."""
    scores = score_proposals(search.road, search.agents, search.lights, search.states, version).total
    best = int(np.argmax(scores))
    chosen = continue_proposal(search.around, search.proposals, best, speed_limit=search.speed_limit)
    world = to_world_frame(chosen.poses, search.reference.ego_init[:3])
    world[np.arange(len(world)) != best, NUM_STATES:] = 0.0
    t0_us = search.reference.t0_us
    times = t0_us + _STEP_US * np.arange(world.shape[1])
    sampled = interpolate_poses(times, world[best : best + 1], query_times_us(t0_us))[0]
    return PdmClosedPlan(world[best], sampled, world, chosen.idm, chosen.lead, scores, best)


def plan_pdm_closed(reference: SceneReference, *, version: Version) -> PdmClosedPlan:
    """The PDM-Closed plan of a scene.

    Args:
        reference: The scene. Of agents and lights only t=0 is read; `pdm_reference_v1` and `pdm_reference_v2` are not.
        version: "v1" for NAVSIM v1.1, "v2" for v2.2: only the scores inside differ, so the choice may.

    Raises:
        DataError: The speed limit is not positive, or the states are not finite.

    Example:
        >>> plan_pdm_closed(scene.reference, version="v1").reference.shape  # doctest: +SKIP
        (41, 3)
    """
    return _choose(_search(reference), version)


def attach_references(scene: Scene) -> Scene:
    """The scene with `pdm_reference_v1` and `pdm_reference_v2` computed; proposals are unrolled once for both.

    Raises:
        DataError: As :func:`plan_pdm_closed`.
    """
    search = _search(scene.reference)
    v1, v2 = (_choose(search, version).reference for version in ("v1", "v2"))
    return scene.with_reference(pdm_reference_v1=v1, pdm_reference_v2=v2)
