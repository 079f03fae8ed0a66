"""At-fault collision, time to collision and red lights of one plan against boxes that move by the clock.

Both collision rules reduce to the first contact of a plan with each agent: however that contact is judged, the
agent is ignored afterwards or the score is settled.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from rewards.kernels.boxes import EGO_HALF_LENGTH_M, EGO_HALF_WIDTH_M, boxes_touch
from rewards.kernels.lanes import MULTIPLE_LANES, NON_DRIVABLE, REAR_AXLE_IN_INTERSECTION
from rewards.kernels.polygons import polygon_touches_box
from rewards.kernels.windows import EGO_RADIUS_M, WINDOW_STEPS, apart

__all__ = [
    "AgentBoxes",
    "RedLights",
    "collision_score",
    "light_bounds",
    "light_score",
    "ttc_score",
]

_STOPPED_MPS = 0.05
_TTC_MIN_MPS = 5e-3
_TTC_STEPS = (0, 3, 6, 9)
_STEP_S = 0.1
_COS_AHEAD = math.cos(math.radians(30.0))
_COS_BEHIND = math.cos(math.radians(150.0))


class AgentBoxes(NamedTuple):
    """A agents over T steps of 0.1 s, in the frame of the road they are judged on."""

    pose: NDArray[np.float64]
    """``[A, T, 4]`` box centre x, y (m), cos and sin of the heading."""
    half_size: NDArray[np.float64]
    """``[A, 2]`` half length, half width (m)."""
    valid: NDArray[np.bool_]
    """``[A, T]`` presence."""
    is_agent: NDArray[np.bool_]
    """``[A]`` vehicle, pedestrian or bicycle; False for static objects."""
    stopped: NDArray[np.bool_]
    """``[A]`` slower than 0.05 m/s at the first sighting: a stopped track for the whole horizon."""
    bounds: NDArray[np.float64]
    """``[A, 4]`` x min, y min, x max, y max that the box never leaves."""
    windows: NDArray[np.float64]
    """``[A, W, 4]`` the same for the steps 9 w … 9 w + 17 (:func:`rewards.kernels.windows.agent_windows`)."""


class RedLights(NamedTuple):
    """R lane connectors on the route that are red at some of T steps."""

    xy: NDArray[np.float64]
    """``[V, 2]`` vertices."""
    offsets: NDArray[np.int64]
    """``[R + 1]``."""
    active: NDArray[np.bool_]
    """``[R, T]`` red at that step."""


@njit(cache=True, nogil=True)
def _touches(
    pose: NDArray[np.float64],
    half_size: NDArray[np.float64],
    a: int,
    t: int,
    x: float,
    y: float,
    cos: float,
    sin: float,
    half_length: float,
) -> bool:
    """Whether agent a at step t touches a box with the ego's width centred at (x, y)."""
    ax, ay = pose[a, t, 0], pose[a, t, 1]
    along, across = half_size[a, 0], half_size[a, 1]
    dx, dy = ax - x, ay - y
    reach = EGO_RADIUS_M + along + across
    if dx * dx + dy * dy > reach * reach:
        return False
    touch: bool = boxes_touch(
        x, y, cos, sin, half_length, EGO_HALF_WIDTH_M, ax, ay, pose[a, t, 2], pose[a, t, 3], along, across
    )
    return touch


@njit(cache=True, nogil=True)
def _bearing(states: NDArray[np.float64], boxes: NDArray[np.float64], k: int, x: float, y: float) -> tuple[bool, bool]:
    """Whether a point is ahead (< 30 deg) and whether behind (> 150 deg), seen from the rear axle at step k."""
    dx, dy = x - states[k, 0], y - states[k, 1]
    along = dx * boxes[k, 2] + dy * boxes[k, 3]
    distance = math.hypot(dx, dy)
    return along > _COS_AHEAD * distance, along < _COS_BEHIND * distance


