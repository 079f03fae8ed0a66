"""Metrics are exact, survive a kill, and are cut back on resume; the live table shows and predicts."""

from __future__ import annotations

import ast
import io
import json
import math
from pathlib import Path

import pytest

from rlhf_drive.errors import DataError
from rlhf_drive.training.live import RL_COLUMNS, SFT_COLUMNS, Column, LiveTable, format_duration
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


def _clock(*times: float) -> object:
    """A clock that reads the given times in turn."""
    return iter(times).__next__


def test_a_plain_line_shows_the_columns_and_the_time_left() -> None:
    out = io.StringIO()
    columns = (Column("reward", "reward/total"), Column("", "reward/*", 2), Column("ratio", "ratio/mean", 1))
    with LiveTable("rl", 100, columns, stream=out, clock=_clock(0.0, 2.0, 6.0)) as table:  # type: ignore[arg-type]
        table.update(1, {"reward/total": 0.51234, "reward/nc": 1.0, "other/x": 5.0, "reward/ep": 0.5})
        table.update(2, {"reward/total": 0.6, "ratio/mean": 1.0})
    # 99 steps of 2 s, then 98 steps of (2 + 4) / 2 s.
    assert out.getvalue() == (
        "rl 1/100 | reward 0.512 | nc 1.00 | ep 0.50 | left 3 min 18 s\n"
        "rl 2/100 | reward 0.600 | ratio 1.0 | left 4 min 54 s\n"
    )


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    out = _Terminal()
    with LiveTable("sft", 5, (Column("loss", "loss/train"),), stream=out, clock=_clock(0.0, 1.0)) as table:  # type: ignore[arg-type]
        table.update(1, {"loss/train": 1.25})
    assert "sft: step 1 of 5" in out.getvalue()
    assert "1.250" in out.getvalue()
    assert "4 s" in out.getvalue()


def test_the_table_of_rl_is_readable_in_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    names = ("total", "best_of_group", "invalid_frac", "nc", "dac", "ep", "ttc", "c", "ddc", "pdms")
    metrics = {f"reward/{name}": 0.51234 for name in names} | {
        "ratio/mean": 1.00015, "ratio/first_mean": 1.0, "kl/ref_k3": 0.01234, "ratio/clip_frac": 0.1,
        "groups/spread": 0.5, "groups/degenerate_frac": 0.25, "time/scenes_per_s": 12.3,
    }  # fmt: skip
    out = _Terminal()
    with LiveTable("rl-seed0", 50, RL_COLUMNS, stream=out, clock=_clock(*map(float, range(13)))) as table:
        for step in range(1, 13):
            table.update(step, metrics)
    assert "…" not in out.getvalue()
    last = out.getvalue().rpartition("step 12 of 50, 38 s left")[2]
    assert [line.split()[1:] for line in last.splitlines() if line.split()[:1] == ["KL"]] == [["0.0123"] * 5]
    for title in ("reward", "best_of_group", "pdms", "ratio", "clip", "spread", "flat groups", "scenes/s"):
        assert f" {title} " in last


@pytest.mark.parametrize(
    ("seconds", "text"), [(-1, "0 s"), (59.4, "59 s"), (65, "1 min 05 s"), (3599.9, "1 h 00 min"), (7620, "2 h 07 min")]
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_every_column_shows_a_metric_that_training_writes() -> None:
    package = Path(__file__).resolve().parents[2] / "rlhf_drive"
    written = {
        node.value
        for path in package.rglob("*.py")
        if path.name != "live.py"
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    shown = {column.metric for column in (*RL_COLUMNS, *SFT_COLUMNS) if not column.metric.endswith("/*")}
    assert shown - written == set()
    assert len(shown) == 15
