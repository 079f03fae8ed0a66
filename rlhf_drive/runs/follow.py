"""Lines of a run as they are written, also beyond a resume, which puts another file in the place of `metrics.jsonl`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rlhf_drive.runs.lines import parse_line

__all__ = ["Followed", "follow"]


@dataclass(frozen=True)
class Followed:
    """One line of a run."""

    line: dict[str, Any]
    """Its metrics."""
    resumed: bool = False
    """Whether it is the first one after a resume, so that later steps shown before are void."""


def follow(
    path: Path, *, lines: int, goes_on: Callable[[], bool], wait: Callable[[], None] = lambda: time.sleep(0.5)
) -> Iterator[Followed]:
    """The last lines of a file, and then each whole line that is added to it.

    Where the file is replaced, the lines that were there before are known and do not come again.

    Args:
        path: `metrics.jsonl`; it may come into being later.
        lines: Lines at the start.
        goes_on: Whether more may come; asked after everything that is there has been given, and read once more then.
        wait: Called between two looks.

    Raises:
        DataError: A line is damaged.
    """
    known: set[int] = set()
    source = _Source(path)
    start = [text for text, _ in source.new()]
    known.update(hash(text) for text in start)
    yield from (Followed(parse_line(text, path)) for text in start[-lines:] if lines > 0)
    last = False
    try:
        while True:
            for text, replaced in source.new():
                if hash(text) in known:
                    continue
                known.add(hash(text))
                yield Followed(parse_line(text, path), source.take_replaced() if replaced else False)
            if last:
                return
            last = not goes_on()
            if not last:
                wait()
    finally:
        source.close()


class _Source:
    """Whole lines of a file from where the last look ended; all of them when another file stands in its place."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] | None = None
        self._rest = b""
        self._replaced = False

    def new(self) -> Iterator[tuple[str, bool]]:
        """Text of each new line, and whether the file was replaced since :meth:`take_replaced`."""
        for text in self._read():
            yield text, self._replaced
        if self._is_other():
            self.close()
            self._replaced = True
            for text in self._read():
                yield text, self._replaced

    def take_replaced(self) -> bool:
        """True, and forget it."""
        self._replaced = False
        return True

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
        self._file, self._rest = None, b""

    def _read(self) -> Iterator[str]:
        if self._file is None:
            if not self._path.is_file():
                return
            self._file = self._path.open("rb")
        *whole, self._rest = (self._rest + self._file.read()).split(b"\n")
        yield from (line.decode("utf-8") for line in whole if line)

    def _is_other(self) -> bool:
        """Whether the path leads to another file than the open one, or that was cut."""
        if self._file is None or not self._path.is_file():
            return False
        here, there = os.fstat(self._file.fileno()), self._path.stat()
        return (here.st_dev, here.st_ino) != (there.st_dev, there.st_ino) or there.st_size < self._file.tell()
