"""What state a run is in follows from its lock, its stages and its checkpoints."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_drive.errors import DataError
from rlhf_drive.runs.folders import checkpoints, find_runs, open_run, planned_stages, state_of
from rlhf_drive.training.run_lock import run_lock

MakeRun = Callable[..., Path]
Line = Callable[..., dict[str, Any]]


def test_a_run_whose_stages_are_done_is_finished(make_run: MakeRun, line: Line) -> None:
    path = make_run(lines=[line(9)], done=["sft", "rl-seed0", "compare"])
    assert planned_stages(open_run(path)) == ["sft", "rl-seed0", "compare"]
    assert state_of(open_run(path)) == "finished"


@pytest.mark.parametrize(
    ("last", "kept", "state"), [(4, [2, 4], "stopped"), (5, [2, 4], "killed"), (1, [], "killed"), (3, [4], "killed")]
)
def test_a_checkpoint_of_the_last_step_tells_a_stop_from_a_kill(
    make_run: MakeRun, line: Line, last: int, kept: list[int], state: str
) -> None:
    path = make_run(lines=[line(step) for step in range(1, last + 1)], done=["sft"], checkpoints={"rl-seed0": kept})
    assert checkpoints(open_run(path)) == ({"rl-seed0": kept} if kept else {})
    assert state_of(open_run(path)) == state


def test_a_run_between_two_stages_has_lost_nothing(make_run: MakeRun, line: Line) -> None:
    path = make_run(lines=[line(9)], done=["sft", "rl-seed0"])
    assert state_of(open_run(path)) == "stopped"


def test_who_holds_the_lock_runs(make_run: MakeRun, line: Line) -> None:
    path = make_run(lines=[line(1)])
    with run_lock(path):
        assert state_of(open_run(path)) == "running"
    assert state_of(open_run(path)) == "killed"  # the lock file stays


def test_looking_does_not_keep_a_run_from_starting(make_run: MakeRun, line: Line) -> None:
    path = make_run(lines=[line(1)])
    with run_lock(path):
        pass
    assert state_of(open_run(path)) == "killed"
    with run_lock(path) as locked:
        assert locked


HOLD = """
import sys, time
from pathlib import Path
from rlhf_drive.training.run_lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_ends_with_a_killed_process(make_run: MakeRun, line: Line) -> None:
    path = make_run(lines=[line(1)])
    root = str(Path(__file__).resolve().parents[2])
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": root}
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        assert state_of(open_run(path)) == "running"
    finally:
        process.kill()
        process.wait()
    assert state_of(open_run(path)) == "killed"
    assert json.loads((path / ".lock").read_text()) == {"pid": process.pid, "host": socket.gethostname()}


def test_runs_are_found_at_two_depths_the_latest_first(make_run: MakeRun, line: Line, tmp_path: Path) -> None:
    old, new = make_run("old", [line(1)]), make_run("sweep/new", [line(1)])
    for name in ("recipe.yaml", "stages.json", "metrics.jsonl"):
        os.utime(old / name, (1_000, 1_000))
        os.utime(new / name, (2_000, 2_000))
    assert [run.name for run in find_runs(tmp_path / "runs")] == ["new", "old"]
    assert [run.name for run in find_runs(old)] == ["old"]


def test_settings_are_read_by_their_full_key(make_run: MakeRun) -> None:
    run = open_run(make_run())
    assert (run.setting("rl.max_steps"), run.setting("rl.nothing", 7), run.setting("job.x")) == (9, 7, None)
    assert run.identity == "0123456789abcdef"


def test_what_is_no_run_is_said_with_what_is_near(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("one")
    with pytest.raises(DataError, match=r"There is no folder .*/two. .*runs holds the runs one\."):
        open_run(tmp_path / "runs" / "two")
    with pytest.raises(DataError, match=r"is no run folder: it has no recipe.yaml. It holds runs: .*/runs/one\."):
        open_run(tmp_path / "runs")
    with pytest.raises(DataError, match="There is no folder"):
        find_runs(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["recipe.yaml", "stages.json"])
def test_a_damaged_folder_is_named(make_run: MakeRun, name: str) -> None:
    path = make_run()
    (path / name).write_text("[1, 2" if name == "stages.json" else "- a\n- b\n")
    with pytest.raises(DataError, match=str(path)):
        open_run(path)