@njit(cache=True, nogil=True)
def _contact_at_fault(
    pose: NDArray[np.float64],
    half_size: NDArray[np.float64],
    a: int,
    parked: bool,
    states: NDArray[np.float64],
    boxes: NDArray[np.float64],
    k: int,
    area: int,
) -> bool:
    """NAVSIM's order of rules: stopped ego, stopped track (`parked`), rear, front, lateral."""
    if math.hypot(states[k, 3], states[k, 4]) <= _STOPPED_MPS:
        return False
    if parked:
        return True
    if _bearing(states, boxes, k, pose[a, k, 0], pose[a, k, 1])[1]:
        return False
    cos, sin = boxes[k, 2], boxes[k, 3]
    front_x, front_y = boxes[k, 0] + EGO_HALF_LENGTH_M * cos, boxes[k, 1] + EGO_HALF_LENGTH_M * sin
    if _touches(pose, half_size, a, k, front_x, front_y, cos, sin, 0.0):
        return True
    return area & (MULTIPLE_LANES | NON_DRIVABLE) != 0


@njit(cache=True, nogil=True)
def _first_contact(agents: AgentBoxes, a: int, boxes: NDArray[np.float64], windows: NDArray[np.float64]) -> int:
    """First step at which the ego box touches agent a, or -1."""
    pose, half_size, valid = agents.pose, agents.half_size, agents.valid
    last = min(len(boxes), pose.shape[1])
    for w in range(min(len(windows) - 1, agents.windows.shape[1])):
        if apart(agents.windows[a, w], windows[w]):
            continue
        for k in range(WINDOW_STEPS * w, min(WINDOW_STEPS * (w + 1), last)):
            x, y, cos, sin = boxes[k, 0], boxes[k, 1], boxes[k, 2], boxes[k, 3]
            if valid[a, k] and _touches(pose, half_size, a, k, x, y, cos, sin, EGO_HALF_LENGTH_M):
                return k
    return -1


@njit(cache=True, nogil=True)
def collision_score(
    agents: AgentBoxes,
    states: NDArray[np.float64],
    boxes: NDArray[np.float64],
    areas: NDArray[np.uint8],
    windows: NDArray[np.float64],
) -> tuple[float, float]:
    """NC {0, .5, 1} of one plan, and the first step of an at-fault contact (inf: none).

    0 for an at-fault contact with a road user, 0.5 with a static object only.

    Args:
        agents: Who else is there.
        states: ``[K, 11]``.
        boxes: ``[K, 4]`` ego box centre x, y, cos, sin.
        areas: ``[K]`` area bits (:mod:`rewards.kernels.lanes`).
        windows: Of :func:`rewards.kernels.windows.plan_windows`; only speeds up.
    """
    pose, half_size, is_agent = agents.pose, agents.half_size, agents.is_agent
    score, first = 1.0, np.inf
    for a in range(len(pose)):
        if apart(agents.bounds[a], windows[-1]):
            continue
        k = _first_contact(agents, a, boxes, windows)
        if k < 0:
            continue
        parked = agents.stopped[a] or not is_agent[a]
        if _contact_at_fault(pose, half_size, a, parked, states, boxes, k, areas[k]):
            score = min(score, 0.0 if is_agent[a] else 0.5)
            first = min(first, float(k))
    return score, first


@njit(cache=True, nogil=True)
def _first_ttc_hit(
    agents: AgentBoxes,
    a: int,
    boxes: NDArray[np.float64],
    speed: NDArray[np.float64],
    windows: NDArray[np.float64],
    steps: int,
) -> tuple[int, int]:
    """Start step and look-ahead of the first projected contact with agent a, or (-1, 0)."""
    pose, half_size, valid = agents.pose, agents.half_size, agents.valid
    last = min(steps, len(boxes))
    for w in range(min(len(windows) - 1, agents.windows.shape[1])):
        if apart(agents.windows[a, w], windows[w]):
            continue
        for k in range(WINDOW_STEPS * w, min(WINDOW_STEPS * (w + 1), last)):
            if speed[k] < _TTC_MIN_MPS:
                continue
            cos, sin = boxes[k, 2], boxes[k, 3]
            for ahead in _TTC_STEPS:
                t = k + ahead
                if t >= pose.shape[1] or not valid[a, t]:
                    continue
                shift = ahead * _STEP_S * speed[k]
                x, y = boxes[k, 0] + shift * cos, boxes[k, 1] + shift * sin
                if _touches(pose, half_size, a, t, x, y, cos, sin, EGO_HALF_LENGTH_M):
                    return k, ahead
    return -1, 0


