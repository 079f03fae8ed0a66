"""Calls that hang, die or are interrupted are left behind; the next call finds a thread."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from rewards import call_thread
from rewards.call_thread import CallStoppedError, CallThread, CallTimeoutError, NoThreadError, WorkerDiedError


@pytest.fixture
def release() -> Iterator[threading.Event]:
    """Ends the calls that hang when the test is over."""
    event = threading.Event()
    yield event
    event.set()


def same(value: Any) -> Any:
    return value


def ended(thread: threading.Thread) -> bool:
    thread.join(5.0)
    return not thread.is_alive()


def test_calls_share_a_daemon_thread_and_finish_there() -> None:
    calls = CallThread("mine")
    seen = [calls.call(threading.current_thread, lambda t: (t, threading.current_thread())) for _ in range(3)]
    assert len({id(thread) for pair in seen for thread in pair}) == 1
    thread = seen[0][0]
    assert (thread.daemon, thread.name, thread is threading.current_thread()) == (True, "mine", False)
    calls.close()
    assert ended(thread)
    assert calls.call(lambda: 5, same) == 5
    assert (calls.restarts, calls.abandoned, calls.timeouts) == (0, 0, 0)
    calls.close()


def test_late_call_is_left_behind_and_the_next_one_gets_a_fresh_thread(release: threading.Event) -> None:
    calls = CallThread("mine", timeout_s=0.4)
    first = calls.call(threading.current_thread, same)
    began = time.monotonic()
    with pytest.raises(CallTimeoutError):
        calls.call(release.wait, same)
    assert 0.4 <= time.monotonic() - began < 3.0
    second = calls.call(threading.current_thread, same)
    assert second is not first
    assert (calls.timeouts, calls.abandoned, calls.restarts) == (1, 1, 1)
    assert first.is_alive()
    release.set()
    assert ended(first)  # it does not outlive its call
    assert calls.call(threading.current_thread, same) is second
    calls.close()


def test_limit_is_for_a_call_and_waiting_for_ones_turn_is_free() -> None:
    calls = CallThread("mine", timeout_s=0.8)
    done: list[int] = []
    threads = [
        threading.Thread(target=lambda i=i: done.append(calls.call(lambda: time.sleep(0.2) or i, same)))  # type: ignore[misc]
        for i in range(5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == [0, 1, 2, 3, 4]  # 1 s in all
    assert calls.timeouts == 0
    calls.close()


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), TimeoutError("the user's own")])
def test_what_a_call_raises_is_raised_and_the_thread_kept(error: BaseException) -> None:
    def raising() -> None:
        raise error

    calls = CallThread("mine", timeout_s=5.0)
    thread = calls.call(threading.current_thread, same)
    with pytest.raises(type(error)):
        calls.call(raising, same)
    assert calls.call(threading.current_thread, same) is thread
    assert calls.timeouts == 0
    calls.close()


@pytest.mark.parametrize("timeout_s", [0.0, 30.0])
def test_call_that_ends_its_thread_is_told_and_the_thread_comes_back(timeout_s: float) -> None:
    def leaving() -> None:
        raise SystemExit(3)

    calls = CallThread("mine", timeout_s)
    for time_round in (1, 2, 3):
        with pytest.raises(WorkerDiedError, match="SystemExit: 3"):
            calls.call(leaving, same)
        assert calls.call(lambda: 7, same) == 7
        assert (calls.restarts, calls.abandoned) == (time_round, 0)
    calls.close()


def test_thread_on_its_way_out_gets_no_further_call(monkeypatch: pytest.MonkeyPatch) -> None:
    run = call_thread._Worker.run

    def lingering(self: Any) -> None:
        run(self)
        time.sleep(0.2)

    def leaving() -> None:
        raise SystemExit

    monkeypatch.setattr(call_thread._Worker, "run", lingering)
    calls = CallThread("mine")
    with pytest.raises(WorkerDiedError):
        calls.call(leaving, same)
    assert calls.call(lambda: 7, same) == 7
    calls.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_thread_that_vanishes_does_not_hang_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = CallThread("mine")
    monkeypatch.setattr(call_thread._Worker, "_do", lambda self, job: (_ for _ in ()).throw(SystemExit))
    with pytest.raises(WorkerDiedError, match="its thread ended"):
        calls.call(lambda: 1, same)
    monkeypatch.undo()
    assert calls.call(lambda: 1, same) == 1
    assert (calls.restarts, calls.abandoned) == (1, 0)
    calls.close()


def test_number_of_calls_left_behind_is_limited(release: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_thread, "MAX_ABANDONED", 2)
    calls = CallThread("mine", timeout_s=0.3)
    for _ in range(2):
        with pytest.raises(CallTimeoutError):
            calls.call(release.wait, same)
    made: list[int] = []
    with pytest.raises(NoThreadError, match="2 earlier calls still hang"):
        calls.call(lambda: made.append(1), same)
    assert made == []
    release.set()
    assert all(ended(worker) for worker in calls._left)
    assert calls.call(lambda: 4, same) == 4  # they have ended, so calls are made again
    assert calls.abandoned == 2
    calls.close()


def test_stop_gives_the_call_up(release: threading.Event) -> None:
    calls, stop = CallThread("mine"), threading.Event()
    threading.Timer(0.1, stop.set).start()
    began = time.monotonic()
    with pytest.raises(CallStoppedError):
        calls.call(release.wait, same, stop)
    assert time.monotonic() - began < 2.0
    assert calls.call(lambda: 4, same) == 4
    calls.close()


def test_coroutines_are_awaited_in_one_event_loop() -> None:
    async def work() -> asyncio.AbstractEventLoop:
        await asyncio.sleep(0)
        return asyncio.get_running_loop()

    calls = CallThread("mine", timeout_s=5.0)
    assert calls.call(work, same) is calls.call(work, same)
    calls.close()


def test_coroutine_that_is_late_is_cancelled_and_its_thread_kept() -> None:
    cancelled: list[int] = []

    async def sleeping() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            cancelled.append(1)

    calls = CallThread("mine", timeout_s=0.4)
    thread = calls.call(threading.current_thread, same)
    with pytest.raises(CallTimeoutError):
        calls.call(sleeping, same)
    assert cancelled == [1]
    assert calls.call(threading.current_thread, same) is thread
    assert (calls.timeouts, calls.abandoned, calls.restarts) == (1, 0, 0)
    calls.close()


def test_coroutine_that_will_not_be_cancelled_is_left_behind(
    release: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(call_thread, "_GRACE_S", 0.1)

    async def stubborn() -> None:
        while not release.is_set():
            try:
                await asyncio.sleep(0.02)
            except asyncio.CancelledError:
                continue

    calls = CallThread("mine", timeout_s=0.3)
    with pytest.raises(CallTimeoutError):
        calls.call(stubborn, same)
    assert (calls.timeouts, calls.abandoned) == (1, 1)
    assert calls.call(lambda: 1, same) == 1
    calls.close()


def _own_timeout() -> Callable[[], Any]:
    async def work() -> None:
        raise TimeoutError("the server took too long")

    return work


def _own_cancel() -> Callable[[], Any]:
    async def work() -> None:
        raise asyncio.CancelledError

    return work


@pytest.mark.parametrize(
    ("work", "error", "match"),
    [(_own_timeout(), TimeoutError, "server took"), (_own_cancel(), RuntimeError, "cancelled from within")],
)
def test_coroutines_own_errors_are_not_ours(work: Callable[[], Any], error: type[Exception], match: str) -> None:
    calls = CallThread("mine", timeout_s=5.0)
    with pytest.raises(error, match=match):
        calls.call(work, same)
    assert (calls.timeouts, calls.restarts) == (0, 0)
    calls.close()


def test_thread_ends_with_its_owner() -> None:
    calls = CallThread("mine")
    thread = calls.call(threading.current_thread, same)
    del calls
    gc.collect()
    assert ended(thread)
