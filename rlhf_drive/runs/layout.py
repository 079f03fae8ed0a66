"""Text for a terminal of 80 columns or a file: aligned columns, short numbers, durations, sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

__all__ = ["aligned", "duration", "number", "shortened", "size_of", "wrapped"]

WIDTH = 80
"""Columns that everything fits into."""


def aligned(rows: Sequence[Sequence[str]], *, right: Sequence[int] = (), indent: str = "") -> list[str]:
    """Rows as lines, columns two spaces apart; those in `right` end at the same place, the others begin there.

    Example:
        >>> aligned([["name", "step"], ["quickstart", "6"]], right=[1])
        ['name        step', 'quickstart     6']
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    return [
        (
            indent
            + "  ".join(
                cell.rjust(width) if i in right else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
        ).rstrip()
        for row in rows
    ]


def number(value: float) -> str:
    """Four significant digits in nine characters at most.

    Example:
        >>> [number(value) for value in (0.51234, 12345.6, 1.5e-7, 0.0, 3.0)]
        ['0.5123', '1.235e+04', '1.5e-07', '0', '3']
    """
    if not math.isfinite(value):
        return str(value)
    return f"{value:.4g}"


def duration(seconds: float) -> str:
    """Seconds in a word or two: ``45 s``, ``12 min``, ``2.1 h``, ``3.5 d``."""
    if seconds < 60:
        return f"{max(0, round(seconds))} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} d"


def shortened(text: str, width: int) -> str:
    """Text of at most `width` characters; where it is longer, its middle gives way.

    Example:
        >>> shortened("real_scenes_masked_long_name", 15)
        'real_sc…ng_name'
    """
    if len(text) <= width:
        return text
    head = (width - 1) // 2
    return f"{text[:head]}…{text[len(text) - (width - 1 - head) :]}"


def wrapped(items: Sequence[str], *, indent: str, separator: str = ", ") -> list[str]:
    """Items one after the other, on as many lines as they need."""
    lines: list[str] = []
    for i, item in enumerate(items):
        piece = item + (separator.rstrip() if i + 1 < len(items) else "")
        if lines and len(lines[-1]) + len(separator) + len(piece) <= WIDTH:
            lines[-1] += separator[len(separator.rstrip()) :] + piece
        else:
            lines.append(indent + piece)
    return lines


def size_of(folder: Path) -> str:
    """Bytes of all files of a folder, in words."""
    total = float(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))
    for unit in ("B", "kB", "MB", "GB"):
        if total < 1000:
            return f"{total:.0f} {unit}" if unit in ("B", "kB") else f"{total:.1f} {unit}"
        total /= 1000
    return f"{total:.1f} TB"
