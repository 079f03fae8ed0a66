"""A real disk of a few megabytes, and writes that fail on demand."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from rlhf_drive import disk

__all__ = ["SmallDisk", "failing_write", "mounted_disk"]


class SmallDisk:
    """A mounted file system of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def fill(self, leave: int) -> None:
        """Leave so many bytes free, to a page."""
        free = shutil.disk_usage(self.path).free
        (self.path / "filler").write_bytes(bytes(free - leave))

    def empty(self) -> None:
        """Give the filler's space back."""
        (self.path / "filler").unlink()

    def make_read_only(self, flag: bool) -> None:
        """Also for root, whom permissions do not stop."""
        subprocess.run(["mount", "-o", f"remount,{'ro' if flag else 'rw'}", self.path], check=True)


@contextmanager
def mounted_disk(path: Path, megabytes: int) -> Iterator[SmallDisk]:
    """A tmpfs at `path`; the test is skipped where this user may not mount."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(path)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield SmallDisk(path)
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)  # a test that failed may have a file open


WRITERS: tuple[tuple[Any, str], ...] = (
    (os, "fsync"),
    (Path, "mkdir"),
    (Path, "replace"),
    (Path, "write_text"),
    (Path, "touch"),
    (shutil, "rmtree"),
    (safetensors.torch, "save_file"),
    (disk.LineFile, "write"),
)
"""All that this project's writing goes through."""


@contextmanager
def failing_write(number: int, error: int = errno.ENOSPC) -> Iterator[Callable[[], int]]:
    """Within the block the write of this number (from 1) fails, and those after it work: space came free again.

    Yields:
        A function that says how many writes there were.
    """
    count = 0
    with pytest.MonkeyPatch.context() as patch:
        for place, name in WRITERS:
            patch.setattr(place, name, _counted(getattr(place, name), lambda: _step()))

        def _step() -> None:
            nonlocal count
            count += 1
            if count == number:
                raise OSError(error, os.strerror(error))

        remember = disk._Remembering.__init__
        patch.setattr(disk._Remembering, "__init__", lambda self, raw: remember(self, _Raw(raw, _step)))
        yield lambda: count


class _Raw:
    """An open file whose first, second and fiftieth write are counted: torch makes hundreds."""

    def __init__(self, raw: Any, step: Callable[[], None]) -> None:
        self._raw, self._step, self._writes = raw, step, 0

    def write(self, data: Any) -> int:
        self._writes += 1
        if self._writes in (1, 2, 50):
            self._step()
        return int(self._raw.write(data))


def _counted(function: Callable[..., Any], step: Callable[[], None]) -> Callable[..., Any]:
    def wrapped(*arguments: Any, **options: Any) -> Any:
        if not options.get("ignore_errors"):  # such a removal never raises
            step()
        return function(*arguments, **options)

    return wrapped
