"""Handing out shards with workers that are stand-ins: what is late, silent, gone or hopeless."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from typing import Any

import numpy as np
import pytest

from rewards import ScorerInfo, Scores
from rewards.ray_dispatch import Dispatcher, Limits
from rewards.ray_shards import Job
from rewards.ray_worker import ShardResult
from rlhf_drive.errors import PluginError, RewardError
from rlhf_drive.scenes import Scene, Trajectories
from rlhf_drive.scenes.generator import generate_scenes
from rlhf_drive.workers import WorkerInfo, WorkerLostError

INFO = ScorerInfo("pdms", "NAVSIM v1.1")
LIMITS = Limits(timeout_s=0.1, terms=1, start_s=5.0, stall_s=0.2, call_s=60.0)
WAIT_S = 10.0


def done(value: object = None) -> Future[Any]:
    future: Future[Any] = Future()
    if isinstance(value, BaseException):
        future.set_exception(value)
    else:
        future.set_result(value)
    return future


def result_of(plans: Trajectories) -> ShardResult:
    """A plan's score is its last x."""
    total = plans.poses[:, -1, 0]
    scores = Scores(("pdms",), total[:, None], total, np.ones(len(total), dtype=bool), INFO)
    return ShardResult(scores, {"prepared": 1}, 100, 0)


class StandIn:
    """A worker that scores at once, unless a test says otherwise."""

    def __init__(self, number: int, on_score: Callable[[StandIn, Trajectories], Future[Any]] | None = None) -> None:
        self.number, self.on_score = number, on_score
        self.started: Future[Any] = done(WorkerInfo(number, "here"))
        self.end: Future[Any] = Future()
        self.answers = True
        self.killed = False
        self.rows: list[list[float]] = []

    def start(self) -> Future[WorkerInfo]:
        return self.started

    def score(self, scenes: Sequence[Any], plans: Trajectories, before: Trajectories | None) -> Future[ShardResult]:
        self.rows.append(plans.poses[:, -1, 0].tolist())
        return self.on_score(self, plans) if self.on_score else done(result_of(plans))

    def ping(self) -> Future[None]:
        return done() if self.answers else Future()

    def gone(self) -> Future[None]:
        return self.end

    def kill(self) -> None:
        self.killed = True


@functools.cache
def one_scene() -> Scene:
    return next(generate_scenes(1, seed=5))


def job_of(rows: int, scenes: int = 1) -> Job:
    poses = np.zeros((rows, 8, 3))
    poses[:, -1, 0] = np.arange(rows) + 1.0
    all_scenes = [dataclasses.replace(one_scene(), token=f"s{i}") for i in range(scenes)]
    return Job(all_scenes, Trajectories(poses, np.arange(rows) % scenes), None, ("pdms",), INFO)


class Bench:
    """A dispatcher, and every stand-in it has started."""

    def __init__(self, make: Callable[[int], StandIn], workers: int, limits: Limits, max_retries: int) -> None:
        self.made: list[StandIn] = []

        def spawn() -> StandIn:
            self.made.append(make(len(self.made)))
            return self.made[-1]

        self.dispatcher = Dispatcher(
            spawn, lambda scene: scene.token, lambda: True, limits,
            workers=workers, remember=100, max_rows=16, max_retries=max_retries,
        )  # fmt: skip

    def score(self, job: Job) -> Scores:
        self.dispatcher.add(job)
        return job.future.result(WAIT_S)


Start = Callable[..., Bench]


@pytest.fixture
def start() -> Iterator[Start]:
    benches: list[Bench] = []

    def make(
        make: Callable[[int], StandIn] = StandIn, workers: int = 2, limits: Limits = LIMITS, max_retries: int = 2
    ) -> Bench:
        benches.append(Bench(make, workers, limits, max_retries))
        return benches[-1]

    yield make
    for bench in benches:
        bench.dispatcher.end()


def expected(rows: int) -> list[float]:
    return (np.arange(rows) + 1.0).tolist()


def test_rows_come_back_in_order_over_all_workers(start: Start) -> None:
    bench = start(workers=3)
    bench.dispatcher.ready.result(WAIT_S)
    assert bench.score(job_of(100, scenes=7)).total.tolist() == expected(100)
    assert sorted(x for worker in bench.made for rows in worker.rows for x in rows) == expected(100)
    assert bench.score(job_of(0)).total.tolist() == []
    stats = bench.dispatcher.stats
    assert (stats.rows, stats.failures, stats.restarts, stats.retries) == (100, 0, 0, 0)
    assert stats.prepared == sum(len(worker.rows) for worker in bench.made)
    assert 100 <= stats.cached_bytes <= 300


