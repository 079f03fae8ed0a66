"""Several processes that run one command: one voice, one error, one folder, and nothing left running."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from rlhf_drive.errors import ConfigError
from rlhf_drive.training.launch import check_shared, is_main, launched, one_voice, process_group, quiet_unless_main

ROOT = Path(__file__).resolve().parents[2]
JOB = ROOT / "tests" / "oracles" / "launched_job.py"


@dataclass(frozen=True)
class Ended:
    """What two processes left."""

    codes: list[int]
    out: list[str]
    err: list[str]
    seconds: float


def environment(**more: str) -> dict[str, str]:
    """Ours, with the source tree and one thread."""
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"} | more


@contextmanager
def ended_in_any_case(processes: list[subprocess.Popen[str]]) -> Iterator[None]:
    """No process outlives the test."""
    try:
        yield
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def two_processes(case: str, folder: Path) -> Ended:
    """Run the job in two processes with the environment of a launcher, whose store is here."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    launcher = {
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
    }  # fmt: skip
    started = time.monotonic()
    processes = [
        subprocess.Popen(
            [sys.executable, str(JOB), case, str(folder)], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=environment(**launcher, RANK=str(rank), LOCAL_RANK=str(rank)),
        )
        for rank in (0, 1)
    ]  # fmt: skip
    with ended_in_any_case(processes):
        said = [process.communicate(timeout=90) for process in processes]
    codes = [process.returncode for process in processes]
    return Ended(codes, [out for out, _ in said], [err for _, err in said], time.monotonic() - started)


def test_only_the_main_process_speaks(tmp_path: Path) -> None:
    ended = two_processes("fine", tmp_path)
    assert (ended.codes, ended.err) == ([0, 0], ["", ""])
    assert ended.out == ["all here: [0, 1]\n", ""]
    assert [path.name for path in tmp_path.iterdir()] == ["closed"]  # no marker is left


def test_an_error_of_one_ends_all_with_its_message_alone(tmp_path: Path) -> None:
    ended = two_processes("one", tmp_path)
    assert ended.err == ["", "Error: process 1 lacks a file\n"]
    assert ended.codes == [1, 2]
    # Launchers end all processes when one has ended: process 1 stays until the main one's service is closed.
    assert (tmp_path / "at-exit").read_text() == "closed: True"
    assert ended.seconds < 25  # nobody waited for the group's 60 s, or for all of the time to close services


def test_the_same_error_of_all_is_said_once(tmp_path: Path) -> None:
    ended = two_processes("wrong", tmp_path)
    assert sorted(ended.err) == ["", "Error: everybody reads the same wrong recipe\n"]
    assert sorted(ended.codes) == [1, 2]


def test_a_defect_shows_one_trace(tmp_path: Path) -> None:
    ended = two_processes("defect", tmp_path)
    assert ended.err[1] == ""
    assert ended.err[0].count("Traceback") == 1
    assert ended.err[0].endswith("ZeroDivisionError: a defect\n")
    assert ended.codes == [1, 1]


def test_machines_that_do_not_share_the_folder_are_told_so(tmp_path: Path) -> None:
    ended = two_processes("elsewhere", tmp_path)
    assert "".join(ended.err).count("Error: ") == 1
    assert "is not the same folder on all machines: 1 of 2 processes, the first on " in "".join(ended.err)
    assert sorted(ended.codes) == [1, 2]
    assert not list(tmp_path.rglob(".seen-*"))


def test_a_process_alone_has_no_group_and_speaks(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert (launched(), is_main()) == (False, True)
    with process_group("cpu", 1.0) as ranks, quiet_unless_main():
        print("here")
        check_shared(tmp_path / "nowhere", ranks)  # nobody to share it with
    assert (ranks.index, ranks.count, dist.is_initialized()) == (0, 1, False)
    assert capsys.readouterr().out == "here\n"


def test_a_process_alone_reports_errors_on_purpose_and_lets_others_through() -> None:
    seen: list[str] = []

    def report(error: Exception) -> int:
        seen.append(str(error))
        return 7

    with pytest.raises(SystemExit) as ended, one_voice(report):
        raise ConfigError("wrong")
    assert (ended.value.code, seen) == (7, ["wrong"])
    with pytest.raises(ZeroDivisionError), one_voice(report):
        raise ZeroDivisionError


def test_a_launched_process_other_than_the_main_one_is_quiet(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("WORLD_SIZE", "3"), ("RANK", "2")):
        monkeypatch.setenv(name, value)
    assert (launched(), is_main()) == (True, False)
    with quiet_unless_main():
        print("nobody hears this")
    print("but this")
    assert capsys.readouterr().out == "but this\n"
