"""Pictures are checked by the colour of pixels whose place follows from the window's mapping."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from rlhf_drive.errors import DataError
from rlhf_drive.scenes import Observation, Scene, SceneReference
from rlhf_drive.scenes.picture import (
    AGENT_COLORS,
    EGO,
    PALETTE,
    ROAD,
    ROUTE,
    draw_scene,
    picture_window,
    plan_colors,
)
from rlhf_drive.scenes.picture_parts import OFF_ROAD

SIZE = 400


def rgb(color: str) -> NDArray[np.int64]:
    return np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])


def straight_plan(speed: float, y: float = 0.0) -> NDArray[np.float64]:
    """8 poses straight ahead at `speed` m/s, moved sideways by `y` m."""
    times = 0.5 * np.arange(1, 9)
    return np.stack([speed * times, np.full(8, y), np.zeros(8)], axis=1)


def road_scene(origin: tuple[float, float, float] = (500.0, -200.0, 0.7)) -> Scene:
    """A road 20 m wide along x with its lane in y -2..2, a moving car at (20, 6), and a red light in x 30..34."""
    cos, sin = np.cos(origin[2]), np.sin(origin[2])

    def world(points: list[list[float]]) -> NDArray[np.float64]:
        xy = np.asarray(points, dtype=np.float64)
        return xy @ np.array([[cos, sin], [-sin, cos]]) + np.array(origin[:2])

    road = world([[-100, -10], [200, -10], [200, 10], [-100, 10]])
    lane = world([[-100, -2], [200, -2], [200, 2], [-100, 2]])
    red = world([[30, -8], [34, -8], [34, -4], [30, -4]])
    car = np.tile(np.append(world([[20, 6]])[0], origin[2]), (51, 1))
    car[:, :2] += np.arange(51)[:, None] * 0.1 * 8.0 * np.array([cos, sin])
    ego = np.zeros(11)
    ego[:3], ego[3] = origin, 5.0
    history = np.zeros((4, 8))
    history[:, 0], history[:, 3] = [-7.5, -5.0, -2.5, 0.0], 5.0
    observation = Observation(
        ego_history=history,
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
        human_poses=straight_plan(5.0),
        centerline=np.array([[*world([[-50, 0]])[0], origin[2]], [*world([[400, 0]])[0], origin[2]]]),
        speed_limit=13.0,
        map_xy=np.concatenate([road, lane]),
        map_offsets=[0, 4, 8],
        map_layer=[4, 0],
        map_on_route=[False, True],
        red_xy=red,
        red_offsets=[0, 4],
        red_on_route=[True],
        red_active=np.ones((1, 51)),
        agent_pose=car[None],
        agent_velocity=np.tile(8.0 * np.array([cos, sin]), (1, 51, 1)),
        agent_valid=np.ones((1, 51)),
        agent_size=[[5.0, 2.0]],
        agent_type=[0],
        pdm_reference_v1=np.zeros((0, 3)),
        pdm_reference_v2=np.zeros((0, 3)),
    )
    return Scene("road-1", "straight", "c1", False, observation, reference)


def pixels(scene: Scene, plans: dict[str, NDArray[np.float64]] | None = None, title: str = "") -> NDArray[np.int64]:
    png = draw_scene(scene, plans or {}, size_px=SIZE, title=title)
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), dtype=np.int64)


def color_at(
    scene: Scene, x: float, y: float, plans: dict[str, NDArray[np.float64]] | None = None
) -> NDArray[np.int64]:
    column, row = picture_window(scene, plans or {}).pixel(x, y, SIZE)
    return pixels(scene, plans)[row, column]


def test_layers_lie_where_the_ego_frame_says() -> None:
    scene = road_scene()
    np.testing.assert_array_equal(color_at(scene, 10.0, 13.0), rgb(OFF_ROAD))
    np.testing.assert_array_equal(color_at(scene, 10.0, 8.0), rgb(ROAD))
    np.testing.assert_array_equal(color_at(scene, 10.0, 1.5), rgb(ROUTE))
    np.testing.assert_array_equal(color_at(scene, 1.0, 0.8), rgb(EGO))
    np.testing.assert_array_equal(color_at(scene, 20.0, 6.0), rgb(AGENT_COLORS[0]))


def test_left_is_left_and_forward_is_up() -> None:
    scene = road_scene()
    window = picture_window(scene, {})
    (left, _), (right, _) = window.pixel(0, 5, SIZE), window.pixel(0, -5, SIZE)
    (_, near), (_, far) = window.pixel(0, 0, SIZE), window.pixel(20, 0, SIZE)
    assert left < right
    assert far < near
    # The car stands at y = +6 and nothing at y = -6.
    np.testing.assert_array_equal(color_at(scene, 20.0, -6.0), rgb(ROAD))


def test_red_light_is_red_only_where_it_is() -> None:
    red, green, blue = color_at(road_scene(), 32.0, -6.0)
    assert red > 240
    assert green < 190
    assert blue < 190
    np.testing.assert_array_equal(color_at(road_scene(), 26.0, -6.0), rgb(ROAD))


def test_a_future_box_fades() -> None:
    scene = road_scene()
    # 8 m/s: after 1 s the car is at x = 28, after 2 s at 36 (off the axis of its trail: y = 6.6).
    now, soon, later = (color_at(scene, x, 6.6).sum() for x in (20.0, 28.0, 36.0))
    assert now < soon < later < rgb(ROAD).sum()


def test_a_plan_is_drawn_only_when_given() -> None:
    scene, plan = road_scene(), straight_plan(6.0, y=-5.0)
    with_plan = color_at(scene, 10.5, -5.0, {"sft": plan})
    np.testing.assert_allclose(with_plan, rgb(PALETTE[0]), atol=16)  # the line is antialiased
    np.testing.assert_array_equal(color_at(scene, 10.5, -5.0), rgb(ROAD))


def test_further_samples_are_thin_and_the_first_is_solid() -> None:
    scene = road_scene()
    samples = np.stack([straight_plan(6.0, y=-5.0), straight_plan(6.0, y=7.0)])
    np.testing.assert_allclose(color_at(scene, 10.5, -5.0, {"sft": samples}), rgb(PALETTE[0]), atol=16)
    faint = color_at(scene, 10.5, 7.0, {"sft": samples})
    assert rgb(PALETTE[0]).sum() < faint.sum() < rgb(ROAD).sum()


def test_a_plan_that_is_not_finite_is_left_out() -> None:
    scene = road_scene()
    np.testing.assert_array_equal(pixels(scene, {"bad": np.full((8, 3), np.nan)}), pixels(scene))


def test_the_window_follows_a_long_plan_but_not_without_end() -> None:
    scene = road_scene()
    assert picture_window(scene, {}).side == 50.0
    # 15 m/s for 4 s ends at 60 m: 60 + 14 ahead + 12 behind.
    assert picture_window(scene, {"a": straight_plan(15.0)[None]}).side == pytest.approx(86.0)
    assert picture_window(scene, {"a": straight_plan(200.0)[None]}).side == 140.0


def test_the_picture_does_not_depend_on_where_the_world_frame_lies() -> None:
    here, there = pixels(road_scene()), pixels(road_scene((660_000.0, 4_000_000.0, -2.0)))
    assert np.abs(here - there).max(axis=2).mean() < 0.2


def test_title_and_names_may_hold_any_text() -> None:
    scene = road_scene()
    plans = {"_a$\\frac{$": straight_plan(6.0, y=-5.0)}
    assert not np.array_equal(pixels(scene, plans, title="$\\frac{$ 100 % <b>"), pixels(scene, plans))


def test_a_scene_without_agents_or_lights_is_drawn() -> None:
    scene = road_scene()
    empty = {"agent_pose": np.zeros((0, 51, 3)), "agent_velocity": np.zeros((0, 51, 2))}
    empty |= {"agent_valid": np.zeros((0, 51)), "agent_size": np.zeros((0, 2)), "agent_type": np.zeros(0)}
    empty |= {"red_xy": np.zeros((0, 2)), "red_active": np.zeros((0, 51))}
    bare = replace(
        scene, reference=replace(scene.reference, **empty, red_offsets=np.zeros(1), red_on_route=np.zeros(0))
    )
    np.testing.assert_array_equal(color_at(bare, 20.0, 6.0), rgb(ROAD))


def test_a_plan_of_another_shape_is_refused() -> None:
    with pytest.raises(DataError, match=r"Plan 'sft' must be \[T, 3\]"):
        draw_scene(road_scene(), {"sft": np.zeros((8, 2))})


def test_the_human_is_always_green() -> None:
    assert plan_colors(["sft", "human", "rl"]) == {"human": "#2b8a3e", "sft": PALETTE[0], "rl": PALETTE[1]}
