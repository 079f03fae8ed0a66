"""Rows that a function fails on are lost alone, whatever fails, in bounded time."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import CancelledError
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from rewards import isolation
from rewards.call_thread import CallStoppedError, CallTimeoutError, NoThreadError, WorkerDiedError
from rewards.isolation import GIVE_UP_AFTER, OutputError, Pace, RowFailure, call_isolated
from rewards.partly_scored import PartlyScoredError

Rows = NDArray[np.int64]
LIMIT_S = 2.0


class World:
    """A clock, and rows of which some hang, raise or kill their thread; the others take `row_s` each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, row_s: float = 0.001) -> None:
        monkeypatch.setattr(isolation, "time", SimpleNamespace(monotonic=lambda: self.now))
        self.now = 0.0
        self.row_s = row_s
        self.hang: set[int] = set()
        self.kill: set[int] = set()
        self.calls: list[list[int]] = []

    def call(self, work: Callable[[], Any], finish: Callable[[Any], Any]) -> Any:
        rows = work.args[0].tolist()  # type: ignore[attr-defined]
        self.calls.append(rows)
        seconds = math.inf if self.hang & set(rows) else self.row_s * len(rows)
        if seconds > LIMIT_S:
            self.now += LIMIT_S
            raise CallTimeoutError
        self.now += seconds
        if self.kill & set(rows):
            raise WorkerDiedError("it ended its thread")
        return finish(work())

    def run(self, count: int, pace: Pace | None = None) -> tuple[NDArray[np.float64], dict[int, RowFailure]]:
        values, failures = call_isolated(
            lambda rows: rows * 10.0, np.arange(count), 1, call=self.call, pace=pace or Pace(LIMIT_S)
        )
        return values[:, 0], failures

    @property
    def sizes(self) -> list[int]:
        return [len(rows) for rows in self.calls]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def test_calls_grow_while_they_are_quick_and_the_size_is_kept(world: World) -> None:
    pace = Pace(LIMIT_S)
    values, failures = world.run(100, pace)
    assert world.sizes == [1, 2, 4, 8, 16, 32, 37]
    assert [row for rows in world.calls for row in rows] == list(range(100))
    assert (values.tolist(), failures) == ([10.0 * i for i in range(100)], {})
    world.calls.clear()
    world.run(100, pace)
    assert world.sizes == [64, 36]  # the last call of 37 was not a full one, so the size did not grow again


def test_honest_slow_rows_keep_the_limit_without_a_timeout(world: World) -> None:
    world.row_s = 0.3  # 4 rows take 1.2 s, more than half of 2 s: no more than 4 at a time
    _, failures = world.run(20)
    assert (world.sizes, failures) == ([1, 2, 4, 4, 4, 4, 1], {})


def test_rows_that_get_slow_are_called_in_smaller_parts_and_none_is_lost(world: World) -> None:
    pace = Pace(LIMIT_S, rows=64)
    world.row_s = 0.5
    values, failures = world.run(64, pace)
    assert failures == {}
    assert values.tolist() == [10.0 * i for i in range(64)]
    assert pace.rows == 4  # 4 rows fit into 2 s exactly


def test_without_a_limit_there_is_one_call(world: World) -> None:
    world.run(100, Pace())
    assert world.sizes == [100]


def test_one_row_that_hangs_among_many_costs_at_most_log2_limits(world: World) -> None:
    for row in (0, 1, 511, 512, 777, 1023):
        world.hang, world.now = {row}, 0.0
        values, failures = world.run(1024, Pace(LIMIT_S, rows=1024))
        assert failures == {row: ("timeout", "took longer than 2 s")}
        assert np.flatnonzero(np.isnan(values)).tolist() == [row]
        assert world.now <= (1 + 10) * LIMIT_S + 1024 * 2 * world.row_s


def test_hang_in_the_second_half_is_not_confirmed_again_and_again(world: World) -> None:
    world.hang = {1023}
    world.run(1024, Pace(LIMIT_S, rows=1024))
    # All rows ran out of time; where the first half then returns, the second must hang and is halved untried.
    assert sum(1023 in rows for rows in world.calls) == 2
    assert world.calls[0] == list(range(1024))
    assert world.calls[-1] == [1023]


