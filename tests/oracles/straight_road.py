"""A hand-made world for tests: a straight road, the ego on it, and whoever the test puts there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rlhf_drive.scenes import AgentType, MapLayer, SceneReference

ROAD_START_M = -20.0


def agent(
    x: float,
    y: float = 0.0,
    heading: float = 0.0,
    *,
    velocity: tuple[float, float] = (0.0, 0.0),
    size: tuple[float, float] = (4.0, 2.0),
    kind: AgentType = AgentType.VEHICLE,
) -> tuple[NDArray[np.float64], AgentType]:
    """One road user at t=0: x, y, heading, vx, vy, length, width; and its type."""
    return np.array([x, y, heading, *velocity, *size]), kind


def rectangle(x0: float, x1: float, y0: float, y1: float) -> NDArray[np.float64]:
    """Corners ``[4, 2]`` of an upright rectangle."""
    return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])


def straight_road(
    agents: Sequence[tuple[NDArray[np.float64], AgentType]] = (),
    *,
    red: Sequence[NDArray[np.float64]] = (),
    ego_speed: float = 10.0,
    speed_limit: float = 10.0,
    length: float = 500.0,
    spacing: float = 1.0,
    half_width: float = 6.0,
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0),
) -> SceneReference:
    """A lane along +x from `ROAD_START_M` to `length` with the ego's rear axle at the origin, t=0 frame.

    Agents keep their t=0 velocity for 51 steps. All coordinates are then moved to the world pose `origin`.
    """
    cos, sin = np.cos(origin[2]), np.sin(origin[2])
    rotation = np.array([[cos, sin], [-sin, cos]])

    def world(xy: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(xy @ rotation + origin[:2])

    rows = np.array([row for row, _ in agents]).reshape(-1, 7)
    velocity = rows[:, 3:5] @ rotation
    time = 0.1 * np.arange(51)[:, None]
    centres = world(rows[:, :2])[:, None] + velocity[:, None] * time
    headings = np.broadcast_to(rows[:, 2, None, None] + origin[2], (len(rows), 51, 1))
    x = np.arange(ROAD_START_M, length + spacing / 2, spacing)
    line = np.concatenate([world(np.stack([x, 0.0 * x], axis=1)), np.full((len(x), 1), origin[2])], axis=1)
    ego = np.array([*origin, ego_speed, *np.zeros(7)])
    road = world(rectangle(ROAD_START_M - 20, length + 50, -half_width, half_width))
    return SceneReference(
        t0_us=10_000_000,
        ego_init=ego,
        prev_t0_us=9_500_000,
        prev_ego_init=ego,
        past_times_us=np.array([8_500_000, 9_000_000, 9_500_000, 10_000_000]),
        past_states=np.tile(ego, (4, 1)),
        human_poses=np.zeros((8, 3)),
        centerline=line,
        speed_limit=speed_limit,
        map_xy=np.concatenate([road, road]),
        map_offsets=np.array([0, 4, 8]),
        map_layer=np.array([MapLayer.LANE, MapLayer.ROADBLOCK]),
        map_on_route=np.array([True, False]),
        red_xy=world(np.concatenate([np.zeros((0, 2)), *red])),
        red_offsets=np.cumsum([0, *(len(polygon) for polygon in red)]),
        red_on_route=np.ones(len(red), dtype=np.bool_),
        red_active=np.ones((len(red), 51), dtype=np.bool_),
        agent_pose=np.concatenate([centres, headings], axis=-1),
        agent_velocity=np.broadcast_to(velocity[:, None], (len(rows), 51, 2)),
        agent_valid=np.ones((len(rows), 51), dtype=np.bool_),
        agent_size=rows[:, 5:],
        agent_type=np.array([kind for _, kind in agents], dtype=np.int8),
        pdm_reference_v1=np.zeros((0, 3)),
        pdm_reference_v2=np.zeros((0, 3)),
    )
