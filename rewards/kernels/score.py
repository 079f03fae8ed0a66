"""NAVSIM's sub-metrics of simulated states: one call that releases the GIL for B plans on one road."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from rewards.kernels.boxes import REAR_AXLE_TO_CENTER_M
from rewards.kernels.collisions import (
    AgentBoxes,
    RedLights,
    collision_score,
    light_bounds,
    light_score,
    ttc_score,
)
from rewards.kernels.comfort import comfort_tests
from rewards.kernels.lanes import (
    CENTER_IN_INTERSECTION,
    NON_DRIVABLE,
    direction_score,
    ego_areas,
    ego_points,
    keeps_lane,
)
from rewards.kernels.polygons import PolygonIndex, locate
from rewards.kernels.progress import nearest, segment_groups
from rewards.kernels.simulate import NUM_STATES, STATE_SIZE
from rewards.kernels.windows import plan_windows
from rlhf_drive.errors import DataError

__all__ = ["NO_LIGHTS", "V1_RULES", "V2_RULES", "Road", "ScoreRules", "StateMetrics", "score_states"]


class Road(NamedTuple):
    """The static part of a scene, in its t=0 ego frame (metres)."""

    polygons: PolygonIndex
    """Map polygons."""
    centerline: NDArray[np.float64]
    """``[C, 2]`` the polyline along which progress counts."""
    arclength: NDArray[np.float64]
    """``[C]`` cumulative length at its vertices."""


NO_LIGHTS = RedLights(np.zeros((0, 2)), np.zeros(1, dtype=np.int64), np.zeros((0, NUM_STATES), dtype=np.bool_))
"""A scene without a red light on the route."""


@dataclass(frozen=True)
class ScoreRules:
    """Where NAVSIM v1.1 and v2.2 judge the same states differently."""

    ttc_steps: int
    """Number of start steps of TTC: 41 (v1.1) or 32 (v2.2)."""
    direction_in_intersections: bool
    """Whether DDC counts steps with the box centre in an intersection (v1.1) or not (v2.2)."""
    lane_keeping: bool
    """Whether LK is computed; it is 1 otherwise."""
    comfort: bool
    """Whether the comfort of v1.1 is computed; it is 1 otherwise."""


V1_RULES = ScoreRules(ttc_steps=41, direction_in_intersections=True, lane_keeping=False, comfort=True)
"""NAVSIM v1.1."""
V2_RULES = ScoreRules(ttc_steps=32, direction_in_intersections=False, lane_keeping=True, comfort=False)
"""NAVSIM v2.2."""


@dataclass(frozen=True)
class StateMetrics:
    """Sub-metrics of B simulated plans; NaN in every float where `valid` is False."""

    valid: NDArray[np.bool_]
    """``[B]`` whether all states are finite."""
    nc: NDArray[np.float64]
    """``[B]`` no at-fault collision, {0, .5, 1}."""
    dac: NDArray[np.float64]
    """``[B]`` drivable area compliance, {0, 1}."""
    ddc: NDArray[np.float64]
    """``[B]`` driving direction compliance, {0, .5, 1}."""
    ttc: NDArray[np.float64]
    """``[B]`` time to collision, {0, 1}."""
    c: NDArray[np.float64]
    """``[B]`` comfort of v1.1, {0, 1}."""
    tlc: NDArray[np.float64]
    """``[B]`` traffic light compliance, {0, 1}."""
    lk: NDArray[np.float64]
    """``[B]`` lane keeping, {0, 1}."""
    progress_m: NDArray[np.float64]
    """``[B]`` metres along the centreline between first and last step, >= 0, before any multiplier."""
    first_fault_step: NDArray[np.float64]
    """``[B]`` step (0.1 s) of the first at-fault contact; inf if none."""
    first_ttc_step: NDArray[np.float64]
    """``[B]`` start step of the first TTC failure; inf if none."""
    comfort: NDArray[np.bool_]
    """``[B, 6]`` the single bounds (`COMFORT_TESTS`)."""
    areas: NDArray[np.uint8]
    """``[B, 41]`` area bits (:mod:`rewards.kernels.lanes`)."""


@njit(cache=True, nogil=True)
def _score(
    road: Road,
    agents: AgentBoxes,
    lights: RedLights,
    states: NDArray[np.float64],
    ttc_steps: int,
    ignored: int,
    lane_keeping: bool,
    comfortable: bool,
    values: NDArray[np.float64],
    comfort: NDArray[np.bool_],
    areas: NDArray[np.uint8],
    valid: NDArray[np.bool_],
) -> None:
    """Rows of `values`: nc, dac, ddc, ttc, c, tlc, lk, progress_m, first fault step, first TTC step."""
    flags = road.polygons.flags
    groups = segment_groups(road.centerline)
    light_boxes = light_bounds(lights)
    corners = np.zeros(len(flags), dtype=np.int64)
    points = np.empty((6 * states.shape[1], 2))
    found = np.empty((len(points), road.polygons.depth), dtype=np.int64)
    count = np.empty(len(points), dtype=np.int64)
    boxes = np.empty((states.shape[1], 4))
    speed = np.empty(states.shape[1])
    for b in range(len(states)):
        plan = states[b]
        valid[b] = np.isfinite(plan).all()
        if not valid[b]:
            values[:, b] = np.nan
            continue
        for k in range(len(plan)):
            cos, sin = math.cos(plan[k, 2]), math.sin(plan[k, 2])
            boxes[k, 0] = plan[k, 0] + REAR_AXLE_TO_CENTER_M * cos
            boxes[k, 1] = plan[k, 1] + REAR_AXLE_TO_CENTER_M * sin
            boxes[k, 2], boxes[k, 3] = cos, sin
            speed[k] = math.hypot(plan[k, 3], plan[k, 4])
        ego_points(plan, boxes, points)
        locate(road.polygons, points, found, count)
        ego_areas(flags, found, count, corners, areas[b])
        on_road = True
        for k in range(len(plan)):
            on_road = on_road and not areas[b, k] & NON_DRIVABLE
        windows = plan_windows(boxes, speed)
        values[0, b], values[8, b] = collision_score(agents, plan, boxes, areas[b], windows)
        values[1, b] = 1.0 if on_road else 0.0
        values[2, b] = direction_score(boxes, areas[b], ignored)
        values[3, b], values[9, b] = ttc_score(agents, plan, boxes, speed, areas[b], windows, ttc_steps)
        if comfortable:
            comfort_tests(plan, comfort[b])
        else:
            comfort[b] = True
        values[4, b] = 1.0 if comfort[b].all() else 0.0
        values[5, b] = light_score(lights, light_boxes, boxes)
        keeps = not lane_keeping or keeps_lane(boxes, areas[b], road.centerline, groups)
        values[6, b] = 1.0 if keeps else 0.0
        start = nearest(road.centerline, road.arclength, groups, boxes[0, 0], boxes[0, 1])[0]
        end = nearest(road.centerline, road.arclength, groups, boxes[-1, 0], boxes[-1, 1])[0]
        values[7, b] = max(end - start, 0.0)


def score_states(
    road: Road,
    agents: AgentBoxes,
    states_BK11: NDArray[np.float64],
    *,
    rules: ScoreRules = V1_RULES,
    lights: RedLights = NO_LIGHTS,
) -> StateMetrics:
    """Sub-metrics of simulated plans, each judged alone (progress is not normalised here).

    Args:
        road: Map and centreline, t=0 ego frame.
        agents: Other road users in the same frame: the log, or a forecast. Steps beyond their last one hold nobody.
        states_BK11: ``[B, 41, 11]`` simulated states in the same frame.
        rules: Version of the rules.
        lights: Red connectors on the route, for TLC.

    Raises:
        DataError: The states do not have 41 steps of 11 values.
    """
    states = np.ascontiguousarray(states_BK11, dtype=np.float64)
    if states.ndim != 3 or states.shape[1:] != (NUM_STATES, STATE_SIZE):
        raise DataError(f"Simulated states must be [B, {NUM_STATES}, {STATE_SIZE}]; got shape {states.shape}.")
    rows = len(states)
    values = np.empty((10, rows))
    comfort = np.zeros((rows, 6), dtype=np.bool_)
    areas = np.zeros((rows, NUM_STATES), dtype=np.uint8)
    valid = np.zeros(rows, dtype=np.bool_)
    ignored = 0 if rules.direction_in_intersections else CENTER_IN_INTERSECTION
    options = (rules.ttc_steps, ignored, rules.lane_keeping, rules.comfort)
    _score(road, agents, lights, states, *options, values, comfort, areas, valid)
    nc, dac, ddc, ttc, c, tlc, lk, progress_m, fault, ttc_step = values
    return StateMetrics(valid, nc, dac, ddc, ttc, c, tlc, lk, progress_m, fault, ttc_step, comfort, areas)
