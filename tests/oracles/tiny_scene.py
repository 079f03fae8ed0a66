"""Tiny scenes in which every score can be worked out by hand."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rewards.prepare import PreparedScene, prepare_scene
from rlhf_drive.scenes import AgentType, MapLayer, SceneReference, to_world_frame

WORLD = np.array([1000.0, -200.0, 0.7])
"""World pose of the ego: not the identity, so that a forgotten change of frame shows."""

FRONT_M, REAR_M, HALF_WIDTH_M = 4.049, 1.127, 1.1485
"""Rear axle to front and rear bumper, half width."""

Polygon = tuple[MapLayer, bool, list[tuple[float, float]]]


def rectangle(x0: float, x1: float, y0: float, y1: float) -> list[tuple[float, float]]:
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


ROUTE_LANE: Polygon = (MapLayer.LANE, True, rectangle(-50, 150, -2, 2))
LEFT_LANE: Polygon = (MapLayer.LANE, False, rectangle(-50, 150, 2, 6))
ROAD: Polygon = (MapLayer.ROADBLOCK, False, rectangle(-50, 150, -2, 6))
TWO_LANES: list[Polygon] = [ROUTE_LANE, LEFT_LANE, ROAD]
"""Own lane |y| < 2 on the route, a lane 2 < y < 6 off the route, a road block under both."""


@dataclass(frozen=True)
class Agent:
    """A box in the ego frame, moving straight at constant velocity or as `path` says."""

    x: float = 0.0
    y: float = 0.0
    vx: float = 0.0
    vy: float = 0.0
    kind: AgentType = AgentType.VEHICLE
    length: float = 4.0
    width: float = 2.0
    seen: tuple[int, ...] = tuple(range(51))
    path: NDArray[np.float64] | None = None
    first_speed: float | None = None

    def poses(self) -> NDArray[np.float64]:
        if self.path is not None:
            return self.path
        t = 0.1 * np.arange(51)
        return np.stack([self.x + self.vx * t, self.y + self.vy * t, np.zeros(51)], axis=1)


def straight_reference(speed: float) -> NDArray[np.float64]:
    """``[41, 3]`` reference along +x."""
    poses = np.zeros((41, 3))
    poses[:, 0] = speed * 0.1 * np.arange(41)
    return poses


def straight_plan(speed: float, y: float = 0.0) -> NDArray[np.float64]:
    """``[8, 3]`` plan along +x."""
    poses = np.zeros((8, 3))
    poses[:, 0] = speed * 0.5 * np.arange(1, 9)
    poses[:, 1] = y
    return poses


def straight_states(speed: float, y: float = 0.0) -> NDArray[np.float64]:
    """``[1, 41, 11]`` simulated states that drive exactly along +x."""
    states = np.zeros((1, 41, 11))
    states[0, :, 0] = speed * 0.1 * np.arange(41)
    states[0, :, 1] = y
    states[0, :, 3] = speed
    return states


def make_reference(
    *,
    polygons: list[Polygon] | None = None,
    agents: list[Agent] | None = None,
    speed: float = 10.0,
    pdm_speed: float = 10.0,
    red: list[list[tuple[float, float]]] | None = None,
) -> SceneReference:
    polygons = TWO_LANES if polygons is None else polygons
    agents = agents or []
    red = red or []
    ego = np.zeros(11)
    ego[:3] = WORLD
    ego[3] = speed

    def world_xy(xy: list[tuple[float, float]]) -> NDArray[np.float64]:
        local = np.array([(*point, 0.0) for point in xy]).reshape(-1, 3)
        return to_world_frame(local, WORLD)[:, :2]

    velocity = np.zeros((len(agents), 51, 2))
    valid = np.zeros((len(agents), 51), dtype=bool)
    for a, agent in enumerate(agents):
        velocity[a] = agent.vx, agent.vy
        valid[a, list(agent.seen)] = True
        if agent.first_speed is not None:
            velocity[a, agent.seen[0]] = agent.first_speed, 0.0
    centerline = np.zeros((43, 3))
    centerline[:, 0] = np.arange(-20.0, 410.0, 10.0)
    return SceneReference(
        t0_us=10_000_000,
        ego_init=ego,
        prev_t0_us=9_500_000,
        prev_ego_init=ego,
        past_times_us=np.array([8_500_000, 9_000_000, 9_500_000, 10_000_000]),
        past_states=np.tile(ego, (4, 1)),
        human_poses=straight_plan(speed),
        centerline=to_world_frame(centerline, WORLD),
        speed_limit=15.0,
        map_xy=np.concatenate([world_xy(xy) for _, _, xy in polygons]),
        map_offsets=np.cumsum([0, *(len(xy) for _, _, xy in polygons)]),
        map_layer=np.array([layer for layer, _, _ in polygons]),
        map_on_route=np.array([on_route for _, on_route, _ in polygons]),
        red_xy=np.concatenate([np.zeros((0, 2)), *(world_xy(xy) for xy in red)]),
        red_offsets=np.cumsum([0, *(len(xy) for xy in red)]),
        red_on_route=np.ones(len(red), dtype=bool),
        red_active=np.ones((len(red), 51), dtype=bool),
        agent_pose=to_world_frame(np.array([a.poses() for a in agents]).reshape(-1, 51, 3), WORLD),
        agent_velocity=velocity,
        agent_valid=valid,
        agent_size=np.array([(a.length, a.width) for a in agents]).reshape(-1, 2),
        agent_type=np.array([a.kind for a in agents], dtype=np.int8),
        pdm_reference_v1=to_world_frame(straight_reference(pdm_speed), WORLD),
        pdm_reference_v2=np.zeros((0, 3)),
    )


def make_scene(**options: object) -> PreparedScene:
    """Prepared scene; options of :func:`make_reference`."""
    return prepare_scene(make_reference(**options))  # type: ignore[arg-type]
