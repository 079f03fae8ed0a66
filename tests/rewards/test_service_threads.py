"""Threads and submissions: side by side, in any number, and cleanly ended."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import CancelledError, Future
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from oracles.stand_in import counting, make_scene, plans, service, stand_in, x_of

from rewards import (
    REWARDS,
    RewardInputs,
    RewardSpec,
    Scores,
    reward,
)
from rlhf_drive.errors import DataError
from rlhf_drive.scenes import SceneReference

Array = NDArray[np.float64]


@pytest.fixture(autouse=True)
def _registered_names_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(REWARDS, "_entries", dict(REWARDS._entries))


@pytest.fixture
def release() -> Iterator[threading.Event]:
    """Ends the rewards that hang when the test is over."""
    event = threading.Event()
    yield event
    event.set()


def test_scenes_are_scored_at_the_same_time() -> None:
    barrier = threading.Barrier(2, timeout=10.0)

    def prepare(reference: SceneReference) -> float:
        barrier.wait()  # breaks, and so fails the rows, unless two scenes are prepared at once
        return reference.speed_limit

    with service(workers=2, scorer=stand_in(prepare)) as two:
        assert two.score([make_scene("a"), make_scene("b")], plans([1, 2], [0, 1])).valid.tolist() == [True, True]


def test_parts_of_one_scene_are_scored_at_the_same_time_and_prepared_once() -> None:
    barrier = threading.Barrier(2, timeout=10.0)
    sizes: list[int] = []
    ordinary = stand_in(counting(counts := {}))

    def score(prepared: float, poses: Array, previous: Array | None) -> Mapping[str, Array]:
        sizes.append(len(poses))
        if len(sizes) <= 2:
            barrier.wait()  # breaks, and so fails the rows, unless two parts are scored at once
        return ordinary.score(prepared, poses, previous)

    x = np.linspace(0, 90, 1000).tolist()
    with service(workers=2, scorer=replace(ordinary, score=score), cache_size=0) as two:
        scores = two.score([make_scene("a")], plans(x))
    assert scores.component("pdms").tolist() == [v / 100 for v in x]
    assert (sizes, counts) == ([125] * 8, {10.0: 1})


def test_small_groups_are_not_taken_apart() -> None:
    sizes: list[int] = []
    ordinary = stand_in()

    def score(prepared: float, poses: Array, previous: Array | None) -> Mapping[str, Array]:
        sizes.append(len(poses))
        return ordinary.score(prepared, poses, previous)

    with service(workers=4, scorer=replace(ordinary, score=score)) as four:
        four.score([make_scene("a"), make_scene("b")], plans([1.0] * 24, [0] * 12 + [1] * 12))
    assert sizes == [12, 12]


def test_submission_runs_while_the_caller_goes_on() -> None:
    gate = threading.Event()

    @reward("waits")
    def waits(inputs: RewardInputs) -> Array:
        assert gate.wait(10.0)
        return x_of(inputs)

    with service([RewardSpec("waits")]) as busy:
        pending = busy.submit([make_scene("a")], plans([1, 2]))
        assert not pending.done()
        gate.set()
        assert pending.result(10.0).total.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("workers", [1, 2])
def test_several_submissions_under_way_give_what_scoring_gives(workers: int) -> None:
    barrier = threading.Barrier(3, timeout=10.0)

    def prepare(reference: SceneReference) -> float:
        if reference.speed_limit < 4.0:
            barrier.wait()  # breaks unless three submissions are under way
        return reference.speed_limit

    scenes = [make_scene(f"s{i}", float(i)) for i in range(1, 9)]
    with service(workers=3 if workers > 1 else 1, scorer=stand_in(prepare)) as busy:
        pending = [busy.submit([scene], plans([10, 20])) for scene in scenes]
        results = [future.result(10.0).component("ep").tolist() for future in pending]
    assert results == [[10 / i, 20 / i] for i in range(1, 9)]
    assert busy.stats.rows == 16


def test_plans_may_be_changed_once_they_are_submitted() -> None:
    gate = threading.Event()

    def prepare(reference: SceneReference) -> float:
        assert gate.wait(10.0)
        return reference.speed_limit

    scenes, trajectories = [make_scene("a")], plans([10, 20])
    with service(scorer=stand_in(prepare)) as busy:
        pending = busy.submit(scenes, trajectories, plans([10, 20]))
        trajectories.poses[:] = 0.0
        trajectories.scene_index[:] = 7
        scenes.clear()
        gate.set()
        assert pending.result(10.0).total.tolist() == [0.1, 0.2]


def test_what_scoring_raises_arrives_in_the_future() -> None:
    @reward("stopper")
    def stopper(inputs: RewardInputs) -> Array:
        raise KeyboardInterrupt

    with service([RewardSpec("stopper")]) as busy:
        with pytest.raises(DataError, match="scene_index"):
            busy.submit([make_scene("a")], plans([1], [1])).result(10.0)
        with pytest.raises(KeyboardInterrupt):
            busy.submit([make_scene("a")], plans([1])).result(10.0)


@pytest.mark.parametrize("workers", [1, 2])
def test_close_waits_for_what_was_submitted(workers: int) -> None:
    before = set(threading.enumerate())
    busy = service([RewardSpec("pdms"), RewardSpec("wam_flow")], scorer=stand_in(delay_s=0.2), workers=workers)
    pending = [busy.submit([make_scene("a"), make_scene("b")], plans([1, 2], [0, 1])) for _ in range(2)]
    busy.close()
    assert all(future.done() for future in pending)
    assert pending[0].result().component("pdms").tolist() == [0.01, 0.02]
    started = [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("reward-wam_flow")]
    for thread in started:
        thread.join(10.0)
    assert [thread for thread in set(threading.enumerate()) - before if thread.is_alive()] == []


def test_leaving_by_an_exception_cancels_even_what_hangs(release: threading.Event) -> None:
    begun = threading.Event()

    @reward("hangs")
    def hangs(inputs: RewardInputs) -> Array:
        begun.set()
        release.wait()
        return x_of(inputs)

    started = time.monotonic()
    busy = service([RewardSpec("hangs")])
    pending: list[Future[Scores]] = []

    def sample() -> None:
        with busy:
            pending.append(busy.submit([make_scene("a")], plans([1])))
            assert begun.wait(10.0)
            raise RuntimeError("sampling failed")

    with pytest.raises(RuntimeError, match="sampling failed"):
        sample()
    with pytest.raises(CancelledError):
        pending[0].result(10.0)
    assert time.monotonic() - started < 5.0
    release.set()
    assert busy.score([make_scene("a")], plans([3])).total.tolist() == [3.0]  # and it can be used again
    busy.close()


def test_cancelled_submission_scores_no_further_scene() -> None:
    seen: list[float] = []
    first = threading.Event()

    def prepare(reference: SceneReference) -> float:
        seen.append(reference.speed_limit)
        first.set()
        stopped.wait(10.0)
        return reference.speed_limit

    busy = service(scorer=stand_in(prepare))
    stopped = busy._stop
    pending = busy.submit([make_scene(f"s{i}", float(i)) for i in range(1, 50)], plans([1.0] * 49, list(range(49))))
    assert first.wait(10.0)
    busy.close(cancel=True)
    with pytest.raises(CancelledError):
        pending.result(10.0)
    assert seen == [1.0]


def test_closed_service_can_be_used_again() -> None:
    scenes = [make_scene("a"), make_scene("b")]
    again = service(workers=2)
    first = again.score(scenes, plans([1, 2], [0, 1]))
    again.close()
    np.testing.assert_array_equal(again.score(scenes, plans([1, 2], [0, 1])).total, first.total)
    again.close()


def test_user_reward_is_called_by_one_thread_at_a_time() -> None:
    inside: list[int] = []
    most: list[int] = []

    @reward("shy")
    def shy(inputs: RewardInputs) -> Array:
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.01)
        inside.pop()
        return x_of(inputs)

    with service([RewardSpec("shy")], workers=2) as busy:
        pending = [busy.submit([make_scene("a")], plans([float(i)])) for i in range(6)]
        assert [future.result(10.0).total[0] for future in pending] == [0, 1, 2, 3, 4, 5]
    assert max(most) == 1


def test_many_scenes_are_not_held_at_once() -> None:
    alive: set[int] = set()
    most: list[int] = []

    class Held:
        def __init__(self, number: float) -> None:
            self.number = number
            alive.add(id(self))
            most.append(len(alive))

        def __del__(self) -> None:
            alive.discard(id(self))

    passing = stand_in(lambda reference: Held(reference.speed_limit))
    passing = replace(passing, score=lambda p, poses, previous: stand_in().score(p.number, poses, previous))
    for workers in (1, 2):
        with service(scorer=passing, cache_size=0, workers=workers) as flat:
            scenes = [make_scene(f"s{i}", float(i + 1)) for i in range(60)]
            flat.score(scenes, plans([10.0] * 120, [i // 2 for i in range(120)]))
        assert max(most) <= workers + 2


def test_callback_of_a_future_may_close_the_service() -> None:
    one, done = service(), threading.Event()
    closed: list[str] = []

    def close(_: object) -> None:
        try:
            one.close()
            closed.append("well")
        finally:
            done.set()

    one.submit([make_scene("a")], plans([1.0] * 400)).add_done_callback(close)
    assert done.wait(20.0)
    assert closed == ["well"]
