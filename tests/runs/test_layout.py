"""Text fits and lines up."""

from __future__ import annotations

import pytest

from rlhf_drive.runs.layout import aligned, duration, number, shortened, wrapped


@pytest.mark.parametrize(
    ("seconds", "text"), [(-3, "0 s"), (59, "59 s"), (90, "2 min"), (7560, "2.1 h"), (200_000, "2.3 d")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize("value", [1.23456789e-100, -1.23456789e-100, 123456789.0, 0.1, float("nan"), float("inf")])
def test_numbers_are_short(value: float) -> None:
    assert len(number(value)) <= 11
    assert float(number(value)) == pytest.approx(value, rel=1e-3, nan_ok=True)


def test_columns_line_up() -> None:
    rows = [["a", "10", "x"], ["bbb", "2", ""]]
    assert aligned(rows, right=[1], indent=" ") == [" a    10  x", " bbb   2"]
    assert aligned([]) == []


def test_long_text_is_wrapped_or_loses_its_middle() -> None:
    lines = wrapped([f"word{i}" for i in range(40)], indent="  ", separator=" ")
    assert max(map(len, lines)) <= 80
    assert " ".join(line.strip() for line in lines).split() == [f"word{i}" for i in range(40)]
    assert wrapped(["one", "two"], indent="") == ["one, two"]
    assert shortened("abcdefghij", 10) == "abcdefghij"
    assert shortened("abcdefghijk", 10) == "abcd…ghijk"
