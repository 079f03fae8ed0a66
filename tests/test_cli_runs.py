"""`rlhf-drive runs` on folders of real and of broken runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from rlhf_drive import cli_runs
from rlhf_drive.cli_runs import runs_app
from rlhf_drive.config import dump_recipe, load_recipe
from rlhf_drive.errors import RlhfDriveError


def _make(path: Path, lines: list[dict[str, Any]] | None, done: tuple[str, ...] = ()) -> Path:
    path.mkdir(parents=True)
    (path / "recipe.yaml").write_text(dump_recipe(load_recipe("quickstart", ["rl.seeds=[0]", "rl.max_steps=9"])))
    (path / "stages.json").write_text(json.dumps({"seconds": 5.0, "done": {stage: {} for stage in done}}))
    if lines is not None:
        (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Folder of a finished run of nine steps, and of one without metrics."""
    lines: list[dict[str, Any]] = [{"phase": "sft", "step": 1, "loss/train": 2.0, "sft/epoch": 1.0}]
    lines += [
        {
            "phase": "rl-seed0", "step": step, "reward/total": step / 10, "time/step_s": 2.0,
            "guard/rollbacks": float(step >= 8),
        }
        for step in range(1, 10)
    ]  # fmt: skip
    _make(tmp_path / "runs" / "whole", lines, ("sft", "rl-seed0", "compare"))
    _make(tmp_path / "runs" / "empty", None)
    return tmp_path / "runs"


def _call(*arguments: object) -> None:
    runs_app([str(argument) for argument in arguments], standalone_mode=False)


def test_list_and_show_fit_into_80_columns(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _call("list", runs)
    listed = capsys.readouterr().out.splitlines()
    assert sorted(line.split()[0] for line in listed[1:]) == ["empty", "whole"]
    _call("show", runs / "whole")
    shown = capsys.readouterr().out.splitlines()
    assert max(map(len, listed + shown)) <= 80
    assert any(line.split()[:5] == ["reward/total", "rl-seed0", "0.1", "->", "0.9"] for line in shown)


def test_without_utf8_courses_are_plain(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_runs, "_knows", str.isascii)
    _call("show", runs / "whole")
    text = capsys.readouterr().out
    assert text.isascii()
    assert "_.-~==+*#" in text  # nine values on eight heights; 3.5 rounds to 4


def test_tail_shows_the_last_steps_as_training_does(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _call("tail", runs / "whole", "--lines", 2)
    # Two steps of 2 s, one left after the first: the clock is the run's own.
    assert capsys.readouterr().out.splitlines() == [
        "rl-seed0 8/9 (undone) | reward 0.800 | step s 2.00 | left 2 s",
        "rl-seed0 9/9 | reward 0.900 | step s 2.00 | left 0 s",
        f"{runs / 'whole'}: finished",
    ]
    _call("tail", runs / "whole", "--lines", 1)  # the line before tells that the count did not rise again
    assert capsys.readouterr().out.splitlines()[0].startswith("rl-seed0 9/9 | ")


def test_plot_writes_the_panels_that_are_asked_for(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _call("plot", runs / "whole", "--out", tmp_path / "a.png")
    assert "(2 panels, 1 run)" in capsys.readouterr().out  # reward/total, time/step_s
    _call("plot", runs / "whole", runs / "whole", "--metric", "guard/", "-m", "loss/train", "--out", tmp_path / "b.png")
    assert "(2 panels, 1 run)" in capsys.readouterr().out  # the same run twice is one
    assert {path.name for path in tmp_path.glob("*.png")} == {"a.png", "b.png"}


def test_runs_of_one_name_are_told_apart_in_a_picture(tmp_path: Path) -> None:
    paths = [tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "b" / "." / "run"]
    for path in paths[:2]:
        path.mkdir(parents=True)
    assert list(cli_runs._names(paths)) == ["a/run", "b/run"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "nothing"), r"There is no folder .*holds the runs empty, whole\."),
        (("show", "."), r"is no run folder: it has no recipe\.yaml\. It holds runs"),
        (("show", "whole", "--phase", "rl-seed1"), r"has no phase 'rl-seed1'. Did you mean 'rl-seed0'"),
        (("show", "empty", "--phase", "sft"), "has no metrics"),
        (("tail", "empty"), r"has no metrics.*not running \(killed\)"),
        (("plot", "empty"), "has no metrics"),
        (("plot", "whole", "empty"), "empty has no metrics"),
        (("plot", "whole", "--metric", "reward/totall"), "Did you mean reward/total"),
        (("plot", "whole", "--out", "a.jpg"), r"give a name that ends in \.png"),
        (("list", "nothing"), "There is no folder"),
    ],
)
def test_what_cannot_be_done_is_said(
    runs: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(runs)
    with pytest.raises(RlhfDriveError) as caught:
        _call(*arguments)
    assert re.search(message, str(caught.value))


def test_an_empty_folder_holds_no_runs(tmp_path: Path) -> None:
    with pytest.raises(RlhfDriveError, match="holds no runs"):
        _call("list", tmp_path)
