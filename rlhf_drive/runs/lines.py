"""The lines of `metrics.jsonl`: flat JSON objects, one per step of a phase."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlhf_drive.errors import DataError

__all__ = ["METRICS_FILE", "complete_lines", "last_lines", "parse_line", "read_metrics"]

METRICS_FILE = "metrics.jsonl"
"""Name of the file in the run folder."""
CHUNK = 1 << 16
"""Bytes read at a time from the end of the file."""


def complete_lines(path: Path) -> list[str]:
    """Whole lines of a file; a last one without its end, cut off by a kill, is left out. None if there is no file."""
    if not path.exists():
        return []
    return [line for line in path.read_text("utf-8").splitlines(keepends=True) if line.endswith("\n")]


def parse_line(text: str, path: Path) -> dict[str, Any]:
    """One line of `path` as a mapping.

    Raises:
        DataError: It is no JSON object with `phase` and `step`.
    """
    try:
        line = json.loads(text)
        phase, step = line["phase"], line["step"]
    except (ValueError, TypeError, KeyError):
        raise DataError(f"{path} holds a line that is no metrics: {text.strip()[:60]!r}. Remove it.") from None
    if not isinstance(phase, str) or not isinstance(step, int):
        raise DataError(f"{path} holds a line without phase and step: {text.strip()[:60]!r}. Remove it.")
    return dict(line)


def read_metrics(run_dir: str | Path, *, phase: str | None = None) -> list[dict[str, Any]]:
    """Lines of a run in the order they were written; those of one phase, or all.

    Raises:
        DataError: The run folder has no metrics, or a line is damaged.
    """
    path = Path(run_dir) / METRICS_FILE
    if not path.is_file():
        raise DataError(f"{path} does not exist, so {run_dir} is not the folder of a run that logged. Check the path.")
    lines = [parse_line(line, path) for line in complete_lines(path)]
    return [line for line in lines if phase is None or line["phase"] == phase]


def last_lines(path: Path, count: int) -> list[dict[str, Any]]:
    """The last `count` whole lines of a file, without reading all of it; none if there is no file.

    Raises:
        DataError: One of them is damaged.
    """
    if count <= 0 or not path.is_file():
        return []
    with path.open("rb") as file:
        end = file.seek(0, 2)
        start, text = end, b""
        while start > 0 and text.count(b"\n") <= count:
            start = max(0, start - CHUNK)
            file.seek(start)
            text = file.read(end - start)
    lines = text[: text.rfind(b"\n") + 1].splitlines()
    return [parse_line(line.decode("utf-8"), path) for line in lines[-count:]]
