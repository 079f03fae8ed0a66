"""Overview and summary say what the folder holds, in 80 columns."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_drive.runs.folders import open_run
from rlhf_drive.runs.overview import overview, progress_of
from rlhf_drive.runs.summary import summary

MakeRun = Callable[..., Path]
Line = Callable[..., dict[str, Any]]


def _sft(step: int, **metrics: float) -> dict[str, Any]:
    return {"phase": "sft", "step": step, **{name.replace("_", "/", 1): value for name, value in metrics.items()}}


def test_the_overview_has_a_row_for_each_run(make_run: MakeRun, line: Line) -> None:
    done = make_run("done", [line(9, reward_total=0.75)], done=["sft", "rl-seed0", "compare"])
    fresh = make_run("fresh")
    sft = make_run("pretraining", [_sft(4, sft_epoch=2.0), _sft(5)], checkpoints={"sft": [5]})
    broken = make_run("a_very_long_name_of_a_run_that_broke", [line(3)])
    (broken / "metrics.jsonl").write_text("nonsense\n")
    rows = [row.split() for row in overview([open_run(path) for path in (done, fresh, sft, broken)])[1:]]
    assert [row[:3] for row in rows] == [
        ["done", "pipeline", "finished"],
        ["fresh", "pipeline", "killed"],
        ["pretraining", "pipeline", "stopped"],
        ["a_very_lo…that_broke", "pipeline", "damaged"],
    ]
    assert rows[0][3:6] == ["rl-seed0", "9/9", "0.750"]
    assert rows[2][3:6] == ["sft", "epoch", "2/100"]


def test_the_latest_reward_is_of_the_phase_that_runs(make_run: MakeRun, line: Line) -> None:
    path = make_run(lines=[line(8, reward_total=0.5), line(9), line(1, seed=1, reward_total=None)])
    progress = progress_of(open_run(path))
    assert (progress.where, progress.reward) == ("rl-seed1 1/9", None)
    with (path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line(2, seed=1, reward_total=0.25)) + "\n" + json.dumps(line(3, seed=1)) + "\n")
    assert progress_of(open_run(path)).reward == 0.25


def test_the_summary_says_stages_metrics_warnings_and_files(make_run: MakeRun, line: Line) -> None:
    lines = [_sft(1, loss_train=2.0, loss_heldout=2.5), _sft(2, loss_train=1.0)]
    lines += [line(step, reward_total=step / 8, monitor_nc=None if step == 2 else 1.0) for step in (1, 2, 3)]
    path = make_run(lines=lines, done=["sft"], checkpoints={"rl-seed0": [2, 3]}, overrides=["rl.max_steps=9"])
    alerts = [{"phase": "rl-seed0", "step": n, "name": "x", "message": f"sign {n}"} for n in range(5)]
    (path / "alerts.jsonl").write_text("".join(json.dumps(alert) + "\n" for alert in alerts))
    (path / "rl-seed0" / "pictures").mkdir()
    (path / "rl-seed0" / "pictures" / "step-000002.png").write_bytes(b"x" * 1500)
    text = summary(open_run(path), blocks="01234567")
    rows = [row.split() for row in text]
    assert max(map(len, text)) <= 80
    assert "  rl.max_steps  40  ->  9" in text
    assert ["sft", "done", "2", "steps"] in rows
    assert ["rl-seed0", "begun", "3", "steps", "checkpoints", "2,", "3"] in rows
    assert ["compare", "to", "do"] in rows
    assert ["loss/train", "sft", "2", "->", "1", "70"] in rows
    assert ["reward/total", "rl-seed0", "0.125", "->", "0.375", "047"] in rows  # 3.5 rounds to even
    assert "Metrics of rl-seed0, steps 1 to 3" in text
    assert ["total", "0.125", "0.25", "0.375"] in rows
    assert ["nc", "1", "1", "1"] in rows
    assert "Warnings: 5, the latest 3" in text
    assert ["rl-seed0", "step", "4:", "sign", "4"] in rows
    assert "  pictures: 1, the latest rl-seed0/pictures/step-000002.png" in text


def test_the_metrics_of_another_phase_can_be_asked_for(make_run: MakeRun, line: Line) -> None:
    path = make_run(lines=[_sft(1, loss_train=2.0), line(1, reward_total=0.5)])
    text = summary(open_run(path), phase="sft")
    assert ["train", "2", "2", "2"] in [row.split() for row in text]
    assert "Metrics of sft, steps 1 to 1" in text


def test_a_run_before_its_first_step_can_be_shown(make_run: MakeRun) -> None:
    text = summary(open_run(make_run()))
    assert "No metrics: no step was logged." in text


@pytest.mark.parametrize("seconds", [3.0, 5000.0])
def test_the_time_of_a_broken_run_reaches_to_its_last_line(make_run: MakeRun, line: Line, seconds: float) -> None:
    path = make_run(lines=[line(1)])
    start = (path / "recipe.yaml").stat().st_mtime
    os.utime(path / "stages.json", (start, start))
    os.utime(path / "metrics.jsonl", (start + seconds, start + seconds))
    took = overview([open_run(path)])[1].split("  ")
    assert ("5 s" if seconds < 5 else "1.4 h") in [cell.strip() for cell in took]  # 5 s are noted
