"""PDM-Closed's own score of its proposals: the scorer's sub-metrics on the planner's forecast, not on the log.

Follows NAVSIM `pdm_planner/scoring/pdm_scorer.py` with its default configuration, batch = the 15 proposals. v1.1 and
v2.2 differ here and nowhere else in the planner. Frame: ego rear axle at t=0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rewards.kernels.collisions import AgentBoxes, RedLights
from rewards.kernels.score import V1_RULES, V2_RULES, Road, StateMetrics, score_states
from rewards.pdm_forecast import Forecast
from rewards.prepare import prepare_agents
from rlhf_drive.scenes import REFERENCE_STEPS, SceneReference

__all__ = ["ProposalScores", "Version", "forecast_agents", "forecast_lights", "score_proposals"]

Version = Literal["v1", "v2"]
"""NAVSIM v1.1 or v2.2."""
_LOW_PROGRESS_M = 5.0


@dataclass(frozen=True)
class ProposalScores:
    """How the planner rates its proposals."""

    total: NDArray[np.float64]
    """``[15]`` the score the best proposal maximises, 0..1."""
    ep: NDArray[np.float64]
    """``[15]`` progress relative to the best proposal, 0..1."""
    metrics: StateMetrics
    """The sub-metrics; comfort and lane keeping only where the version uses them."""


def forecast_agents(forecast: Forecast, reference: SceneReference) -> AgentBoxes:
    """Collision boxes of the kept objects at 10 Hz, without those the planner ignores.

    Each sample is held for two steps, so a box is up to 0.1 s late.
    """
    held = np.arange(REFERENCE_STEPS) // 2
    counted = ~forecast.shapes.ignored[: len(forecast.agent)]
    rows = forecast.agent[counted]
    velocity = reference.agent_velocity[rows]
    return prepare_agents(
        forecast.pose[counted][:, held],
        velocity,
        np.ones(velocity.shape[:2], dtype=np.bool_),
        reference.agent_size[rows],
        reference.agent_type[rows],
        np.zeros(3),
    )


def forecast_lights(forecast: Forecast) -> RedLights:
    """On-route connectors red at t=0, red throughout; also one that holds the ego, which TLC does not forgive."""
    shapes, agents = forecast.shapes, len(forecast.agent)
    active = np.ones((len(forecast.red_row), REFERENCE_STEPS), dtype=np.bool_)
    start = shapes.offsets[agents]
    vertices = np.ascontiguousarray(shapes.vertices[0, start:])
    return RedLights(vertices, np.ascontiguousarray(shapes.offsets[agents:] - start), active)


def score_proposals(
    road: Road, agents: AgentBoxes, lights: RedLights, states: NDArray[np.float64], version: Version
) -> ProposalScores:
    """Rate simulated proposals against each other.

    v1: ``NC DAC (5 EP + 5 TTC + 2 C) / 12``, EP from progress times NC times DAC; when nobody gets beyond 5 m, EP is
    1, or 0 with NC or DAC 0. v2: ``NC DAC DDC TLC (5 EP + 5 TTC + 2 LK + 2) / 14``, EP from the unmasked progress
    relative to the best masked one, clipped; when nobody gets beyond 5 m, EP is 1. History comfort is 1 in v2: the
    planner passes no history.

    Args:
        road: Map and un-offset centreline.
        agents: The forecast (:func:`forecast_agents`).
        lights: Red connectors (:func:`forecast_lights`).
        states: ``[15, 41, 11]`` simulated proposals.
        version: Whose rules.
    """
    if version == "v1":
        metrics = score_states(road, agents, states, rules=V1_RULES)
        factor = metrics.nc * metrics.dac
        progress = metrics.progress_m * factor
        stuck = np.where(factor == 0.0, 0.0, 1.0)
        weighted, weights = 5.0 * metrics.ttc + 2.0 * metrics.c, 12.0
    else:
        metrics = score_states(road, agents, states, rules=V2_RULES, lights=lights)
        factor = metrics.nc * metrics.dac * metrics.ddc * metrics.tlc
        progress = metrics.progress_m
        stuck = np.ones(len(states))
        weighted, weights = 5.0 * metrics.ttc + 2.0 * metrics.lk + 2.0, 14.0
    most = (metrics.progress_m * factor).max()
    ep = np.clip(progress / most, 0.0, 1.0) if most > _LOW_PROGRESS_M else stuck
    return ProposalScores(factor * (5.0 * ep + weighted) / weights, ep, metrics)
