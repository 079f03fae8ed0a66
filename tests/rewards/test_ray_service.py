"""Scoring on Ray: what comes out is what the in-process engine gives, whatever happens to the workers."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rewards import LocalRewardService, Reward, RewardSpec, Scores, build_reward
from rewards.pdm_closed import attach_references
from rewards.ray_service import RayRewardService
from rlhf_drive.errors import ConfigError, DataError
from rlhf_drive.scenes import Scene, Trajectories
from rlhf_drive.scenes.generator import generate_scenes
from rlhf_drive.workers.actor import worker_environment

ray: Any = pytest.importorskip("ray")
pytestmark = pytest.mark.ray

DIES, HOLDS_THE_GIL, RAISES, SLEEPS, NAN, SLOW = 1, 2, 3, 4, 5, 6
TIMEOUT_S = 0.3
TRAP = """
import ctypes, os, time
import numpy as np
from rewards import reward

@reward("trap")
def trap(inputs, *, scale: float = 0.25):
    fates = np.round(inputs.trajectories.poses[:, 0, 2] * 1e6).astype(int)
    for fate in fates:
        if fate == 1:
            os._exit(3)
        if fate == 2:
            ctypes.PyDLL(None).sleep(600)
        if fate == 3:
            raise ValueError("on schedule")
        if fate in (4, 6):
            time.sleep({4: 600, 6: 0.05}[fate])
    limits = np.array([scene.reference.ego_init[3] for scene in inputs.scenes])
    value = inputs.components["epdms"] * scale + limits[inputs.trajectories.scene_index]
    return np.where(fates == 5, np.nan, value)
"""
"""A reward that does what the heading of a plan's first pose says, in millionths of a radian."""


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> Reward:
    file = tmp_path_factory.mktemp("plugin") / "trap.py"
    file.write_text(TRAP)
    return build_reward([RewardSpec("epdms", 0.8), RewardSpec(f"{file}:trap", 0.2, {"scale": 0.5})], scorer="epdms")


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    made = [attach_references(scene) for scene in generate_scenes(5, seed=11)]
    # Without a reference plan a scene cannot be prepared; its rows fail.
    return [*made, made[0].with_reference(pdm_reference_v1=np.zeros((0, 3)), pdm_reference_v2=np.zeros((0, 3)))]


@pytest.fixture(scope="module")
def engine(reward: Reward) -> Iterator[RayRewardService]:
    """Two workers on a Ray that the service starts itself, and that is gone with all it started at the end."""
    assert not ray.is_initialized()
    before = children()
    service = RayRewardService(
        reward.config, workers=2, timeout_s=TIMEOUT_S, stall_s=1.0, shard_rows=16, max_retries=1,
        address="local", num_cpus_per_worker=0,
    )  # fmt: skip
    started = children() - before
    assert len(started) >= 2  # Ray's own processes
    yield service
    workers = {worker.pid for worker in service.workers}
    service.close()
    assert not ray.is_initialized()
    assert {pid for pid in started | workers if running(pid)} == set()


def children() -> set[int]:
    """Processes that this one has started."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == os.getpid() and fields[0] != "Z":
            found.add(int(stat.parent.name))
    return found


def running(pid: int) -> bool:
    """Whether a process of this id is there and not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def plans(scenes: list[Scene], per_scene: int, seed: int, fates: dict[int, int] | None = None) -> Trajectories:
    """Plans around the human's, the fate of a row written into its first heading."""
    rng = np.random.default_rng(seed)
    human = np.repeat([scene.reference.human_poses for scene in scenes], per_scene, axis=0)
    poses = human + rng.normal(0.0, [0.8, 0.2, 0.02], human.shape)
    poses[:, 0, 2] = 0.0
    for row, fate in (fates or {}).items():
        poses[row, 0, 2] = fate * 1e-6
    return Trajectories(poses, np.repeat(np.arange(len(scenes)), per_scene))


def same(found: Scores, expected: Scores) -> None:
    """Bit for bit, failures included."""
    assert found.names == expected.names
    assert found.scorer == expected.scorer
    np.testing.assert_array_equal(found.components, expected.components)
    np.testing.assert_array_equal(found.total, expected.total)
    np.testing.assert_array_equal(found.valid, expected.valid)
    assert found.failures == expected.failures


