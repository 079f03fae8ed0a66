"""A replayed run looks as it did for the one who started it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_drive.config import dump_recipe, load_recipe
from rlhf_drive.runs.folders import open_run
from rlhf_drive.runs.follow import Followed
from rlhf_drive.training.live import RL_COLUMNS, SFT_COLUMNS, LiveTable
from rlhf_drive.training.live_replay import Replay


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    overrides = ["rl.seeds=[0]", "rl.max_steps=4", "sft.max_epochs=3", "sft.batch_size=8"]
    (tmp_path / "recipe.yaml").write_text(dump_recipe(load_recipe("quickstart", overrides)))
    (tmp_path / "stages.json").write_text(json.dumps({"seconds": 0, "done": {}}))
    return tmp_path


def _shown(folder: Path, found: list[Followed], before: dict[str, Any] | None = None) -> list[str]:
    out = io.StringIO()
    with Replay(open_run(folder), before, out) as replay:
        for item in found:
            replay.show(item)
    return out.getvalue().splitlines()


def test_the_lines_are_those_of_the_run_itself(run_folder: Path) -> None:
    steps = [{"reward/total": 0.1 * step, "time/step_s": 1.5 * step, "reward/nc": 1.0} for step in (1, 2, 3)]
    out, clock = io.StringIO(), iter([0.0, 1.5, 4.5, 9.0])
    with LiveTable("rl-seed0", 4, RL_COLUMNS, stream=out, clock=clock.__next__) as table:
        for step, metrics in enumerate(steps, start=1):
            table.update(step, metrics)
    lines = [Followed({"phase": "rl-seed0", "step": i, **metrics}) for i, metrics in enumerate(steps, start=1)]
    assert _shown(run_folder, lines) == out.getvalue().splitlines()


def test_phases_have_tables_of_their_own_and_sft_knows_its_end_from_an_epoch(run_folder: Path) -> None:
    lines = [
        {"phase": "sft", "step": 1, "loss/train": 2.0, "time/scenes_per_s": 4.0},
        {"phase": "rl-seed0", "step": 1, "reward/total": None},
    ]
    assert _shown(run_folder, [Followed(line) for line in lines]) == [
        "sft 1 | loss 2.000 | scenes/s 4.0",
        "rl-seed0 1/4 | reward nan | left 0 s",
    ]
    ends = {"phase": "sft", "step": 2, "loss/train": 2.0, "sft/epoch": 1.0, "time/scenes_per_s": 4.0}
    # Two steps an epoch, three epochs; four steps of 8 scenes at 4 a second are left.
    assert _shown(run_folder, [Followed(ends)]) == ["sft 2/6 | epoch 1 | loss 2.000 | scenes/s 4.0 | left 8 s"]
    assert {column.metric for column in SFT_COLUMNS} >= {"loss/train", "sft/epoch"}


def test_a_resume_is_said_and_counts_go_on(run_folder: Path) -> None:
    lines = [{"phase": "rl-seed0", "step": step, "guard/rollbacks": count} for step, count in ((1, 1), (2, 2), (2, 1))]
    found = [Followed(line, resumed=i == 2) for i, line in enumerate(lines)]
    assert _shown(run_folder, found, before={"phase": "rl-seed0", "step": 0, "guard/rollbacks": 1}) == [
        "rl-seed0 1/4 | left 0 s",
        "rl-seed0 2/4 (undone) | left 0 s",
        "the run was resumed; what was shown of rl-seed0 from step 2 on is void",
        "rl-seed0 2/4 | left 0 s",
    ]
