"""Plans as text: to the bit and back, and what is no plan is refused by name; a prompt holds the observation alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rewards.plan_text import format_plan, parse_plan, scene_prompt
from rlhf_drive.errors import DataError
from rlhf_drive.scenes import Observation
from rlhf_drive.scenes.generator import generate_scenes


def test_plan_is_written_with_four_digits_and_no_negative_zero() -> None:
    poses = np.array([[2.5, -0.00004, 0.0], [12.34567, -100.0, -3.14159265]])
    assert format_plan(poses) == "2.5000 0.0000 0.0000; 12.3457 -100.0000 -3.1416"


def test_reading_gives_what_was_written_to_the_bit() -> None:
    poses = np.random.default_rng(0).normal(scale=50.0, size=(200, 8, 3))
    for plan in poses:
        text = format_plan(plan)
        read = parse_plan(text)
        np.testing.assert_array_equal(read, np.round(plan, 4) + 0.0)
        assert format_plan(read) == text
    assert np.abs(np.round(poses, 4) - poses).max() <= 0.5000001e-4


def test_spaces_digits_and_a_last_semicolon_are_free() -> None:
    text = " 1 2 3 ;\n+4.5   -6.25\t0.123456789 ;  "
    assert parse_plan(text, num_poses=2).tolist() == [[1.0, 2.0, 3.0], [4.5, -6.25, 0.123456789]]


ONE = "1.0 0.0 0.0"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "Pose 1 of the plan has 0 numbers"),
        ("I would brake.", "Pose 1 of the plan holds 'I'"),
        ("; ".join([ONE] * 7), "The plan has 7 poses; write 8"),
        ("; ".join([ONE] * 9), "The plan has 9 poses; write 8"),
        ("; ".join([ONE] * 8) + ";;", "Pose 9 of the plan has 0 numbers"),
        ("; ".join([*[ONE] * 7, "1.0 0.0"]), "Pose 8 of the plan has 2 numbers"),
        ("; ".join([*[ONE] * 7, "1.0 0.0 0.0 0.0"]), "Pose 8 of the plan has 4 numbers"),
        ("; ".join([*[ONE] * 7, "1.0 nan 0.0"]), "Pose 8 of the plan holds 'nan'"),
        ("; ".join([*[ONE] * 7, "1.0 1e3 0.0"]), "Pose 8 of the plan holds '1e3'"),
        ("; ".join([*[ONE] * 7, "1.0 123456.0 0.0"]), "Pose 8 of the plan holds '123456.0'"),
        ("; ".join([*[ONE] * 7, "1.0 ٣ 0.0"]), "Pose 8 of the plan holds '٣'"),
        ("; ".join([ONE] * 8) + " done", "Pose 8 of the plan holds 'done'"),
        (",".join([ONE] * 8), "Pose 1 of the plan holds '0.0,1.0'"),
    ],
)
def test_text_that_is_no_plan(text: str, match: str) -> None:
    with pytest.raises(DataError, match=match):
        parse_plan(text)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -99999.99999])
def test_plan_that_could_not_be_read_back_is_not_written(bad: float) -> None:
    poses = np.zeros((8, 3))
    poses[3, 1] = bad
    with pytest.raises(DataError, match="finite and below"):
        format_plan(poses)
    with pytest.raises(DataError, match=r"\[T, 3\]; got shape \[8, 2\]"):
        format_plan(np.zeros((8, 2)))


def observation() -> Observation:
    agents = np.zeros((2, 4, 5))
    agents[0, -1] = [30.0, 4.0, 1.5, 3.0, 4.0]
    agents[1, -1] = [-6.0, 0.0, 0.0, 0.0, 0.0]
    history = np.zeros((4, 8))
    history[-1, 3] = 7.25
    return Observation(
        ego_history=history,
        agents=agents,
        agents_valid=np.ones((2, 4)),
        agents_size=np.ones((2, 2)),
        agents_type=[2, 1],
        map_xy=np.zeros((4, 2)),
        map_offsets=[0, 2, 4],
        map_type=[0, 0],
        map_speed_limit=[0, 0],
        map_on_route=[True, False],
        map_red=[False, True],
        route_xy=[[-20.0, 0.0], [0.0, 0.0], [12.0, 0.0], [12.0, 30.0]],
        command=0,
    )


def test_prompt_states_the_observation() -> None:
    lines = scene_prompt(observation()).splitlines()
    assert lines[0] == "You drive at 7.25 m/s. Command: left."
    # 10 m lies on the first leg; 20, 30 and 40 m are 8, 18 and 28 m up the second, which ends at 42 m.
    assert lines[2] == "Route ahead: (10.0, 0.0), (12.0, 8.0), (12.0, 18.0), (12.0, 28.0)."
    assert lines[3] == "Red light ahead: no."  # the red lane is not on the route
    assert lines[5:7] == ["pedestrian -6.0 0.0 0.00 0.0", "bicycle 30.0 4.0 1.50 5.0"]
    red = replace(observation(), map_red=np.array([True, True]))
    assert scene_prompt(red).splitlines()[3] == "Red light ahead: yes."


def test_prompt_of_a_bare_scene() -> None:
    empty = replace(
        observation(),
        agents=np.zeros((0, 4, 5)), agents_valid=np.zeros((0, 4)), agents_size=np.zeros((0, 2)),
        agents_type=np.zeros(0), route_xy=np.zeros((0, 2)),
    )  # fmt: skip
    lines = scene_prompt(empty).splitlines()
    assert (lines[2], lines[5]) == ("Route ahead: unknown.", "none")


def test_prompt_does_not_tell_what_comes() -> None:
    (scene,) = generate_scenes(1, seed=4)
    changed = scene.with_reference(human_poses=scene.reference.human_poses + 3.0)
    assert scene_prompt(changed.observation) == scene_prompt(scene.observation)
    assert scene.token not in scene_prompt(scene.observation)
    assert scene.kind not in scene_prompt(scene.observation)
