"""The first signal is a request that all processes agree on, the second one stops at once, and nothing is left set."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from rlhf_drive.errors import RunStoppedError
from rlhf_drive.training import stopping
from rlhf_drive.training.ranks import Ranks
from rlhf_drive.training.stopping import StopSignals, stopped_at_once, stopped_by

ROOT = Path(__file__).resolve().parents[2]
NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Pair(Ranks):
    """This process and one more, whose answers are given."""

    def __init__(self, other: object) -> None:
        super().__init__()
        self.count, self.other = 2, other

    def gather(self, value: object) -> list[object]:  # type: ignore[override]
        return [value, self.other]


@pytest.mark.parametrize("number", NUMBERS)
def test_the_first_signal_is_a_request(number: signal.Signals) -> None:
    before = [signal.getsignal(n) for n in NUMBERS]
    with StopSignals() as signals:
        assert signals.requested is None
        os.kill(os.getpid(), number)
        assert signals.requested == number.name
        assert signals.requested == number.name
    assert [signal.getsignal(n) for n in NUMBERS] == before


def test_all_processes_get_the_same_answer() -> None:
    with StopSignals(Pair("SIGUSR1")) as signals:
        assert signals.seen is None
        assert signals.requested == "SIGUSR1"
    with StopSignals(Pair(None)) as signals:
        assert signals.requested is None


def test_a_repeated_signal_stops_at_once_but_not_within_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now)

    def get(*sent: tuple[float, signal.Signals]) -> str | None:
        nonlocal now
        with StopSignals() as signals:
            for later_s, number in sent:
                now += later_s
                signal.raise_signal(number)
            return signals.requested

    # A launcher passes on what the terminal has sent to its processes already.
    at_once = [(0.0, signal.SIGINT), (0.0, signal.SIGTERM), (0.9, signal.SIGINT)]
    assert get(*at_once) == "SIGINT"
    with pytest.raises(SystemExit) as stopped:
        get(*at_once, (0.2, signal.SIGTERM))
    assert stopped.value.code == 143
    with pytest.raises(KeyboardInterrupt):
        get((0.0, signal.SIGTERM), (2.0, signal.SIGINT))


def test_slurms_warning_is_never_the_first_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now)
    with StopSignals() as signals:
        signal.raise_signal(signal.SIGUSR1)
        now += 60.0
        signal.raise_signal(signal.SIGTERM)  # the job's time is over: still gentle
        now += 60.0
        signal.raise_signal(signal.SIGUSR1)
        assert signals.requested == "SIGUSR1"


def test_a_signal_that_nobody_heard_does_what_it_would_have_done() -> None:
    got = []

    def fail() -> None:
        with StopSignals():
            signal.raise_signal(signal.SIGTERM)
            raise ValueError("own")

    before = signal.signal(signal.SIGTERM, lambda *_: got.append("outer"))
    try:
        with StopSignals() as signals:
            assert signals.requested is None
            signal.raise_signal(signal.SIGTERM)
            assert got == []
        assert got == ["outer"]
        with pytest.raises(ValueError, match="own"):
            fail()
        assert got == ["outer"]  # an error is on its way already
    finally:
        signal.signal(signal.SIGTERM, before)


def test_another_thread_installs_nothing() -> None:
    found = []

    def work() -> None:
        with StopSignals() as signals:
            found.extend([signal.getsignal(signal.SIGTERM), signals.requested])

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before, None]


def test_the_error_says_what_is_kept_and_how_to_go_on() -> None:
    error = stopped_by("SIGINT", "rl-seed0", 12, "rlhf-drive train --resume runs/a")
    assert str(error) == (
        "Stopped by SIGINT after step 12 of rl-seed0; its checkpoint is written. Go on with: rlhf-drive train --resume "
        "runs/a"
    )
    assert error.exit_code == 130
    assert stopped_by("SIGTERM", "sft", 1, None).exit_code == 143
    assert stopped_by("SIGUSR1", "sft", 1, None).exit_code == 128 + signal.SIGUSR1
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.exit_code) == (RunStoppedError, str(error), 130)


def test_a_process_in_a_busy_step_finishes_it_and_is_killed_by_the_third(tmp_path: Path) -> None:
    """In a process of its own: a step that takes a while, and a clean-up that hangs."""
    script = tmp_path / "loop.py"
    script.write_text(
        textwrap.dedent("""
        import sys, time
        from rlhf_drive.training import stopping
        stopping.SAME_S = 0.0
        with stopping.StopSignals() as signals:
            try:
                for step in range(1000):
                    for _ in range(50):
                        time.sleep(0.01)
                    print("done", step, flush=True)
                    if signals.requested and sys.argv[1] == "gentle":
                        sys.exit(7)
            finally:
                print("closing", flush=True)
                time.sleep(0.0 if sys.argv[1] == "gentle" else 60.0)
        """)
    )

    def begin(how: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, str(script), how], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "done 0\n"
        return process

    processes = []
    try:
        processes.append(gentle := begin("gentle"))
        gentle.send_signal(signal.SIGTERM)
        out, err = gentle.communicate(timeout=30)
        assert (gentle.returncode, out) == (7, "done 1\nclosing\n")
        assert "SIGTERM: stopping after this step" in err
        processes.append(hanging := begin("hanging"))
        hanging.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        hanging.send_signal(signal.SIGTERM)
        assert hanging.stdout is not None
        while (line := hanging.stdout.readline()) != "closing\n":
            assert line.startswith("done")
        hanging.send_signal(signal.SIGTERM)  # the clean-up hangs: the system's own answer
        assert hanging.wait(timeout=30) == -signal.SIGTERM
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.parametrize(("ends", "name", "code"), [(signal.SIGINT, "SIGINT", 130), (signal.SIGTERM, "SIGTERM", 143)])
def test_where_no_loop_asks_a_signal_ends_the_block_and_says_how_to_go_on(
    ends: signal.Signals, name: str, code: int
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RunStoppedError, match=rf"by {name}: .* Go on with: go$") as stopped, stopped_at_once("go"):
        signal.raise_signal(ends)
    assert (stopped.value.exit_code, signal.getsignal(signal.SIGTERM)) == (code, before)


def test_another_exit_is_let_through() -> None:
    with pytest.raises(SystemExit) as ended, stopped_at_once("go"):
        raise SystemExit(2)
    assert ended.value.code == 2
