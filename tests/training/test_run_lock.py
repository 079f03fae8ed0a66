"""Two processes never work in one run folder, and a killed one leaves no lock behind."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from rlhf_drive.errors import ConfigError
from rlhf_drive.training.run_lock import LOCK_FILE, run_lock

ROOT = Path(__file__).resolve().parents[2]
HOLDER = textwrap.dedent("""
    import os, sys, time
    from pathlib import Path
    from rlhf_drive.training.run_lock import run_lock
    with run_lock(Path(sys.argv[1])) as held:
        child = os.fork() if sys.argv[2] == "fork" else -1
        if child == 0:
            time.sleep(60)
            os._exit(0)
        print(held, child, flush=True)
        time.sleep(60)
""")


def test_the_second_is_told_who_works_there(tmp_path: Path) -> None:
    with run_lock(tmp_path) as held:
        assert held
        with pytest.raises(ConfigError, match="Another process works in") as raised, run_lock(tmp_path):
            pass
        assert f"process {os.getpid()} on {socket.gethostname()}" in str(raised.value)
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()  # the refused one wrote nothing
    with run_lock(tmp_path) as held:
        assert held


@pytest.mark.parametrize("how", ["alone", "fork"])
def test_a_killed_process_holds_nothing(tmp_path: Path, how: str) -> None:
    """Not even through a child that it forked and that lives on."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path), how], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    child = -1
    try:
        assert holder.stdout is not None
        held, number = holder.stdout.readline().split()
        child = int(number)
        assert held == "True"
        with pytest.raises(ConfigError, match=f"process {holder.pid} on "), run_lock(tmp_path):
            pass
        holder.kill()
        holder.wait()
        assert child == -1 or Path(f"/proc/{child}").exists()
        with run_lock(tmp_path) as again:
            assert again
    finally:
        holder.kill()
        holder.wait()
        if child > 0:
            os.kill(child, 9)


def test_a_holder_that_has_not_written_its_name(tmp_path: Path) -> None:
    with run_lock(tmp_path):
        (tmp_path / LOCK_FILE).write_text("")
        with pytest.raises(ConfigError, match="it has not said which"), run_lock(tmp_path):
            pass


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import fcntl

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with run_lock(tmp_path) as held:
        assert not held
