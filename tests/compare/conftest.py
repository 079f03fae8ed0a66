"""A hand-made scene, and stand-ins for policies and the reward service."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from rlhf_drive.scenes import Observation, Scene, SceneReference

MakeScene = Callable[..., Scene]


def _scene(
    token: str = "a",
    *,
    kind: str = "straight",
    cluster: str | None = None,
    challenging: bool = False,
    speed: float = 5.0,
    origin: tuple[float, float, float] = (500.0, -200.0, 0.7),
) -> Scene:
    """A wide empty road; the ego stands at `origin` and the human goes on at `speed`."""
    cos, sin = np.cos(origin[2]), np.sin(origin[2])
    road = np.array([[-100.0, -10.0], [200.0, -10.0], [200.0, 10.0], [-100.0, 10.0]])
    ego = np.zeros(11)
    ego[:3], ego[3] = origin, speed
    human = np.zeros((8, 3))
    human[:, 0] = 0.5 * speed * np.arange(1, 9)
    observation = Observation(
        ego_history=np.zeros((4, 8)),
        agents=np.zeros((0, 4, 5)),
        agents_valid=np.zeros((0, 4)),
        agents_size=np.zeros((0, 2)),
        agents_type=np.zeros(0),
        map_xy=np.array([[-50.0, 0.0], [80.0, 0.0]]),
        map_offsets=[0, 2],
        map_type=[0],
        map_speed_limit=[13.0],
        map_on_route=[True],
        map_red=[False],
        route_xy=np.array([[0.0, 0.0], [80.0, 0.0]]),
        command=1,
    )
    reference = SceneReference(
        t0_us=2_000_000,
        ego_init=ego,
        prev_t0_us=1_500_000,
        prev_ego_init=ego,
        past_times_us=[500_000, 1_000_000, 1_500_000, 2_000_000],
        past_states=np.tile(ego, (4, 1)),
        human_poses=human,
        centerline=np.array([[origin[0], origin[1], origin[2]], [origin[0] + cos, origin[1] + sin, origin[2]]]),
        speed_limit=13.0,
        map_xy=road @ np.array([[cos, sin], [-sin, cos]]) + np.array(origin[:2]),
        map_offsets=[0, 4],
        map_layer=[4],
        map_on_route=[False],
        red_xy=np.zeros((0, 2)),
        red_offsets=[0],
        red_on_route=np.zeros(0),
        red_active=np.zeros((0, 51)),
        agent_pose=np.zeros((0, 51, 3)),
        agent_velocity=np.zeros((0, 51, 2)),
        agent_valid=np.zeros((0, 51)),
        agent_size=np.zeros((0, 2)),
        agent_type=np.zeros(0),
        pdm_reference_v1=np.zeros((0, 3)),
        pdm_reference_v2=np.zeros((0, 3)),
    )
    return Scene(token, kind, cluster or token, challenging, observation, reference)


@pytest.fixture
def make_scene() -> MakeScene:
    return _scene