def locally(
    reward: Reward, scenes: list[Scene], trajectories: Trajectories, previous: Trajectories | None = None
) -> Scores:
    with LocalRewardService(reward, workers=1, timeout_s=TIMEOUT_S) as local:
        return local.score(scenes, trajectories, previous)


def wait_for(workers: int, service: RayRewardService) -> list[int]:
    """Processes of the workers once that many are up."""
    deadline = time.monotonic() + 30.0
    while len(service.workers) < workers and time.monotonic() < deadline:
        time.sleep(0.02)
    return [worker.pid for worker in service.workers]


def test_scores_are_those_of_the_local_engine(engine: RayRewardService, reward: Reward, scenes: list[Scene]) -> None:
    trajectories = plans(scenes, 17, seed=1, fates={3: RAISES, 40: NAN, 41: NAN, 70: SLEEPS})
    trajectories.poses[50, 4, 1] = np.inf
    previous = plans(scenes, 17, seed=21)
    for row in range(4, len(previous), 5):  # the human's own plans, which are smooth
        for poses in (trajectories.poses, previous.poses):
            poses[row, :, :2] = scenes[row // 17].reference.human_poses[:, :2]
            poses[row, 1:, 2] = scenes[row // 17].reference.human_poses[1:, 2]
    expected = locally(reward, scenes, trajectories, previous)
    comfort = expected.component("ec")[expected.valid]
    assert 0 < comfort.sum() < len(comfort)  # what the plans of the previous frame decide
    kinds = [failure.kind for failure in expected.failures.values()]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {
        "raised": 1, "not_finite": 2, "timeout": 1, "invalid_plan": 1, "invalid_scene": 17
    }  # fmt: skip
    same(engine.score(scenes, trajectories, previous), expected)
    before = engine.stats
    same(engine.score(scenes, trajectories, previous), expected)
    assert engine.stats.rows - before.rows == len(trajectories)
    assert engine.stats.failures - before.failures == 22
    assert (before.deaths, before.hangs) == (0, 0)


def test_another_number_of_workers_on_the_ray_in_use_changes_nothing(
    engine: RayRewardService, reward: Reward, scenes: list[Scene]
) -> None:
    trajectories = plans(scenes, 50, seed=2)
    pdms = build_reward([RewardSpec("pdms")])
    expected = locally(pdms, scenes, trajectories)
    backwards = Trajectories(trajectories.poses[::-1], trajectories.scene_index[::-1])
    for workers, rows in ((3, 7), (1, 256)):
        with RayRewardService(
            pdms.config, workers=workers, shard_rows=rows, timeout_s=TIMEOUT_S, num_cpus_per_worker=0
        ) as other:
            assert len(other.workers) == workers
            pids = {worker.pid for worker in other.workers}
            same(other.score(scenes, trajectories), expected)
            turned = other.score(scenes, backwards)
            np.testing.assert_array_equal(turned.components[::-1], expected.components)
            np.testing.assert_array_equal(turned.total[::-1], expected.total)
        assert [pid for pid in pids if running(pid)] == []
    assert ray.is_initialized()  # it was there before, so it stays
    same(engine.score(scenes, trajectories), locally(reward, scenes, trajectories))


def test_submissions_overlap(engine: RayRewardService, reward: Reward, scenes: list[Scene]) -> None:
    batches = [plans(scenes[:4], 8, seed=seed) for seed in range(4)]
    futures = [engine.submit(scenes[:4], batch) for batch in batches]
    expected = [locally(reward, scenes[:4], batch) for batch in batches]
    for batch in batches:
        batch.poses[:] = 0.0  # what was submitted is not ours any more
    for future, wanted in zip(futures, expected, strict=True):
        same(future.result(60.0), wanted)


def test_worker_killed_while_it_scores_costs_nothing(
    engine: RayRewardService, reward: Reward, scenes: list[Scene]
) -> None:
    trajectories = plans(scenes[:4], 8, seed=3, fates=dict.fromkeys(range(32), SLOW))
    expected = locally(reward, scenes[:4], trajectories)
    assert expected.valid.all()
    pid, before = wait_for(2, engine)[0], engine.stats
    future = engine.submit(scenes[:4], trajectories)
    time.sleep(0.4)  # 16 rows of 0.05 s each are under way
    assert not future.done()
    os.kill(pid, signal.SIGKILL)
    same(future.result(60.0), expected)
    assert pid not in wait_for(2, engine)
    assert (engine.stats.deaths - before.deaths, engine.stats.restarts - before.restarts) == (1, 1)
    assert engine.stats.retries - before.retries == 1


def test_rows_that_end_or_freeze_their_process_are_lost_alone(
    engine: RayRewardService, reward: Reward, scenes: list[Scene]
) -> None:
    fates = {5: DIES, 30: RAISES, 60: HOLDS_THE_GIL, 61: NAN}
    trajectories = plans(scenes[:4], 20, seed=4, fates=fates)
    harmless = np.setdiff1d(np.arange(80), [5, 60])
    expected = locally(
        reward, scenes[:4], Trajectories(trajectories.poses[harmless], trajectories.scene_index[harmless])
    )
    before = engine.stats
    scores = engine.score(scenes[:4], trajectories)
    found = {row: (failure.source, failure.kind) for row, failure in scores.failures.items()}
    assert found == {
        5: ("worker", "worker_died"), 30: ("trap", "raised"),
        60: ("worker", "timeout"), 61: ("trap", "not_finite"),
    }  # fmt: skip
    assert f"scene {scenes[0].token!r}: the worker that scored it died" in scores.failures[5].reason
    np.testing.assert_array_equal(scores.components[harmless], expected.components)
    np.testing.assert_array_equal(scores.total[harmless], expected.total)
    assert np.isnan(scores.total[[5, 60]]).all()  # and no zero
    # One in its shard of 16, once more, and twice alone; the frozen one in its shard and twice alone.
    after = engine.stats
    assert (after.deaths - before.deaths, after.hangs - before.hangs) == (4, 3)
    assert after.restarts - before.restarts == 7


def test_what_the_local_engine_refuses_is_refused(engine: RayRewardService, scenes: list[Scene]) -> None:
    wrong = Trajectories(np.zeros((2, 8, 3)), np.array([0, 9]))
    with pytest.raises(DataError, match=r"scene_index must lie in 0 … 5; got 0 … 9"):
        engine.score(scenes, wrong)
    assert isinstance(engine.submit(scenes, wrong).exception(1.0), DataError)
    assert len(engine.score(scenes, Trajectories(np.zeros((0, 8, 3)), np.zeros(0, dtype=np.int64)))) == 0


def test_reward_that_cannot_be_loaded_on_a_worker_is_an_error_of_the_configuration(
    engine: RayRewardService, tmp_path: Path
) -> None:
    file = tmp_path / "here_only.py"
    file.write_text(
        f"import os\nif os.getpid() != {os.getpid()}:\n    raise OSError('no licence')\n"
        "def here_only(inputs):\n    return inputs.components['pdms']\n"
    )
    config = build_reward([RewardSpec(f"{file}:here_only")]).config
    with pytest.raises(ConfigError, match=r"cannot be built on a Ray worker.*no licence.*under the same paths"):
        RayRewardService(config, workers=1, num_cpus_per_worker=0)


def test_cancelled_submission_is_dropped(engine: RayRewardService, scenes: list[Scene]) -> None:
    trajectories = plans(scenes[:2], 128, seed=6, fates=dict.fromkeys(range(256), SLOW))  # 12.8 s
    started = time.monotonic()
    future = engine.submit(scenes[:2], trajectories)
    assert future.cancel()
    assert engine.score(scenes[:2], plans(scenes[:2], 4, seed=7)).valid.all()
    assert time.monotonic() - started < 8.0


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"workers": -1}, "workers of the reward service must be at least 0; got -1"),
        ({"shard_rows": 0}, "shard_rows of the reward service must be at least 1; got 0"),
        ({"timeout_s": float("nan")}, "timeout_s of the reward service must be at least 0; got nan"),
    ],
)
def test_number_out_of_range_is_refused(reward: Reward, options: dict[str, float], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        RayRewardService(reward.config, **options)  # type: ignore[arg-type]


def test_workers_get_one_thread_and_the_same_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", "/some/cache")
    monkeypatch.setenv("PYTHONPATH", "/own/code")
    environment = worker_environment()
    assert environment["OMP_NUM_THREADS"] == "1"
    assert environment["OMP_WAIT_POLICY"] == "PASSIVE"
    assert environment["NUMBA_CACHE_DIR"] == "/some/cache"
    assert environment["PYTHONPATH"].split(":")[-1] == "/own/code"