def test_scene_meets_the_worker_that_knows_it(start: Start) -> None:
    slow = LIMITS
    bench = start(lambda n: StandIn(n, lambda worker, plans: done(result_of(plans))), workers=2, limits=slow)
    for _ in range(5):
        bench.score(job_of(12, scenes=4))  # 6 rows for each worker, less than a shard
    assert [worker.rows for worker in bench.made] == [[[1, 5, 9, 3, 7, 11]] * 5, [[2, 6, 10, 4, 8, 12]] * 5]


def test_answer_of_a_worker_that_was_replaced_is_not_used(start: Start) -> None:
    late: Future[Any] = Future()
    held: list[Trajectories] = []

    def never(worker: StandIn, plans: Trajectories) -> Future[Any]:
        worker.answers = False
        held.append(plans)
        return late

    bench = start(lambda n: StandIn(n, never if n == 0 else None), workers=1)
    job = job_of(3)
    bench.dispatcher.add(job)
    scores = job.future.result(WAIT_S)
    wrong = result_of(held[0])
    late.set_result(dataclasses.replace(wrong, scores=dataclasses.replace(wrong.scores, total=wrong.scores.total * 0)))
    deadline = time.monotonic() + WAIT_S
    while bench.dispatcher.stats.late == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert scores.total.tolist() == expected(3)
    assert bench.made[0].killed
    stats = bench.dispatcher.stats
    assert (stats.hangs, stats.deaths, stats.restarts, stats.retries, stats.late) == (1, 0, 1, 3, 1)


def test_worker_that_answers_pings_may_take_its_time(start: Start) -> None:
    slow: Future[Any] = Future()
    held: list[Trajectories] = []

    def work(worker: StandIn, plans: Trajectories) -> Future[Any]:
        held.append(plans)
        return slow

    bench = start(lambda n: StandIn(n, work), workers=1)
    job = job_of(3)
    bench.dispatcher.add(job)
    time.sleep(1.5)  # pinged from 0.5 s on; silence of 0.3 s would end it
    slow.set_result(result_of(held[0]))
    assert job.future.result(WAIT_S).total.tolist() == expected(3)
    assert (bench.dispatcher.stats.hangs, len(bench.made)) == (0, 1)


def test_call_that_takes_too_long_is_ended_though_the_worker_answers(start: Start) -> None:
    limits = Limits(timeout_s=0.0, terms=1, start_s=5.0, stall_s=0.2, call_s=0.3)
    bench = start(lambda n: StandIn(n, (lambda w, p: Future()) if n == 0 else None), workers=1, limits=limits)
    assert bench.score(job_of(2)).total.tolist() == expected(2)
    assert bench.dispatcher.stats.hangs == 1


def test_worker_that_dies_with_nothing_to_do_is_replaced_and_nobody_blamed(start: Start) -> None:
    bench = start(workers=1, max_retries=0)
    assert bench.score(job_of(1)).total.tolist() == [1.0]
    bench.made[0].end.set_exception(WorkerLostError("out of memory"))
    deadline = time.monotonic() + WAIT_S
    while bench.dispatcher.stats.restarts == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert bench.score(job_of(1)).total.tolist() == [1.0]  # with max_retries=0 one death would have cost the row
    assert (bench.dispatcher.stats.deaths, len(bench.made)) == (1, 2)


def test_rows_that_kill_raise_or_hang_are_lost_alone(start: Start) -> None:
    def work(worker: StandIn, plans: Trajectories) -> Future[Any]:
        x = plans.poses[:, -1, 0]
        if 7.0 in x:
            return done(WorkerLostError("segmentation fault"))
        if 20.0 in x:
            return done(MemoryError("no more"))
        if 33.0 in x:
            worker.answers = False
            return Future()
        return done(result_of(plans))

    bench = start(lambda n: StandIn(n, work), workers=2)
    scores = bench.score(job_of(40))
    lost = {row: (failure.source, failure.kind) for row, failure in scores.failures.items()}
    assert lost == {6: ("worker", "worker_died"), 19: ("worker", "raised"), 32: ("worker", "timeout")}
    good = np.setdiff1d(np.arange(40), [6, 19, 32])
    assert scores.total[good].tolist() == (good + 1.0).tolist()
    assert np.isnan(scores.total[[6, 19, 32]]).all()
    assert scores.failures[6].reason == "scene 's0': the worker that scored it died: segmentation fault (3 times)"
    assert scores.failures[19].reason == "scene 's0': the worker that scored it raised MemoryError: no more"
    # whole, whole again, then the row three times; and the hang once in a shard and twice alone
    assert (bench.dispatcher.stats.deaths, bench.dispatcher.stats.hangs) == (5, 3)