@njit(cache=True, nogil=True)
def ttc_score(
    agents: AgentBoxes,
    states: NDArray[np.float64],
    boxes: NDArray[np.float64],
    speed: NDArray[np.float64],
    areas: NDArray[np.uint8],
    windows: NDArray[np.float64],
    steps: int,
) -> tuple[float, float]:
    """TTC {0, 1} of one plan, and the start step of the first failure (inf: none).

    The ego box of step k, moved straight by 0, .3, .6 and .9 s of its speed (forwards also when it reverses), meets the
    agents where they are at that later time. A failure needs the agent ahead, or not behind while the ego is between
    lanes, off the road or in an intersection. Arguments as in :func:`collision_score`; besides, `speed` ``[K]`` (m/s)
    and the number of start steps (41 in v1.1, 32 in v2).
    """
    pose = agents.pose
    score, first = 1.0, np.inf
    for a in range(len(pose)):
        if apart(agents.bounds[a], windows[-1]):
            continue
        k, ahead_steps = _first_ttc_hit(agents, a, boxes, speed, windows, steps)
        if k < 0:
            continue
        t = k + ahead_steps
        ahead, behind = _bearing(states, boxes, k, pose[a, t, 0], pose[a, t, 1])
        exposed = areas[k] & (MULTIPLE_LANES | NON_DRIVABLE | REAR_AXLE_IN_INTERSECTION) != 0
        if ahead or (exposed and not behind):
            score = 0.0
            first = min(first, float(k))
    return score, first


@njit(cache=True, nogil=True)
def light_bounds(lights: RedLights) -> NDArray[np.float64]:
    """Axis-aligned boxes ``[R, 4]`` outside of which no ego box centre lies when its box touches the connector."""
    bounds = np.empty((len(lights.active), 4))
    bounds[:, :2], bounds[:, 2:] = np.inf, -np.inf
    for r in range(len(bounds)):
        for v in range(lights.offsets[r], lights.offsets[r + 1]):
            for d in range(2):
                bounds[r, d] = min(bounds[r, d], lights.xy[v, d] - EGO_RADIUS_M - 1e-6)
                bounds[r, 2 + d] = max(bounds[r, 2 + d], lights.xy[v, d] + EGO_RADIUS_M + 1e-6)
    return bounds


@njit(cache=True, nogil=True)
def light_score(lights: RedLights, bounds: NDArray[np.float64], boxes: NDArray[np.float64]) -> float:
    """TLC {0, 1} of v2: 0 iff the ego box touches a connector while it is red, whichever way it came.

    Args:
        lights: The connectors.
        bounds: Their :func:`light_bounds`; only speeds up.
        boxes: ``[K, 4]`` ego box centre x, y, cos, sin.
    """
    for r in range(len(lights.active)):
        xy = lights.xy[lights.offsets[r] : lights.offsets[r + 1]]
        if len(xy) < 3:
            continue
        for k in range(min(len(boxes), lights.active.shape[1])):
            x, y = boxes[k, 0], boxes[k, 1]
            if not lights.active[r, k] or not (bounds[r, 0] <= x <= bounds[r, 2] and bounds[r, 1] <= y <= bounds[r, 3]):
                continue
            if polygon_touches_box(xy, x, y, boxes[k, 2], boxes[k, 3], EGO_HALF_LENGTH_M, EGO_HALF_WIDTH_M):
                return 0.0
    return 1.0
