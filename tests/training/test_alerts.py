"""Warnings of a run on disk."""

from __future__ import annotations

import json
from pathlib import Path

from rewards.hack_detector import ALERTS_FILE, Alert
from rlhf_drive.training.alerts import AlertLog


def _entries(folder: Path) -> list[tuple[str, int, str]]:
    lines = (folder / ALERTS_FILE).read_text().splitlines()
    return [(entry["phase"], entry["step"], entry["name"]) for entry in map(json.loads, lines)]


def test_resuming_drops_what_came_after_the_checkpoint_in_its_own_phase(tmp_path: Path) -> None:
    log = AlertLog(tmp_path)
    assert _entries(tmp_path) == []  # watched, and nothing seen
    log.resume(0, phase="rl-seed0")  # nothing there yet
    for phase, step in (("rl-seed0", 5), ("rl-seed0", 9), ("rl-seed1", 9)):
        log.add(Alert("reversal", "plans reverse", step), phase=phase)
    with (tmp_path / ALERTS_FILE).open("a") as file:
        file.write('{"phase": "rl-seed0", "st')  # killed while it wrote
    AlertLog(tmp_path).resume(5, phase="rl-seed0")
    assert _entries(tmp_path) == [("rl-seed0", 5, "reversal"), ("rl-seed1", 9, "reversal")]
    log.add(Alert("heldout", "falls", 7), phase="rl-seed0")
    assert _entries(tmp_path)[-1] == ("rl-seed0", 7, "heldout")
    assert [path.name for path in tmp_path.iterdir()] == [ALERTS_FILE]
