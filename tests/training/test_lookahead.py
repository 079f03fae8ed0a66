"""Work ahead of time: bounded, overlapping, in the caller's thread where nothing is to be ahead."""

from __future__ import annotations

import threading
import time

import pytest

from rlhf_drive.errors import RewardError
from rlhf_drive.training.lookahead import Lookahead
from rlhf_drive.training.service_meter import staleness_metrics


def test_without_lookahead_work_is_done_when_asked_for_by_the_caller() -> None:
    log: list[tuple[int, int]] = []

    def work(step: int) -> int:
        log.append((step, threading.get_ident()))
        return 10 * step

    with Lookahead(work, ahead=0, last=3) as line:
        assert line.take(0) == 0
        assert log == [(0, threading.get_ident())]
        assert (line.take(1), line.ready) == (10, 0)
    assert [step for step, _ in log] == [0, 1]


@pytest.mark.parametrize("ahead", [1, 3])
def test_each_step_begins_when_the_one_so_far_before_it_is_taken(ahead: int) -> None:
    """What a step is sampled with is what was there at its beginning: at most `ahead` updates old."""
    last, done, seen = 8, -1, dict[int, int]()

    def work(step: int) -> int:
        seen[step] = done + 1  # updates made so far, which is the version of the weights
        return step

    with Lookahead(work, ahead=ahead, last=last) as line:
        for step in range(last):
            assert line.take(step) == step
            while len(seen) < min(step + ahead + 1, last):  # all that may begin has begun
                time.sleep(0.001)
            done = step
    assert [step - seen[step] for step in range(last)] == [min(step, ahead) for step in range(last)]
    assert sorted(seen) == list(range(last))


def test_the_next_step_is_worked_on_while_the_caller_is_busy() -> None:
    begun = threading.Event()

    def work(step: int) -> int:
        if step == 1:
            begun.set()
        return step

    with Lookahead(work, ahead=1, last=3) as line:
        line.take(0)
        assert begun.wait(10)  # the caller is here, and has not asked for step 1
        assert line.take(1) == 1


def test_waiting_is_measured_and_finished_steps_are_counted() -> None:
    gate = threading.Event()

    def work(step: int) -> int:
        if step == 0:
            time.sleep(0.05)
        else:
            gate.wait(10)
        return step

    with Lookahead(work, ahead=2, last=5) as line:
        line.take(0)
        assert line.waited_s >= 0.05
        assert line.ready == 0
        gate.set()
        deadline = time.monotonic() + 10
        while line.ready < 2 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert line.ready == 2
        line.take(1)
        assert line.waited_s < 0.05


def test_an_error_reaches_the_caller_of_its_own_step() -> None:
    def work(step: int) -> int:
        if step == 1:
            raise RewardError("no score")
        return step

    with Lookahead(work, ahead=1, last=3) as line:
        assert line.take(0) == 0
        with pytest.raises(RewardError, match="no score"):
            line.take(1)
        assert line.take(2) == 2


def test_staleness_is_counted_in_updates() -> None:
    assert staleness_metrics(5, (5, 4, 2, 5)) == {
        "async/staleness_mean": 1.0, "async/staleness_max": 3.0, "async/stale_frac": 0.5,
    }  # fmt: skip
