"""Reading the alerts that training left."""

from __future__ import annotations

from pathlib import Path

import pytest

from rewards.hack_detector import Alert
from rlhf_drive.compare.alerts import ALERTS_FILE, read_alerts
from rlhf_drive.errors import DataError
from rlhf_drive.training.alerts import AlertLog

LINE = '{"phase": "rl-seed0", "step": 20, "name": "reversal", "message": "12 %"}\n'
ENTRY = {"phase": "rl-seed0", "step": 20, "name": "reversal", "message": "12 %"}


def test_what_training_writes_is_read_in_its_order(tmp_path: Path) -> None:
    log = AlertLog(tmp_path)
    log.add(Alert("reversal", "12 %", 20), phase="rl-seed0")
    log.add(Alert("heldout", "fell", 40), phase="rl-seed1")
    second = {"phase": "rl-seed1", "step": 40, "name": "heldout", "message": "fell"}
    assert read_alerts(tmp_path) == [ENTRY, second]


def test_no_file_means_not_watched_and_an_empty_one_nothing_seen(tmp_path: Path) -> None:
    assert read_alerts(tmp_path) is None
    (tmp_path / ALERTS_FILE).touch()
    assert read_alerts(tmp_path) == []


def test_line_that_a_killed_run_left_unfinished_is_left_out(tmp_path: Path) -> None:
    (tmp_path / ALERTS_FILE).write_text(LINE + LINE[:30], encoding="utf-8")
    assert read_alerts(tmp_path) == [ENTRY]


@pytest.mark.parametrize("line", ["nothing\n", "[1, 2]\n", '{"phase": "rl", "step": 1, "name": "x"}\n', "\n"])
def test_broken_line_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / ALERTS_FILE).write_text(LINE + line, encoding="utf-8")
    with pytest.raises(DataError, match=r"alerts\.jsonl, line 2 is no alert"):
        read_alerts(tmp_path)
