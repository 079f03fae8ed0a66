"""Following gives each line once and in order, also when a resume puts another file in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rlhf_drive.runs.follow import follow
from rlhf_drive.training.metrics import MetricsWriter


def _text(*steps: int) -> str:
    return "".join(f'{{"phase": "rl", "step": {step}}}\n' for step in steps)


def _followed(path: Path, acts: Sequence[Callable[[], object]], lines: int = 99) -> list[tuple[int, bool]]:
    """Steps and resumes that are seen while `acts` happen, one between two looks."""
    waiting = list(acts)

    def wait() -> None:
        waiting.pop(0)()

    found = follow(path, lines=lines, goes_on=lambda: bool(waiting), wait=wait)
    return [(followed.line["step"], followed.resumed) for followed in found]


def _append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def test_each_line_comes_once_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(_text(1, 2, 3))
    cut = _text(5)[:9]
    acts = [
        lambda: _append(path, _text(4) + cut),
        lambda: None,
        lambda: _append(path, _text(5)[9:] + _text(6)),
    ]
    assert _followed(path, acts, lines=2) == [(2, False), (3, False), (4, False), (5, False), (6, False)]
    assert _followed(path, [], lines=0) == []


def test_a_file_that_comes_later_is_found(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert _followed(path, [lambda: None, lambda: path.write_text(_text(1))]) == [(1, False)]


def test_a_resume_is_noticed_and_known_lines_do_not_come_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step in range(1, 6):
            writer.log(step, {"a/x": step})

    def go_on() -> None:
        with MetricsWriter(tmp_path, tensorboard=False) as writer:
            writer.resume(3)
            for step in (4, 5, 6):
                writer.log(step, {"a/x": 10 * step})

    def once_more() -> None:
        with MetricsWriter(tmp_path, tensorboard=False) as writer:
            writer.resume(6)
            writer.log(7, {"a/x": 7})

    assert _followed(path, [go_on, lambda: None, once_more], lines=2) == [
        (4, False), (5, False), (4, True), (5, False), (6, False), (7, True),
    ]  # fmt: skip


def test_lines_written_before_the_file_was_replaced_are_not_lost(tmp_path: Path) -> None:
    path, other = tmp_path / "metrics.jsonl", tmp_path / "other"
    path.write_text(_text(1))

    def replace() -> None:
        _append(path, _text(2))
        other.write_text(_text(1, 2, 3))
        other.replace(path)

    assert _followed(path, [replace]) == [(1, False), (2, False), (3, True)]
