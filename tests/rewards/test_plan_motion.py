"""How plans move: hand-made plans with known heading change, curvature and jerk."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from rewards.plan_motion import MOTION, human_plan, motion_ratio, pdm_closed_plan, reach_m, reversing
from rlhf_drive.scenes import Scene
from rlhf_drive.scenes.generator import generate_scenes

TIMES = 0.5 * np.arange(1, 9)


@pytest.fixture(scope="module")
def scene() -> Scene:
    return next(iter(generate_scenes(1, seed=11)))


def straight(distance: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> NDArray[np.float64]:
    plan = np.zeros((1, 8, 3))
    plan[0, :, 0] = distance(TIMES)
    return plan


def circle(speed: float, yaw_rate: float) -> NDArray[np.float64]:
    turn = yaw_rate * TIMES
    radius = speed / yaw_rate
    return np.stack([radius * np.sin(turn), radius * (1.0 - np.cos(turn)), turn], axis=1)[None]


def value(name: str, plans: NDArray[np.float64]) -> float:
    return float(MOTION[name].function(plans)[0])


def test_last_step_that_goes_back_reverses() -> None:
    plans = np.zeros((4, 8, 3))
    plans[:, :, 0] = np.arange(1, 9)
    plans[1, -1, 0] = 6.9
    plans[2, -1, 0] = 6.96
    # Drives along -x with heading pi.
    plans[3, :, 0], plans[3, :, 2] = -np.arange(1, 9), np.pi
    assert reversing(plans).tolist() == [False, True, False, False]


def test_reach_is_the_farthest_pose_not_the_last() -> None:
    plan = straight(lambda t: np.where(t < 3.0, t, 0.0))
    assert reach_m(plan)[0] == 2.5


def test_circle_has_its_curvature_and_heading_change() -> None:
    plan = circle(6.0, 0.3)
    assert value("heading_change", plan) == pytest.approx(1.2)
    # Eight chords of 2 r sin(0.075) = 2.99719 m instead of arcs of 3 m.
    assert value("curvature", plan) == pytest.approx(0.3 * 4 / (8 * 2 * 20.0 * np.sin(0.075)), rel=1e-12)
    assert value("lateral_jerk", plan) == pytest.approx(0.0, abs=1e-9)
    assert value("longitudinal_jerk", plan) == pytest.approx(0.0, abs=1e-9)


def test_heading_change_goes_the_short_way_round() -> None:
    plan = np.zeros((1, 8, 3))
    plan[0, :, 2] = [3.1, -3.1, 3.1, -3.1, 3.1, -3.1, 3.1, -3.1]
    assert value("heading_change", plan) == pytest.approx(3.1 + 7 * (2 * np.pi - 6.2))


def test_turning_on_the_spot_counts_as_two_metres_of_path() -> None:
    plan = np.zeros((1, 8, 3))
    plan[0, :, 2] = 0.05 * np.arange(1, 9)
    assert value("curvature", plan) == pytest.approx(0.4 / 2.0)


def test_longitudinal_jerk_of_a_cubic_is_its_third_derivative() -> None:
    # x = t³ / 6 x 1.2: the third difference of a cubic is exactly jerk dt³.
    assert value("longitudinal_jerk", straight(lambda t: 5.0 * t + 0.2 * t**3)) == pytest.approx(1.2)
    assert value("longitudinal_jerk", straight(lambda t: 5.0 * t + 0.8 * t**2)) == pytest.approx(0.0, abs=1e-9)


def test_lateral_jerk_of_a_growing_turn() -> None:
    # Steps of 2 m, heading changes 0.01 k: lateral acceleration 4 m/s x 0.02 k rad/s rises by 0.08 per 0.5 s.
    plan = np.zeros((1, 8, 3))
    plan[0, :, 0] = 2.0 * np.arange(1, 9)
    plan[0, :, 2] = np.cumsum(0.01 * np.arange(1, 9))
    assert value("lateral_jerk", plan) == pytest.approx(0.16)


def test_ratio_compares_clipped_means_above_a_floor() -> None:
    quantity = MOTION["heading_change"]
    human = np.zeros((2, 8, 3))
    human[:, :, 2] = 0.1
    plans = np.zeros((2, 8, 3))
    plans[0, :, 2] = 0.4
    # The second plan turns by 21 rad, which counts as pi.
    plans[1, ::2, 2] = 3.0
    assert motion_ratio(quantity, plans, human) == pytest.approx(((0.4 + np.pi) / 2 + 0.02) / (0.1 + 0.02))
    assert motion_ratio(quantity, human, human) == 1.0
    assert motion_ratio(quantity, human, np.zeros((2, 8, 3))) == pytest.approx(0.12 / 0.02)


def test_references_of_a_scene_and_their_absence(scene: Scene) -> None:
    bare = scene.with_reference(human_poses=np.zeros((0, 3)), pdm_reference_v1=np.zeros((0, 3)))
    assert human_plan(bare) is None
    assert pdm_closed_plan(bare) is None
    human = human_plan(scene)
    assert human is not None
    np.testing.assert_array_equal(human, scene.reference.human_poses)


@pytest.mark.parametrize("version", ["pdm_reference_v1", "pdm_reference_v2"])
def test_pdm_closed_is_read_every_half_second_in_the_ego_frame(scene: Scene, version: str) -> None:
    x, y, heading = scene.reference.ego_init[:3]
    ahead = 0.3 * np.arange(41)
    states = np.stack([x + ahead * np.cos(heading), y + ahead * np.sin(heading), np.full(41, heading)], axis=1)
    empty = {"pdm_reference_v1": np.zeros((0, 3)), "pdm_reference_v2": np.zeros((0, 3))}
    plan = pdm_closed_plan(scene.with_reference(**(empty | {version: states})))
    assert plan is not None
    np.testing.assert_allclose(plan, np.stack([1.5 * np.arange(1, 9), np.zeros(8), np.zeros(8)], axis=1), atol=1e-9)
