"""Cutting batches into shards, joining what comes back, closing in on rows that kill, and sending scenes once."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
from numpy.typing import NDArray

from rewards import Failure, ScorerInfo, Scores
from rewards.ray_scenes import SceneReferences
from rewards.ray_shards import Homes, Job, Shard, after_loss, plan_shards
from rlhf_drive.errors import RewardError
from rlhf_drive.scenes import Scene, Trajectories
from rlhf_drive.scenes.generator import generate_scenes

INFO = ScorerInfo("pdms", "NAVSIM v1.1")


@functools.cache
def one_scene() -> Scene:
    return next(generate_scenes(1, seed=5))


def job_of(rows: int) -> Job:
    plans = Trajectories(np.zeros((rows, 8, 3)), np.zeros(rows))
    return Job([one_scene()], plans, None, ("pdms",), INFO)


def scores_of(values: list[float]) -> Scores:
    total = np.array(values)
    valid = np.isfinite(total)
    failures = {int(row): Failure("pdms", "not_finite", "nan") for row in np.flatnonzero(~valid)}
    return Scores(("pdms",), total[:, None], total, valid, INFO, failures)


@pytest.mark.parametrize(("workers", "max_rows"), [(1, 256), (3, 256), (3, 7), (8, 1), (2, 16)])
def test_every_row_is_in_one_shard(workers: int, max_rows: int) -> None:
    rng = np.random.default_rng(workers * 1000 + max_rows)
    scene_index = rng.integers(0, 9, 200)
    homes = rng.integers(0, workers, 9).tolist()
    shards = plan_shards(scene_index, homes, workers=workers, max_rows=max_rows)
    assert sorted(np.concatenate([rows for _, rows in shards]).tolist()) == list(range(200))
    assert max(len(rows) for _, rows in shards) <= max_rows
    assert {worker for worker, _ in shards} <= set(range(workers))


def test_small_groups_stay_with_their_worker_and_share_calls() -> None:
    scene_index = np.repeat(np.arange(6), 8)
    shards = plan_shards(scene_index, [0, 1, 0, 1, 0, 1], workers=2, max_rows=256)
    # 48 rows over 2 x 2 shards are 12 each, which is raised to 16 = two groups of 8
    assert [(worker, np.unique(scene_index[rows]).tolist()) for worker, rows in shards] == [
        (0, [0, 2]), (1, [1, 3]), (0, [4]), (1, [5])
    ]  # fmt: skip


def test_large_group_is_spread_from_its_home_on() -> None:
    shards = plan_shards(np.zeros(640, dtype=np.int64), [2], workers=4, max_rows=256)
    assert [len(rows) for _, rows in shards] == [80] * 8  # 640 / (2 * 4)
    assert sorted(worker for worker, _ in shards) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert shards[0][1].tolist() == list(range(80))
    (first_home, *_) = [worker for worker, rows in shards if 0 in rows]
    assert first_home == 2


def test_scene_keeps_its_worker_and_new_ones_go_where_least_are() -> None:
    homes = Homes(3, 4)
    assert homes.of(["a", "b", "c", "d"]) == [0, 1, 2, 0]
    assert homes.of(["d", "a"]) == [0, 0]
    assert homes.of(["e"]) == [1]  # a and d are with 0; the first of those with one each
    assert homes.of(["c"]) == [2]
    assert homes.of(["b"]) == [1]  # was dropped for e, being used longest ago; and 1 lost it


def test_rows_come_back_to_their_places() -> None:
    job = job_of(4)
    job.put(np.array([3, 2]), scores_of([0.3, np.nan]))
    job.give_up(0, Failure("worker", "worker_died", "gone"))
    assert not job.complete
    job.put(np.array([1]), scores_of([0.1]))
    assert job.complete
    scores = job.scores()
    np.testing.assert_array_equal(scores.total, [np.nan, 0.1, np.nan, 0.3])
    assert scores.valid.tolist() == [False, True, False, True]
    assert {row: failure.kind for row, failure in scores.failures.items()} == {0: "worker_died", 2: "not_finite"}


def test_row_that_comes_back_twice_is_an_error() -> None:
    job = job_of(3)
    job.put(np.array([0, 1]), scores_of([0.1, 0.2]))
    with pytest.raises(RewardError, match=r"Rows \[1\] came back twice"):
        job.put(np.array([1, 2]), scores_of([0.1, 0.2]))
    with pytest.raises(RewardError, match=r"Rows \[0\] came back twice"):
        job.give_up(0, Failure("worker", "timeout", "late"))


def test_scores_of_another_version_are_an_error() -> None:
    other = dataclasses.replace(scores_of([0.1]), scorer=ScorerInfo("pdms", "NAVSIM v9"))
    with pytest.raises(RewardError, match="same version of rlhf-drive"):
        job_of(1).put(np.array([0]), other)


def losses_until_found(rows: int, poison: int, max_retries: int) -> tuple[list[int], int]:
    """Rows given up when `poison` kills every worker that gets it, and the workers that this costs."""
    waiting, given_up, lost = [Shard(job_of(rows), np.arange(rows))], list[int](), 0
    while waiting:
        shard = waiting.pop()
        if poison in shard.rows:
            lost += 1
            again = after_loss(shard, "worker_died", max_retries)
            given_up += [] if again else shard.rows.tolist()
            waiting += again
    return given_up, lost


@pytest.mark.parametrize(
    ("rows", "max_retries", "lost"),
    [
        (256, 2, 6),  # whole twice, 1 of 16 parts, and the row alone three times
        (256, 0, 3),  # whole, a part, the row
        (16, 2, 5),
        (1, 2, 3),
        (1, 0, 1),
    ],
)
def test_row_that_kills_is_found_in_few_losses(rows: int, max_retries: int, lost: int) -> None:
    for poison in {0, rows // 3, rows - 1}:
        assert losses_until_found(rows, poison, max_retries) == ([poison], lost)


def test_what_is_handed_out_again_are_the_same_rows() -> None:
    rows = np.array([5, 9, 2, 40, 41, *range(100, 130)])
    for loss in ("worker_died", "timeout", "raised"):
        for suspect in (False, True):
            again = after_loss(Shard(job_of(200), rows, suspect=suspect), loss, 2)  # type: ignore[arg-type]
            assert np.concatenate([shard.rows for shard in again]).tolist() == rows.tolist()
            whole = loss == "worker_died" and not suspect
            assert len(again) == (1 if whole else 16)
            assert [shard.losses for shard in again] == ([1] if whole else [0] * 16)


def test_row_alone_is_tried_again_as_often_as_is_due() -> None:
    def tries(loss: str, max_retries: int) -> int:
        shard, count = Shard(job_of(1), np.array([0])), 1
        while again := after_loss(shard, loss, max_retries):  # type: ignore[arg-type]
            (shard,), count = again, count + 1
        return count

    assert [tries("worker_died", n) for n in (0, 1, 3)] == [1, 2, 4]
    assert [tries("timeout", n) for n in (0, 1, 3)] == [1, 2, 2]
    assert [tries("raised", n) for n in (0, 3)] == [1, 1]


def put_into(store: list[bytes]) -> SceneReferences:
    def put(data: bytes) -> int:
        store.append(data)
        return len(store) - 1

    return SceneReferences(2, 10**9, put)


def test_scene_is_put_once_by_object_and_by_content() -> None:
    store: list[bytes] = []
    references = put_into(store)
    scene = one_scene()
    assert references.get(scene) == references.get(scene) == (0, [0])
    again = dataclasses.replace(scene)
    assert references.get(again) == (0, [0])
    assert len(store) == 1
    changed = scene.with_reference(speed_limit=3.25)
    assert references.get(changed) == (1, [1])
    assert references.nbytes == len(store[1])


def test_scenes_used_longest_ago_are_let_go() -> None:
    store: list[bytes] = []
    references = put_into(store)
    a, b, c = (dataclasses.replace(one_scene(), token=token) for token in "abc")
    numbers = [references.get(scene)[0] for scene in (a, b, a, c, a, b)]
    assert numbers == [0, 1, 0, 2, 0, 3]  # c drops b, which was used before a
    assert references.nbytes == len(store[0]) + len(store[3])
    small = SceneReferences(10, len(store[0]) + 1, store.append)
    small.get(a)
    small.get(b)
    assert small.nbytes == len(store[-1])


def test_part_holds_the_plans_and_their_scenes_alone() -> None:
    scenes = [dataclasses.replace(one_scene(), token=token) for token in "abc"]
    poses: NDArray[np.float64] = np.arange(5 * 24, dtype=np.float64).reshape(5, 8, 3)
    plans = Trajectories(poses, np.array([0, 2, 1, 2, 0]))
    job = Job(scenes, plans, Trajectories(poses + 1000, plans.scene_index), ("pdms",), INFO)
    used, part, before = job.part(np.array([4, 1, 3]))
    assert [scene.token for scene in used] == ["a", "c"]
    assert part.scene_index.tolist() == [0, 1, 1]
    np.testing.assert_array_equal(part.poses, poses[[4, 1, 3]])
    assert before is not None
    np.testing.assert_array_equal(before.poses, poses[[4, 1, 3]] + 1000)
    assert job.token(3) == "c"
