"""The live table shows what matters, marks steps that a limit ended, and predicts the time left."""

from __future__ import annotations

import ast
import io
from pathlib import Path

import pytest

from rlhf_drive.training.journal import RunJournal
from rlhf_drive.training.live import RL_COLUMNS, SFT_COLUMNS, Column, LiveTable, format_duration
from rlhf_drive.training.metrics import MetricsWriter


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
    monkeypatch.setenv("LINES", "40")
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
    columns = [column for column in (*RL_COLUMNS, *SFT_COLUMNS) if not column.metric.endswith("/*")]
    assert {column.metric for column in columns} - written == set()
    assert sum(column.shown == "always" for column in columns) == 16


REWARD = (Column("reward", "reward/total", 1),)


def _lines(out: io.StringIO) -> list[str]:
    return [line.rpartition(" | left ")[0] for line in out.getvalue().splitlines()]


def test_what_only_some_runs_have_is_shown_where_it_is() -> None:
    out = io.StringIO()
    with LiveTable("rl", 9, RL_COLUMNS, stream=out, clock=lambda: 0.0) as table:
        table.update(1, {"reward/total": 0.5})
        table.update(
            2,
            {
                "reward/total": 0.5, "async/staleness_mean": 1.25, "async/staleness_max": 2.0, "time/step_s": 3.456,
                "async/trainer_idle_frac": 0.5, "rollout/restarts": 0.0, "rollout/retries": 3.0,
            },
        )  # fmt: skip
    assert _lines(out) == [
        "rl 1/9 | reward 0.500",
        "rl 2/9 | reward 0.500 | step s 3.46 | staleness 1.25 | stalest 2 | trainer idle 0.50 | retries 3",
    ]


def test_a_step_that_a_limit_ended_is_marked_once() -> None:
    out = io.StringIO()
    with LiveTable("rl", 5, REWARD, stream=out, clock=lambda: 0.0) as table:
        for step, (undone, short) in enumerate([(0, 0), (1, 0), (1, 0), (1, 1), (1, 1)], start=1):
            table.update(step, {"reward/total": 0.5, "guard/rollbacks": undone, "guard/early_stops": short})
    assert [line.partition(" | ")[0] for line in _lines(out)] == [
        "rl 1/5", "rl 2/5 (undone)", "rl 3/5", "rl 4/5 (cut short)", "rl 5/5",
    ]  # fmt: skip


def test_a_step_without_counts_keeps_them() -> None:
    out = io.StringIO()
    with LiveTable("rl", 3, REWARD, stream=out, clock=lambda: 0.0) as table:
        table.update(1, {"guard/rollbacks": 1.0})
        table.update(2, {"reward/total": 0.5})  # no group differed: nothing was learned, no limit looked at
        table.update(3, {"guard/rollbacks": 1.0})
    assert [line.partition(" | ")[0] for line in _lines(out)] == ["rl 1/3 (undone)", "rl 2/3", "rl 3/3"]


@pytest.mark.parametrize(("first", "marked"), [(2.0, False), (3.0, True)])
def test_after_a_resume_only_new_counts_mark_a_step(tmp_path: Path, first: float, marked: bool) -> None:
    out = io.StringIO()
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.log(1, {"guard/rollbacks": 2.0}, phase="rl")
        writer.log(2, {"guard/rollbacks": 9.0}, phase="rl")  # written after the checkpoint, so void
        writer.log(1, {"guard/rollbacks": 5.0}, phase="other")
    table = LiveTable("rl", 3, REWARD, stream=out, clock=lambda: 0.0)
    with MetricsWriter(tmp_path, tensorboard=False) as writer, table:
        journal = RunJournal(writer, table, "rl")
        journal.resume(1)
        journal.log(2, {"guard/rollbacks": first, "reward/total": 0.5})
    assert ("(undone)" in out.getvalue()) == marked


def _last_table(out: io.StringIO, title: str) -> list[str]:
    return out.getvalue().rpartition(title)[2].splitlines()


def test_a_terminal_marks_the_column_of_such_a_step_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    out = _Terminal()
    with LiveTable("rl", 9, REWARD, stream=out, clock=lambda: 0.0) as table:
        table.update(1, {"reward/total": 0.5, "guard/rollbacks": 0.0})
        table.update(2, {"reward/total": 0.5, "guard/rollbacks": 1.0})
    text = "\n".join(_last_table(out, "step 2 of 9, 0 s left"))
    assert text.count("undone") == 2
    assert "undone: a limit (rl.kl_limit, rl.ratio_limit) was passed" in text


def test_in_a_low_terminal_components_give_way_and_the_rest_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")
    names = ("total", "nc", "dac", "ep", "ttc", "c", "ddc", "pdms", "best_of_group")
    metrics = {f"reward/{name}": 0.5 for name in names} | {
        "time/step_s": 1.0, "async/staleness_mean": 1.0, "async/trainer_idle_frac": 0.25, "rollout/restarts": 1.0,
    }  # fmt: skip
    out = _Terminal()
    with LiveTable("rl", 9, RL_COLUMNS, stream=out, clock=lambda: 0.0) as table:
        table.update(1, metrics)
    lines = _last_table(out, "step 1 of 9, 0 s left")
    shown = [title for title in (*names, "reward", "restarts", "trainer idle") if any(f" {title} " in s for s in lines)]
    assert shown == ["nc", "dac", "reward", "restarts", "trainer idle"]  # 14 other lines, 2 components, 8 around them
