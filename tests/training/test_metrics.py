"""Metrics are exact, survive a kill, and are cut back on resume."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from rlhf_drive.errors import DataError
from rlhf_drive.training.metrics import METRICS_FILE, MetricsWriter, read_metrics


def test_floats_come_back_exactly(tmp_path: Path) -> None:
    values = {"a/third": 1 / 3, "a/tiny": 5e-324, "a/large": 1.7976931348623157e308, "a/ratio": 1 + 2**-52}
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.log(1, values)
    assert read_metrics(tmp_path) == [{"phase": "rl", "step": 1, **values}]


def test_a_value_that_is_not_finite_is_null_and_the_line_stays_json(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.log(1, {"a/nan": math.nan, "a/inf": math.inf, "a/one": 1})
    line = (tmp_path / METRICS_FILE).read_text()
    assert "NaN" not in line
    assert json.loads(line) == {"phase": "rl", "step": 1, "a/nan": None, "a/inf": None, "a/one": 1.0}


def test_each_line_is_on_disk_when_log_returns(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.log(1, {"a/x": 1.0})
    assert len(read_metrics(tmp_path)) == 1
    writer.close()


def test_resume_drops_later_steps_of_its_phase_only(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step in (1, 2, 3):
            writer.log(step, {"a/x": step}, phase="sft")
        for step in (1, 2, 3):
            writer.log(step, {"a/x": 10 * step}, phase="rl")
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.resume(1, phase="rl")
        writer.log(2, {"a/x": 77}, phase="rl")
    found = [(line["phase"], line["step"], line["a/x"]) for line in read_metrics(tmp_path)]
    assert found == [("sft", 1, 1.0), ("sft", 2, 2.0), ("sft", 3, 3.0), ("rl", 1, 10.0), ("rl", 2, 77.0)]
    assert [line["a/x"] for line in read_metrics(tmp_path, phase="rl")] == [10.0, 77.0]


def test_a_line_cut_off_by_a_kill_is_dropped(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.log(1, {"a/x": 1.0})
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"phase": "rl", "step": 2, "a/')
    assert len(read_metrics(tmp_path)) == 1
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.log(2, {"a/x": 2.0})
    assert [line["a/x"] for line in read_metrics(tmp_path)] == [1.0, 2.0]


def test_a_name_without_area_is_refused(tmp_path: Path) -> None:
    with (
        MetricsWriter(tmp_path, tensorboard=False) as writer,
        pytest.raises(DataError, match="Metric 'step' of phase 'sft' must be named area/name"),
    ):
        writer.log(1, {"step": 3.0}, phase="sft")
    assert read_metrics(tmp_path) == []
    with pytest.raises(DataError, match="does not exist"):
        read_metrics(tmp_path / "absent")


def test_tensorboard_holds_the_same_numbers_and_hides_what_resume_dropped(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsWriter(tmp_path, tensorboard=True) as writer:
        for step in (1, 2, 3):
            writer.log(step, {"a/x": step / 4}, phase="rl")
        writer.resume(1, phase="rl")
        writer.log(2, {"a/x": 9.0}, phase="rl")
    events = EventAccumulator(str(tmp_path / "tensorboard" / "rl")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("a/x")] == [(1, 0.25), (2, 9.0)]
