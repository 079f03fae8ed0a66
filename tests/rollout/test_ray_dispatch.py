"""Handing out chunks with workers that are stand-ins: versions, losses, errors, and ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_drive.errors import ConfigError, PluginError, RolloutError
from rlhf_drive.policies import Decoding
from rlhf_drive.workers import WorkerInfo, WorkerLostError
from rollout import ray_dispatch
from rollout.ray_dispatch import RolloutDispatcher
from rollout.ray_worker import Loaded, Sampled
from rollout.transport import SampleCall, SentScene
from rollout.weights import SentWeights

WAIT_S = 10.0


def done(value: object = None) -> Future[Any]:
    future: Future[Any] = Future()
    if isinstance(value, BaseException):
        future.set_exception(value)
    else:
        future.set_result(value)
    return future


def weights(version: int) -> SentWeights:
    return SentWeights(version, version + 100, (), 96_000_000, 1, (), 0)


def call(step: int, scenes: int = 2) -> SampleCall:
    sent = tuple(SentScene(f"s{step}.{i}", {}) for i in range(scenes))
    return SampleCall(sent, 3, Decoding(4, "causal", 1.0, 0), step, keep_experts=False)


def sampled(call: SampleCall, sent: SentWeights) -> Sampled:
    """What comes back: which step it was, and by which weights."""
    plans: Any = SimpleNamespace(tokens=range(len(call.scenes) * 3), made=(call.step, sent.version))
    return Sampled(plans, sent.number, 0.5)


class StandIn:
    """A worker that samples at once, unless a test says otherwise."""

    def __init__(self, number: int, on_sample: Callable[..., Future[Any]] | None = None) -> None:
        self.number, self.on_sample = number, on_sample
        self.started: Future[Any] = done(WorkerInfo(number, "here"))
        self.end: Future[Any] = Future()
        self.killed = False
        self.loaded: list[int] = []
        self.fetched: list[int] = []
        self.steps: list[int] = []
        self.on_load: Callable[[SentWeights], Future[Any]] | None = None
        self.on_fetch: Callable[[SentWeights], Future[Any]] | None = None

    def start(self) -> Future[WorkerInfo]:
        return self.started

    def fetch(self, sent: SentWeights) -> Future[None]:
        self.fetched.append(sent.version)
        return self.on_fetch(sent) if self.on_fetch else done(OSError("a hint that is not taken; loading will tell"))

    def load(self, sent: SentWeights) -> Future[Loaded]:
        self.loaded.append(sent.version)
        return self.on_load(sent) if self.on_load else done(Loaded(sent.number, 0.0))

    def sample(self, sent: SentWeights, call: SampleCall) -> Future[Sampled]:
        self.steps.append(call.step)
        return self.on_sample(self, sent, call) if self.on_sample else done(sampled(call, sent))

    def ping(self) -> Future[None]:
        return done()

    def gone(self) -> Future[None]:
        return self.end

    def kill(self) -> None:
        self.killed = True


class Bench:
    """A dispatcher, and every stand-in it has started."""

    def __init__(self, make: Callable[[int], StandIn], **options: Any) -> None:
        self.made: list[StandIn] = []

        def spawn() -> StandIn:
            self.made.append(make(len(self.made)))
            return self.made[-1]

        settings = {"workers": 2, "timeout_s": 60.0, "start_s": 5.0, "start_hint": "Why?", "max_retries": 2}
        unpack = options.pop("unpack", lambda packed: packed.made)
        self.dispatcher = RolloutDispatcher(spawn, unpack, lambda: True, **(settings | options))
        self.dispatcher.use(weights(1))

    def add(self, step: int, scenes: int = 2) -> Future[Any]:
        return self.dispatcher.add(call(step, scenes))

    @property
    def stats(self) -> Any:
        return self.dispatcher.stats(0.25)


Start = Callable[..., Bench]


@pytest.fixture
def start() -> Iterator[Start]:
    benches: list[Bench] = []

    def make(make: Callable[[int], StandIn] = StandIn, **options: Any) -> Bench:
        benches.append(Bench(make, **options))
        return benches[-1]

    yield make
    for bench in benches:
        bench.dispatcher.end()


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def first_only(action: Callable[..., Future[Any]]) -> Callable[[int], StandIn]:
    """Workers of which the first does something else than sampling."""
    return lambda number: StandIn(number, action if number == 0 else None)


def test_chunks_of_several_threads_come_back_each_to_its_own(start: Start) -> None:
    bench = start(workers=3)
    found: dict[int, Any] = {}

    def ask(first: int) -> None:
        futures = {step: bench.add(step) for step in range(first, first + 25)}
        found.update({step: future.result(WAIT_S) for step, future in futures.items()})

    threads = [threading.Thread(target=ask, args=(first,)) for first in (0, 100, 200, 300)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert found == {step: (step, 1) for first in (0, 100, 200, 300) for step in range(first, first + 25)}
    stats = bench.stats
    assert (stats.rollouts, stats.busy_s, stats.workers, stats.queued) == (600, 50.0, 3, 0)
    assert (stats.restarts, stats.retries, stats.push_s) == (0, 0, 0.25)
    assert all(worker.loaded in ([], [1]) for worker in bench.made)  # weights are loaded once


def test_what_waits_is_sampled_with_the_newest_weights_and_what_is_under_way_with_its_own(start: Start) -> None:
    held: list[tuple[Future[Any], SentWeights, SampleCall]] = []

    def hold(worker: StandIn, sent: SentWeights, call: SampleCall) -> Future[Any]:
        held.append((Future(), sent, call))
        return held[-1][0]

    bench = start(lambda n: StandIn(n, hold), workers=1)
    futures = [bench.add(step) for step in range(3)]
    until(lambda: len(held) == 1)
    until(lambda: bench.stats.queued == 2)
    bench.dispatcher.use(weights(2))
    bench.dispatcher.use(weights(3))
    until(lambda: 3 in bench.made[0].fetched)
    for i in range(3):
        until(lambda: len(held) == i + 1)  # noqa: B023
        held[i][0].set_result(sampled(held[i][2], held[i][1]))
    assert [future.result(WAIT_S) for future in futures] == [(0, 1), (1, 3), (2, 3)]
    assert bench.made[0].loaded == [1, 3]


def test_worker_that_fetches_slowly_is_told_of_the_newest_weights_only(start: Start) -> None:
    slow: Future[Any] = Future()

    def make(number: int) -> StandIn:
        worker = StandIn(number)
        worker.on_fetch = lambda sent: slow if sent.version == 2 else done()
        return worker

    bench = start(make, workers=1)
    assert bench.add(0).result(WAIT_S) == (0, 1)
    bench.dispatcher.use(weights(2))
    until(lambda: bench.made[0].fetched[-1:] == [2])
    for version in range(3, 60):
        bench.dispatcher.use(weights(version))
    assert bench.add(1).result(WAIT_S) == (1, 59)
    assert bench.made[0].fetched[-1] == 2  # one call holds one version, whatever happens
    slow.set_result(None)
    until(lambda: bench.made[0].fetched[-1] == 59)
    assert bench.made[0].fetched in ([2, 59], [1, 2, 59])


def test_worker_that_dies_is_replaced_and_its_chunk_sampled_first(start: Start) -> None:
    dies: Future[Any] = Future()
    bench = start(first_only(lambda worker, sent, call: dies), workers=1)
    futures = [bench.add(step) for step in range(3)]
    until(lambda: bench.stats.queued == 2)
    bench.dispatcher.use(weights(2))
    dies.set_exception(WorkerLostError("killed"))
    assert [future.result(WAIT_S) for future in futures] == [(0, 2), (1, 2), (2, 2)]
    assert bench.made[1].steps == [0, 1, 2]
    assert bench.made[1].loaded == [2]  # a new process has no weights
    assert bench.made[0].killed
    assert (bench.stats.restarts, bench.stats.retries) == (1, 1)


def test_worker_that_dies_with_nothing_to_do_is_replaced_and_nothing_done_again(start: Start) -> None:
    bench = start(workers=1, max_retries=0)
    assert bench.add(1).result(WAIT_S) == (1, 1)
    bench.made[0].end.set_exception(WorkerLostError("out of memory"))
    until(lambda: bench.stats.restarts == 1)
    assert bench.add(2).result(WAIT_S) == (2, 1)
    assert bench.stats.retries == 0


def test_slow_worker_is_replaced_and_its_late_answer_not_used(start: Start) -> None:
    late: Future[Any] = Future()
    bench = start(first_only(lambda worker, sent, call: late), workers=1, timeout_s=0.2)
    future = bench.add(7)
    assert future.result(WAIT_S) == (7, 1)
    late.set_result(sampled(call(9), weights(1)))
    until(lambda: bench.dispatcher._pool.counts["late"] == 1)
    assert (bench.made[0].killed, bench.stats.restarts, bench.stats.retries, bench.stats.rollouts) == (True, 1, 1, 6)


def test_late_answer_is_not_taken_for_that_of_the_worker_in_its_place(start: Start) -> None:
    late, right = Future[Any](), Future[Any]()
    bench = start(lambda n: StandIn(n, lambda w, s, c: (late, right)[n]), workers=1, timeout_s=2.0)
    future = bench.add(7)
    until(lambda: len(bench.made) == 2 and bench.made[1].steps == [7])
    late.set_result(sampled(call(9), weights(1)))
    until(lambda: bench.dispatcher._pool.counts["late"] == 1)
    right.set_result(sampled(call(7), weights(1)))
    assert future.result(WAIT_S) == (7, 1)


def test_another_worker_takes_over_from_one_that_is_slow(start: Start) -> None:
    bench = start(first_only(lambda worker, sent, call: Future()), workers=2, timeout_s=0.3)
    futures = [bench.add(step) for step in range(8)]
    assert [future.result(WAIT_S)[0] for future in futures] == list(range(8))
    assert bench.made[0].steps == [0]
    assert set(bench.made[1].steps) == set(range(8)) - ({0} if 0 in bench.made[2].steps else set())


def test_chunk_that_is_lost_too_often_is_given_up_with_its_story(start: Start) -> None:
    def fate(worker: StandIn, sent: SentWeights, call: SampleCall) -> Future[Any]:
        if call.step != 4:
            return done(sampled(call, sent))
        return Future() if worker.number == 1 else done(WorkerLostError("segmentation fault"))

    bench = start(lambda n: StandIn(n, fate), workers=1, timeout_s=0.2)
    bad, good = bench.add(4, scenes=7), bench.add(5)
    with pytest.raises(RolloutError) as raised:
        bad.result(WAIT_S)
    died = "died while it was to sample 21 plans of 7 scenes of step 4 with weights version 1 (96 MB)"
    waited = "the driver waited 0.2 s for rollout worker 0 (here, process 1) to sample 21 plans of 7 scenes of step 4"
    assert str(raised.value).startswith(
        "21 plans of 7 scenes of step 4 could not be sampled; workers were lost over them 3 times: "
        f"(1) rollout worker 0 (here, process 0) {died}: segmentation fault; (2) {waited} with weights"
    )
    assert "Scenes: 's4.0', 's4.1', 's4.2', 's4.3', 's4.4' and 2 more." in str(raised.value)
    assert "rollout.timeout_s" in str(raised.value)
    assert good.result(WAIT_S) == (5, 1)
    assert (bench.stats.restarts, bench.stats.retries) == (3, 2)


def test_worker_that_does_not_load_weights_in_time_is_named(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_dispatch, "load_limit_s", lambda sent: 0.1)

    def make(number: int) -> StandIn:
        worker = StandIn(number)
        worker.on_load = lambda sent: Future()
        return worker

    bench = start(make, workers=1, max_retries=0)
    message = r"the driver waited 0\.1 s for rollout worker 0 \(here, process 0\) to load weights version 1 \(96 MB\)"
    with pytest.raises(RolloutError, match=message):
        bench.add(1).result(WAIT_S)


def test_error_of_the_policy_passes_as_it_is_and_says_where(start: Start) -> None:
    bench = start(lambda n: StandIn(n, lambda w, s, c: done(ConfigError("no such order"))), workers=1)
    with pytest.raises(ConfigError, match="no such order") as raised:
        bench.add(3).result(WAIT_S)
    assert str(raised.value) == "no such order"
    assert raised.value.__notes__ == [
        "Raised on rollout worker 0 (here, process 0), which was to sample 6 plans of 2 scenes of step 3."
    ]
    assert (len(bench.made), bench.stats.retries) == (1, 0)


def test_plans_of_other_weights_are_not_used(start: Start) -> None:
    def outdated(worker: StandIn, sent: SentWeights, call: SampleCall) -> Future[Any]:
        return done(sampled(call, weights(1)))

    bench = start(lambda n: StandIn(n, outdated), workers=1)
    assert bench.add(0).result(WAIT_S) == (0, 1)
    bench.dispatcher.use(weights(2))
    with pytest.raises(RolloutError, match=r"weights of push 101 where those of push 102, weights version 2 \(96 MB\)"):
        bench.add(1).result(WAIT_S)
    assert bench.stats.rollouts == 6


def test_rollout_for_which_the_driver_has_no_room_is_lost_alone(start: Start) -> None:
    def unpack(packed: Any) -> Any:
        if packed.made[0] == 1:
            raise MemoryError("no room")
        return packed.made

    bench = start(workers=1, unpack=unpack)
    with pytest.raises(MemoryError):
        bench.add(1).result(WAIT_S)
    assert bench.add(2).result(WAIT_S) == (2, 1)


def test_call_that_cannot_be_sent_fails_alone(start: Start) -> None:
    def full(worker: StandIn, sent: SentWeights, call: SampleCall) -> Future[Any]:
        if call.step == 1:
            raise MemoryError("object store is full")
        return done(sampled(call, sent))

    bench = start(lambda n: StandIn(n, full), workers=1)
    with pytest.raises(RolloutError, match="step 1 cannot be sent to a rollout worker: MemoryError: object store"):
        bench.add(1).result(WAIT_S)
    assert bench.add(2).result(WAIT_S) == (2, 1)


def test_cancelled_chunk_is_not_sampled(start: Start) -> None:
    held: Future[Any] = Future()
    bench = start(lambda n: StandIn(n, lambda w, s, c: held if c.step == 0 else done(sampled(c, s))), workers=1)
    futures = [bench.add(step) for step in range(3)]
    until(lambda: bench.stats.queued == 2)
    assert futures[1].cancel()
    held.set_result(sampled(call(0), weights(1)))
    assert futures[2].result(WAIT_S) == (2, 1)
    assert bench.made[0].steps == [0, 2]
    with pytest.raises(CancelledError):
        futures[1].result(0.0)


def test_closing_gives_up_what_is_under_way_and_what_waits(start: Start) -> None:
    bench = start(lambda n: StandIn(n, lambda w, s, c: Future()), workers=1)
    futures = [bench.add(step) for step in range(2)]
    until(lambda: bench.stats.queued == 1)
    bench.dispatcher.end()
    for future in futures:
        with pytest.raises(RolloutError, match="rollout service was closed before this was done"):
            future.result(0.0)
    with pytest.raises(RolloutError, match="have ended"):
        bench.add(2)
    assert bench.made[0].killed


def test_nobody_waits_when_no_worker_can_be_started_any_more(start: Start) -> None:
    def make(number: int) -> StandIn:
        worker = StandIn(number, lambda w, s, c: done(WorkerLostError("gone")))
        if number:
            worker.started = done(PluginError("the disk is gone"))
        return worker

    bench = start(make, workers=1)
    futures = [bench.add(step) for step in range(2)]
    for future in futures:
        with pytest.raises(RolloutError, match="No rollout worker can be started any more: PluginError: the disk"):
            future.result(WAIT_S)


def test_start_that_takes_too_long_is_explained(start: Start) -> None:
    def make(number: int) -> StandIn:
        worker = StandIn(number)
        worker.started = Future()
        return worker

    bench = start(make, workers=1, start_s=0.2, start_hint="Ray has 1 CPU.")
    with pytest.raises(RolloutError, match=r"A rollout worker did not start within 0\.2 s\. Ray has 1 CPU\."):
        bench.dispatcher.ready.result(WAIT_S)
