"""The picture for a judge: things lie where the observation says, and nothing that only the simulator knows shows."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from rlhf_drive.errors import DataError
from rlhf_drive.scenes import Observation
from rlhf_drive.scenes.observed_picture import draw_observation, observation_window
from rlhf_drive.scenes.picture_parts import AGENT_COLORS, EGO, OFF_ROAD, PALETTE, ROAD, ROUTE

SIZE = 400


def rgb(color: str) -> NDArray[np.int64]:
    return np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])


def observation() -> Observation:
    """Own lane along y = 0 on the route, one along y = 5, and a car at (20, 5) that came from x = 8."""
    agents = np.zeros((1, 4, 5))
    agents[0, :, 0], agents[0, :, 1] = [8.0, 12.0, 16.0, 20.0], 5.0
    return Observation(
        ego_history=np.zeros((4, 8)),
        agents=agents,
        agents_valid=np.ones((1, 4)),
        agents_size=[[5.0, 2.0]],
        agents_type=[0],
        map_xy=[[-50.0, 0.0], [90.0, 0.0], [-50.0, 5.0], [90.0, 5.0]],
        map_offsets=[0, 2, 4],
        map_type=[0, 1],
        map_speed_limit=[0, 0],
        map_on_route=[True, False],
        map_red=[False, False],
        route_xy=np.zeros((0, 2)),
        command=1,
    )


def plan(y: float = 0.0) -> NDArray[np.float64]:
    return np.stack([3.0 * np.arange(1, 9), np.full(8, y), np.zeros(8)], axis=1)


def color_at(seen: Observation, poses: NDArray[np.float64], x: float, y: float) -> NDArray[np.int64]:
    picture = np.asarray(Image.open(io.BytesIO(draw_observation(seen, poses, size_px=SIZE))).convert("RGB"))
    column, row = observation_window(poses).pixel(x, y, SIZE)
    return picture[row, column].astype(np.int64)


def test_everything_lies_where_the_observation_says() -> None:
    seen = observation()
    np.testing.assert_array_equal(color_at(seen, plan(), 20.0, 1.3), rgb(ROUTE))  # half a lane is 1.8 m
    np.testing.assert_array_equal(color_at(seen, plan(), 20.0, -2.5), rgb(OFF_ROAD))
    np.testing.assert_array_equal(color_at(seen, plan(), 30.0, 6.3), rgb(ROAD))
    np.testing.assert_array_equal(color_at(seen, plan(), 20.0, 5.5), rgb(AGENT_COLORS[0]))
    np.testing.assert_array_equal(color_at(seen, plan(), 1.0, 0.8), rgb(EGO))
    np.testing.assert_allclose(color_at(seen, plan(-4.0), 13.5, -4.0), rgb(PALETTE[0]), atol=16)
    np.testing.assert_array_equal(color_at(seen, plan(), 13.5, -4.0), rgb(OFF_ROAD))


def test_red_light_colours_its_lane() -> None:
    red = replace(observation(), map_red=np.array([True, False]))
    free, held = color_at(observation(), plan(), 20.0, 1.3), color_at(red, plan(), 20.0, 1.3)
    assert held[0] - held[1] > 40 + (free[0] - free[1])


def test_the_window_depends_on_the_plan_alone() -> None:
    assert observation_window(plan()).side == 60.0
    long = 3.0 * plan()
    assert observation_window(long).side == pytest.approx(72.0 + 26.0)  # 12 m behind the ego, 14 m ahead of the end


def test_same_input_gives_the_same_bytes() -> None:
    assert draw_observation(observation(), plan()) == draw_observation(observation(), plan())
    assert draw_observation(observation(), plan()) != draw_observation(observation(), plan(0.2))


def test_bare_observation_is_drawn() -> None:
    empty = replace(
        observation(),
        agents=np.zeros((0, 4, 5)), agents_valid=np.zeros((0, 4)), agents_size=np.zeros((0, 2)),
        agents_type=np.zeros(0), map_xy=np.zeros((0, 2)), map_offsets=np.zeros(1), map_type=np.zeros(0),
        map_speed_limit=np.zeros(0), map_on_route=np.zeros(0), map_red=np.zeros(0),
    )  # fmt: skip
    np.testing.assert_array_equal(color_at(empty, plan(), 20.0, 5.5), rgb(OFF_ROAD))


@pytest.mark.parametrize("bad", [np.zeros((8, 2)), np.zeros((0, 3)), np.full((8, 3), np.nan), np.zeros((1, 8, 3))])
def test_plan_that_cannot_be_drawn(bad: NDArray[np.float64]) -> None:
    with pytest.raises(DataError, match=r"must be finite \[T, 3\]"):
        draw_observation(observation(), bad)
