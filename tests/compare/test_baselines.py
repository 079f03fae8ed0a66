from __future__ import annotations

import numpy as np
import pytest

from rlhf_drive.compare.baselines import BASELINES, baseline_planners
from rlhf_drive.errors import DataError, UnknownNameError


def test_constant_velocity_goes_straight_on(make_scene) -> None:
    poses = BASELINES["constant_velocity"]([make_scene("a", speed=4.0), make_scene("b", speed=10.0)]).poses
    np.testing.assert_allclose(poses[0, :, 0], [2, 4, 6, 8, 10, 12, 14, 16])
    np.testing.assert_allclose(poses[1, -1], [40.0, 0.0, 0.0])


def test_constant_velocity_never_goes_back(make_scene) -> None:
    np.testing.assert_array_equal(BASELINES["constant_velocity"]([make_scene(speed=-3.0)]).poses, np.zeros((1, 8, 3)))


def test_stand_still_stays(make_scene) -> None:
    np.testing.assert_array_equal(BASELINES["stand_still"]([make_scene()]).poses, np.zeros((1, 8, 3)))


def test_human_is_the_recorded_drive(make_scene) -> None:
    scenes = [make_scene("a", speed=3.0), make_scene("b", speed=7.0)]
    trajectories = BASELINES["human"](scenes)
    np.testing.assert_array_equal(trajectories.poses[1], scenes[1].reference.human_poses)
    np.testing.assert_array_equal(trajectories.scene_index, [0, 1])


def test_pdm_closed_takes_every_fifth_row_into_the_ego_frame(make_scene) -> None:
    scene = make_scene(origin=(100.0, 50.0, np.pi / 2))
    # The ego looks along world +y; per row the reference drives 0.2 m along +y and 0.1 m along -x, which is left.
    rows = np.arange(41)
    world = np.stack([100.0 - 0.1 * rows, 50.0 + 0.2 * rows, np.full(41, np.pi / 2 + 0.1)], axis=1)
    poses = BASELINES["pdm_closed"]([scene.with_reference(pdm_reference_v1=world)]).poses[0]
    np.testing.assert_allclose(poses[0], [1.0, 0.5, 0.1], atol=1e-12)
    np.testing.assert_allclose(poses[-1], [8.0, 4.0, 0.1], atol=1e-12)


def test_pdm_closed_without_a_reference_names_the_scene(make_scene) -> None:
    with pytest.raises(DataError, match=r"Scene 'x7' holds no PDM-Closed reference"):
        BASELINES["pdm_closed"]([make_scene("x7")])


def test_planners_keep_their_order_and_plan_alike(make_scene) -> None:
    planners = baseline_planners(["stand_still", "human"])
    assert [planner.name for planner in planners] == ["stand_still", "human"]
    scene = make_scene(speed=2.0)
    np.testing.assert_array_equal(planners[1].plan([scene]).poses[0], scene.reference.human_poses)


def test_an_unknown_baseline_is_answered_with_a_near_one() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'stand_still'"):
        baseline_planners(["human", "standstill"])