def test_worker_that_left_many_threads_behind_is_replaced_after_its_shard(start: Start) -> None:
    def work(worker: StandIn, plans: Trajectories) -> Future[Any]:
        return done(dataclasses.replace(result_of(plans), abandoned=33 if worker.number == 0 else 32))

    bench = start(lambda n: StandIn(n, work), workers=1)
    assert bench.score(job_of(40)).total.tolist() == expected(40)
    assert [worker.killed for worker in bench.made] == [True, False]
    assert (bench.dispatcher.stats.restarts, bench.dispatcher.stats.deaths) == (1, 0)


def test_reward_that_cannot_be_built_is_reported_at_once(start: Start) -> None:
    def broken(number: int) -> StandIn:
        worker = StandIn(number)
        worker.started = done(PluginError("there is no file"))
        return worker

    bench = start(broken, workers=1)
    with pytest.raises(PluginError, match="there is no file"):
        bench.dispatcher.ready.result(WAIT_S)
    assert len(bench.made) == 1


def test_start_that_fails_is_tried_again_and_given_up_at_last(start: Start) -> None:
    def dying(number: int) -> StandIn:
        worker = StandIn(number)
        worker.started = done(WorkerLostError("died"))
        return worker

    assert start(lambda n: StandIn(n) if n else dying(n), workers=1).dispatcher.ready.result(WAIT_S) is None
    hopeless = start(dying, workers=1)
    with pytest.raises(WorkerLostError):
        hopeless.dispatcher.ready.result(WAIT_S)
    assert len(hopeless.made) == 4


def test_jobs_end_when_no_worker_can_be_started_any_more(start: Start) -> None:
    def make(number: int) -> StandIn:
        worker = StandIn(number, lambda w, p: done(WorkerLostError("gone")))
        if number:
            worker.started = done(PluginError("file was deleted"))
        return worker

    bench = start(make, workers=1)
    with pytest.raises(RewardError, match="No reward worker can be started any more: PluginError: file was deleted"):
        bench.score(job_of(5))


def test_start_that_takes_too_long_is_ended(start: Start) -> None:
    def make(number: int) -> StandIn:
        worker = StandIn(number)
        worker.started = Future() if number == 0 else worker.started
        return worker

    bench = start(make, workers=1, limits=dataclasses.replace(LIMITS, start_s=0.2))
    with pytest.raises(RewardError, match=r"did not start within 0\.2 s.*too few CPUs free for 1 of them"):
        bench.dispatcher.ready.result(WAIT_S)
    assert bench.score(job_of(3)).total.tolist() == expected(3)
    assert bench.made[0].killed


def test_ending_cancels_or_waits(start: Start) -> None:
    held: list[tuple[Future[Any], Trajectories]] = []

    def work(worker: StandIn, plans: Trajectories) -> Future[Any]:
        held.append((Future(), plans))
        return held[-1][0]

    bench = start(lambda n: StandIn(n, work), workers=1)
    job = job_of(3)
    bench.dispatcher.add(job)
    deadline = time.monotonic() + WAIT_S
    while not held and time.monotonic() < deadline:
        time.sleep(0.01)
    bench.dispatcher.close(cancel=True)
    with pytest.raises(CancelledError):
        job.future.result(0.0)
    second = job_of(3)
    bench.dispatcher.add(second)
    held[0][0].set_result(result_of(held[0][1]))  # nobody wants this any more; the worker goes on to the next
    while len(held) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    held[1][0].set_result(result_of(held[1][1]))
    bench.dispatcher.close(cancel=False)
    assert second.future.result(0.0).total.tolist() == expected(3)
    bench.dispatcher.end()
    assert all(worker.killed for worker in bench.made)
    with pytest.raises(RewardError, match="have ended"):
        bench.dispatcher.add(job_of(1))


def test_job_under_way_when_the_thread_ends_gets_an_error(start: Start) -> None:
    bench = start(lambda n: StandIn(n, lambda w, p: Future()), workers=1)
    job = job_of(3)
    bench.dispatcher.add(job)
    bench.dispatcher.end()
    with pytest.raises(RewardError, match="closed before"):
        job.future.result(WAIT_S)


def test_scene_that_cannot_be_sent_ends_its_job_alone(start: Start) -> None:
    bench = start(workers=1)
    bench.dispatcher._fetch = lambda scene: 1 / 0 if scene.token == "s1" else scene.token
    with pytest.raises(RewardError, match="cannot be sent to a reward worker: ZeroDivisionError"):
        bench.score(job_of(4, scenes=2))
    assert bench.score(job_of(4)).total.tolist() == expected(4)


def test_what_goes_wrong_in_the_thread_reaches_those_who_wait(start: Start) -> None:
    def two_columns(worker: StandIn, plans: Trajectories) -> Future[Any]:
        result = result_of(plans)
        return done(dataclasses.replace(result, scores=dataclasses.replace(result.scores, names=("other",))))

    bench = start(lambda n: StandIn(n, two_columns), workers=1)
    with pytest.raises(RewardError, match="same version of rlhf-drive"):
        bench.score(job_of(2))
