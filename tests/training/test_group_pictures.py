"""A picture of groups shows the scenes that teach something, each plan where it is and in the colour of its reward."""

from __future__ import annotations

import io
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from rewards.carriers import Failure, ScorerInfo, Scores
from rlhf_drive.errors import StorageError
from rlhf_drive.scenes import Scene, Trajectories
from rlhf_drive.scenes.picture_parts import window_around
from rlhf_drive.scenes.store import SceneStore
from rlhf_drive.training.group_pictures import INVALID, PANEL_PX, REWARD_COLORS, choose_groups, draw_groups

NAN = float("nan")


@dataclass(frozen=True)
class Plans:
    """What a picture needs of a rollout."""

    num_generations: int
    trajectories: Trajectories


def _step(scenes: list[Scene], rewards: list[list[float]], poses: NDArray[np.float64]) -> tuple[Plans, Scores]:
    """Plans ``[S, G, 8, 3]`` with these rewards; NaN = without a score."""
    total = np.array(rewards).reshape(-1)
    valid = np.isfinite(total)
    failures = {int(row): Failure("plan", "raised", "no") for row in np.flatnonzero(~valid)}
    scores = Scores(("nc",), total[:, None], total, valid, ScorerInfo("pdms", "1"), failures)
    size = len(rewards[0])
    return Plans(size, Trajectories(poses.reshape(-1, 8, 3), np.repeat(np.arange(len(scenes)), size))), scores


def _fan(scenes: int, size: int) -> NDArray[np.float64]:
    """``[S, G, 8, 3]`` straight plans of 30 m that fan out to both sides."""
    angle = np.linspace(0.6, -0.6, size)
    way = np.linspace(30 / 8, 30, 8)
    plan = np.stack([np.outer(np.cos(angle), way), np.outer(np.sin(angle), way), np.tile(angle[:, None], 8)], axis=-1)
    return np.tile(plan, (scenes, 1, 1, 1))


def test_groups_that_differ_come_first_and_in_order() -> None:
    rewards = np.array(
        [[0.5, 0.5], [0.1, 0.9], [NAN, 0.3], [0.2, 0.4], [NAN, NAN], [0.0, 1.0], [NAN, 0.2]], dtype=np.float64
    )
    assert choose_groups(rewards, 2) == [1, 3]
    assert choose_groups(rewards, 4) == [0, 1, 3, 5]  # one without spread fills up
    assert choose_groups(rewards, 99) == list(range(7))
    assert choose_groups(np.array([[0.1, NAN, 0.9]]), 1) == [0]


def _color(text: str) -> NDArray[np.float64]:
    return np.array([int(text[i : i + 2], 16) for i in (1, 3, 5)]) / 255


def test_each_plan_has_the_colour_of_its_reward(tiny_store: SceneStore, tmp_path: Path) -> None:
    from matplotlib.image import imread

    scene = tiny_store[0]
    rewards = [[0.0, NAN, 0.25, 1.0]]  # of -1 would be a quarter of the scale: its second colour
    plans, scores = _step([scene], rewards, _fan(1, 4))
    draw_groups([scene], plans, scores, tmp_path / "pictures" / "a.png", step=3, count=4)  # type: ignore[arg-type]
    image = imread(io.BytesIO((tmp_path / "pictures" / "a.png").read_bytes()), format="png")[..., :3]
    poses = plans.trajectories.poses
    ends = poses[..., :2].reshape(-1, 2)
    window = window_around([np.zeros((1, 2)), scene.reference.human_poses[:, :2], ends], least_m=44.0)

    def distance(row: int, wanted: str) -> float:
        """Least distance of the colours around a point of the plan's line to the wanted one."""
        side = PANEL_PX - 6
        column, line = window.pixel(*(0.5 * (poses[row, 4, :2] + poses[row, 5, :2])), side)
        around = image[line + 3 - 2 : line + 3 + 3, column + 3 - 2 : column + 3 + 3].reshape(-1, 3)
        return float(np.abs(around - _color(wanted)).max(axis=1).min())

    assert distance(0, REWARD_COLORS[0]) < 0.03  # the worst
    assert distance(3, REWARD_COLORS[-1]) < 0.03  # the best
    assert distance(2, REWARD_COLORS[1]) < 0.06  # thin
    assert distance(2, REWARD_COLORS[-1]) > 0.3
    assert min(distance(1, color) for color in REWARD_COLORS) > 0.15  # no score, no colour of a reward
    assert distance(1, INVALID) < 0.5


@pytest.mark.parametrize(("count", "size"), [(1, (1, 1)), (3, (3, 1)), (4, (2, 2)), (5, (3, 2))])
def test_scenes_lie_in_a_grid_and_equal_input_gives_equal_bytes(
    tiny_store: SceneStore, tmp_path: Path, count: int, size: tuple[int, int]
) -> None:
    from matplotlib.image import imread

    scenes = [tiny_store[i] for i in range(5)]
    plans, scores = _step(scenes, [[0.1, 0.2, NAN]] * 5, _fan(5, 3))
    for name in ("a.png", "b.png"):
        draw_groups(scenes, plans, scores, tmp_path / name, step=3, count=count)  # type: ignore[arg-type]
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    height, width, _ = imread(tmp_path / "a.png").shape
    assert (width // PANEL_PX, height // PANEL_PX) == size
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_a_step_without_a_score_or_with_broken_plans_is_drawn(tiny_store: SceneStore, tmp_path: Path) -> None:
    scenes = [tiny_store[i] for i in range(2)]
    poses = _fan(2, 2)
    poses[0, 0, 3] = NAN
    plans, scores = _step(scenes, [[NAN, NAN], [NAN, NAN]], poses)
    draw_groups(scenes, plans, scores, tmp_path / "a.png", step=1, count=2)  # type: ignore[arg-type]
    assert (tmp_path / "a.png").stat().st_size > 20_000


def test_four_scenes_take_little_time(tiny_store: SceneStore, tmp_path: Path) -> None:
    scenes = [tiny_store[i] for i in range(4)]
    plans, scores = _step(scenes, [list(np.linspace(0, 1, 8))] * 4, _fan(4, 8))
    draw_groups(scenes, plans, scores, tmp_path / "a.png", step=1, count=1)  # type: ignore[arg-type]
    started = time.process_time()
    draw_groups(scenes, plans, scores, tmp_path / "a.png", step=1, count=4)  # type: ignore[arg-type]
    assert time.process_time() - started < 2.0


def test_a_picture_that_cannot_be_written_says_so(tiny_store: SceneStore, tmp_path: Path) -> None:
    (tmp_path / "pictures").write_text("a file")
    plans, scores = _step([tiny_store[0]], [[0.5, 1.0]], _fan(1, 2))
    with pytest.raises(StorageError, match="The picture of step 7"):
        draw_groups([tiny_store[0]], plans, scores, tmp_path / "pictures" / "a.png", step=7, count=1)  # type: ignore[arg-type]
