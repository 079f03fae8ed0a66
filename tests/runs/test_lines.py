"""Lines are read whole, from the start or from the end."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_drive.errors import DataError
from rlhf_drive.runs import lines as module
from rlhf_drive.runs.lines import complete_lines, last_lines, read_metrics


def _write(folder: Path, count: int, rest: str = "") -> Path:
    path = folder / "metrics.jsonl"
    text = "".join(f'{{"phase": "rl", "step": {step}, "a/x": {step / 2}}}\n' for step in range(1, count + 1))
    path.write_text(text + rest)
    return path


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 16])
@pytest.mark.parametrize("count", [0, 1, 3, 9, 40])
def test_the_last_lines_are_those_of_the_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, count: int
) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    path = _write(tmp_path, 9, '{"phase": "rl", "st')
    assert last_lines(path, count) == read_metrics(tmp_path)[9 - min(count, 9) :]
    assert len(complete_lines(path)) == 9


def test_a_file_that_is_empty_or_not_there_has_no_last_lines(tmp_path: Path) -> None:
    assert last_lines(tmp_path / "metrics.jsonl", 5) == []
    assert last_lines(_write(tmp_path, 0, '{"ph'), 5) == []


@pytest.mark.parametrize("text", ["nonsense", "[1, 2]", '{"phase": "rl"}', '{"phase": 3, "step": 1}'])
def test_a_damaged_line_is_named(tmp_path: Path, text: str) -> None:
    path = _write(tmp_path, 2, text + "\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl holds a line") as caught:
        read_metrics(tmp_path)
    assert text[:20] in str(caught.value)
    with pytest.raises(DataError):
        last_lines(path, 1)