def test_rows_that_hang_do_not_take_their_neighbours(world: World) -> None:
    world.hang = {3, 4, 40}
    values, failures = world.run(64)
    assert sorted(failures) == [3, 4, 40]
    assert {kind for kind, _ in failures.values()} == {"timeout"}
    assert np.flatnonzero(np.isnan(values)).tolist() == [3, 4, 40]


@pytest.mark.parametrize("rows", [1, 1000])
def test_time_is_bounded_when_every_row_hangs_and_untried_rows_say_so(world: World, rows: int) -> None:
    world.hang = set(range(1000))
    values, failures = world.run(1000, Pace(LIMIT_S, rows))
    assert world.now == GIVE_UP_AFTER * LIMIT_S
    assert len(world.calls) == GIVE_UP_AFTER
    assert np.isnan(values).all()
    assert len(failures) == 1000
    tried = [row for row, (_, reason) in failures.items() if reason == "took longer than 2 s"]
    assert all([row] in world.calls for row in tried)
    untried = {failures[row] for row in set(failures) - set(tried)}
    ((kind, reason),) = untried
    assert (kind, reason.partition(";")[0]) == (
        "timeout",
        "given up untried: calls that failed took 64 s (32 of them ran out of time)",
    )


def test_time_lost_to_calls_that_raise_counts_too(world: World) -> None:
    def raising(rows: Rows) -> Any:
        world.now += 1.0
        raise ConnectionError("no route")

    _, failures = call_isolated(raising, np.arange(500), 1, call=world.call, pace=Pace(LIMIT_S))
    assert world.now == pytest.approx(64.0, abs=1.1)
    assert sum(reason == "ConnectionError: no route" for _, reason in failures.values()) >= 30
    assert len(failures) == 500


def test_bound_is_not_tiny_where_the_limit_is(world: World) -> None:
    def raising(rows: Rows) -> Any:
        world.now += 0.01
        raise KeyError("x")

    _, failures = call_isolated(raising, np.arange(300), 1, call=world.call, pace=Pace(0.01))
    assert {reason for _, reason in failures.values()} == {"KeyError: 'x'"}  # 300 calls of 10 ms, within 32 * 0.25 s


def test_lost_thread_costs_the_row_alone(world: World) -> None:
    world.kill = {5, 11}
    values, failures = world.run(16, Pace(LIMIT_S, rows=16))
    assert failures == dict.fromkeys((5, 11), ("worker_died", "it ended its thread"))
    assert np.flatnonzero(np.isnan(values)).tolist() == [5, 11]


def test_call_that_cannot_be_made_gives_up_the_rest_untried() -> None:
    made: list[int] = []
    refused: list[int] = []

    def call(work: Callable[[], Any], finish: Callable[[Any], Any]) -> Any:
        if len(made) == 2:
            refused.append(1)
            raise NoThreadError("64 earlier calls still hang")
        made.append(1)
        return finish(work())

    values, failures = call_isolated(
        lambda rows: rows * 1.0, np.arange(10, 60), 1, call=call, pace=Pace(LIMIT_S, rows=3)
    )
    assert values[:9, 0].tolist() == list(range(10, 19))  # 3 rows, then 6
    assert failures == dict.fromkeys(range(19, 60), ("timeout", "given up untried: 64 earlier calls still hang"))
    assert (len(made), len(refused)) == (2, 1)


def test_future_that_the_function_finds_cancelled_is_its_own_matter() -> None:
    def function(rows: Rows) -> Any:
        raise CancelledError

    _, failures = call_isolated(function, np.arange(2), 1)
    assert failures == dict.fromkeys((0, 1), ("raised", "CancelledError"))


def test_calls_that_are_stopped_are_no_failures() -> None:
    def call(work: Callable[[], Any], finish: Callable[[Any], Any]) -> Any:
        raise CallStoppedError

    with pytest.raises(CallStoppedError):
        call_isolated(lambda rows: rows, np.arange(2), 1, call=call)


def test_exit_in_the_calling_thread_becomes_data() -> None:
    def leaving(rows: Rows) -> Any:
        if 2 in rows:
            raise SystemExit(3)
        return rows

    values, failures = call_isolated(leaving, np.arange(4), 1)
    assert failures == {2: ("worker_died", "SystemExit: 3")}
    np.testing.assert_array_equal(values[:, 0], [0, 1, np.nan, 3])


