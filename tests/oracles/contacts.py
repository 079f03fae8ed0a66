"""NC and TTC as NAVSIM goes about it: step by step, token by token, with shapely and a list of ignored tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import shapely
from numpy.typing import NDArray

from oracles.tiny_scene import Agent
from rewards.kernels.lanes import MULTIPLE_LANES, NON_DRIVABLE, REAR_AXLE_IN_INTERSECTION
from rlhf_drive.scenes import AgentType

EGO = (1.461, 2.588, 1.1485)
"""Rear axle to centre, half length, half width."""


def outline(x: float, y: float, heading: float, half_length: float, half_width: float) -> shapely.Polygon:
    """An oriented box."""
    cos, sin = math.cos(heading), math.sin(heading)
    sides = ((1, 1), (-1, 1), (-1, -1), (1, -1))
    return shapely.Polygon(
        [
            (x + i * half_length * cos - j * half_width * sin, y + i * half_length * sin + j * half_width * cos)
            for i, j in sides
        ]
    )


def ego_outline(state: NDArray[np.float64], ahead_m: float = 0.0) -> shapely.Polygon:
    """The ego's box, moved forward by some metres."""
    reach = EGO[0] + ahead_m
    x, y = state[0] + reach * math.cos(state[2]), state[1] + reach * math.sin(state[2])
    return outline(x, y, state[2], EGO[1], EGO[2])


def agent_outline(agent: Agent, step: int) -> shapely.Polygon:
    """An agent's box at a step."""
    x, y, heading = agent.poses()[step]
    return outline(x, y, heading, agent.length / 2, agent.width / 2)


def bearing_deg(state: NDArray[np.float64], shape: shapely.Polygon) -> float:
    """Angle between the ego's heading and the way from its rear axle to a shape's centroid."""
    dx, dy = shape.centroid.x - state[0], shape.centroid.y - state[1]
    cosine = (dx * math.cos(state[2]) + dy * math.sin(state[2])) / math.hypot(dx, dy)
    return math.degrees(math.acos(min(max(cosine, -1.0), 1.0)))


def first_speed(agent: Agent) -> float:
    return math.hypot(agent.vx, agent.vy) if agent.first_speed is None else agent.first_speed


def collisions(states: NDArray[np.float64], areas: NDArray[np.uint8], agents: Sequence[Agent]) -> tuple[float, float]:
    """NC and the first at-fault step of ``[41, 11]`` states."""
    score, first, ignored = 1.0, math.inf, set[int]()
    for t, state in enumerate(states):
        ego = ego_outline(state)
        corners = np.asarray(ego.exterior.coords)
        front = shapely.LineString([corners[0], corners[3]])
        for a, agent in enumerate(agents):
            if a in ignored or t not in agent.seen or not ego.intersects(shape := agent_outline(agent, t)):
                continue
            if math.hypot(state[3], state[4]) <= 0.05:
                at_fault = False
            elif agent.kind == AgentType.STATIC or first_speed(agent) <= 0.05:
                at_fault = True
            elif bearing_deg(state, shape) > 150.0:
                at_fault = False
            elif front.intersects(shape):
                at_fault = True
            else:
                at_fault = bool(areas[t] & (MULTIPLE_LANES | NON_DRIVABLE))
            if at_fault:
                score, first = min(score, 0.5 if agent.kind == AgentType.STATIC else 0.0), min(first, t)
            else:
                ignored.add(a)
    return score, first


def times_to_collision(
    states: NDArray[np.float64], areas: NDArray[np.uint8], agents: Sequence[Agent], steps: int
) -> tuple[float, float]:
    """TTC and the first failing start step of ``[41, 11]`` states."""
    score, first, ignored = 1.0, math.inf, set[int]()
    for t in range(steps):
        state = states[t]
        speed = math.hypot(state[3], state[4])
        if speed < 5e-3:
            continue
        for f in (0, 3, 6, 9):
            ego = ego_outline(state, 0.1 * f * speed)
            for a, agent in enumerate(agents):
                if a in ignored or t + f not in agent.seen:
                    continue
                if not ego.intersects(shape := agent_outline(agent, t + f)):
                    continue
                angle = bearing_deg(state, shape)
                exposed = areas[t] & (MULTIPLE_LANES | NON_DRIVABLE | REAR_AXLE_IN_INTERSECTION)
                if angle < 30.0 or (exposed and angle <= 150.0):
                    score, first = 0.0, min(first, t)
                else:
                    ignored.add(a)
    return score, first