class Awkward:
    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        raise RuntimeError("requires grad")


@pytest.mark.parametrize(
    ("returned", "reason"),
    [
        (None, "returned None, not numbers"),
        ([1.0, None], "returned list of type object, not numbers"),
        ([[1.0], [1.0, 2.0]], "returned list, not numbers: ValueError: setting an array element with a sequence."),
        (np.ones(2) * 1j, "returned ndarray of type complex128, not numbers"),
        (Awkward(), "returned Awkward, not numbers: RuntimeError: requires grad"),
        ((x for x in (1.0, 2.0)), "returned generator of type object, not numbers"),
        (np.ones(3), "returned shape [3] for 2 rows"),
        (np.ones((2, 2)), "returned shape [2, 2] for 2 rows"),
        (np.float64(1.0), "returned shape [] for 2 rows"),
    ],
)
def test_what_is_not_its_values_loses_all_rows_of_the_call_at_once(returned: object, reason: str) -> None:
    calls: list[int] = []

    def function(rows: Rows) -> object:
        calls.append(len(rows))
        return returned

    values, failures = call_isolated(function, np.array([7, 9]), 1)
    assert sorted(failures) == [7, 9]
    assert all(kind == "wrong_output" and why.startswith(reason) for kind, why in failures.values())
    assert np.isnan(values).all()
    assert calls == [2]


def test_numbers_of_every_kind_are_values() -> None:
    for returned in ([1, 0], [True, False], np.array([1, 0], np.float16), np.array([[1.0], [0.0]])):
        values, failures = call_isolated(lambda rows, returned=returned: returned, np.arange(2), 1)  # type: ignore[misc]
        assert (values[:, 0].tolist(), values.dtype, failures) == ([1.0, 0.0], np.float64, {})


def test_masked_values_are_not_numbers() -> None:
    masked = np.ma.MaskedArray([5, 6], mask=[False, True])
    values, _ = call_isolated(lambda rows: masked, np.arange(2), 1)
    np.testing.assert_array_equal(values[:, 0], [5.0, np.nan])


def test_array_that_the_function_uses_again_is_copied() -> None:
    buffer = np.zeros(1)

    def function(rows: Rows) -> NDArray[np.float64]:
        buffer[:] = rows
        return buffer

    values, _ = call_isolated(function, np.arange(4), 1, pace=Pace(timeout_s=1e-12))  # one row at a time
    assert values[:, 0].tolist() == [0, 1, 2, 3]


def test_failures_that_the_function_reports_itself_are_kept_without_further_calls() -> None:
    calls: list[int] = []

    def function(rows: Rows) -> Any:
        calls.append(len(rows))
        raise PartlyScoredError(np.array([1.0, np.nan, 3.0]), {1: ("unavailable", "not scored")})

    values, failures = call_isolated(function, np.array([4, 5, 6]), 1)
    np.testing.assert_array_equal(values[:, 0], [1, np.nan, 3])
    assert (failures, calls) == ({5: ("unavailable", "not scored")}, [3])


def test_report_about_a_row_that_is_not_there_is_a_wrong_output() -> None:
    def function(rows: Rows) -> Any:
        raise PartlyScoredError(np.ones(2), {2: ("unavailable", "not scored")})

    _, failures = call_isolated(function, np.arange(2), 1)
    assert failures == dict.fromkeys((0, 1), ("wrong_output", "reported a failure of row 2 of 2"))


def test_function_may_refuse_all_rows_at_once() -> None:
    def function(rows: Rows) -> Any:
        raise OutputError("there is no ec")

    _, failures = call_isolated(function, np.arange(3), 1)
    assert failures == dict.fromkeys(range(3), ("wrong_output", "there is no ec"))


def test_message_is_cut_to_one_short_line() -> None:
    def function(rows: Rows) -> Any:
        raise ValueError("x" * 999 + "\nsecond line")

    _, failures = call_isolated(function, np.arange(1), 1)
    assert failures == {0: ("raised", "ValueError: " + "x" * 200)}
