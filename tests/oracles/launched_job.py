"""A command as a launcher starts it: ``launched_job.py CASE FOLDER``. Says what happened on stdout and in FOLDER."""

from __future__ import annotations

import atexit
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf_drive.errors import ConfigError, RlhfDriveError
from rlhf_drive.training.launch import check_shared, is_main, launched, one_voice, process_group


def report(error: RlhfDriveError) -> int:
    """As the command line does it."""
    print(f"Error: {error}", file=sys.stderr, flush=True)
    return 2


@contextmanager
def service(folder: Path) -> Iterator[None]:
    """What the main process must close, which takes its time."""
    try:
        yield
    finally:
        if is_main():
            time.sleep(1.0)
            (folder / "closed").touch()


def note_exit(folder: Path) -> None:
    """Whether the main process had closed its service when this one ended."""
    (folder / "at-exit").write_text(f"closed: {(folder / 'closed').exists()}")


def work(case: str, folder: Path) -> None:
    """What the case says."""
    assert launched()
    if case == "wrong":
        raise ConfigError("everybody reads the same wrong recipe")
    with process_group("cpu", 60.0) as ranks, service(folder):
        if case == "one":
            if not ranks.main:
                atexit.register(note_exit, folder)
                raise ConfigError("process 1 lacks a file")
            ranks.wait()
        if case == "defect":
            if ranks.main:
                raise ZeroDivisionError("a defect")
            ranks.wait()
        if case == "elsewhere":
            folder = folder / f"of{ranks.index}"
            folder.mkdir()
        check_shared(folder, ranks, wait_s=0.5)
        print("all here:", ranks.gather(ranks.index))


if __name__ == "__main__":
    with one_voice(report):
        work(sys.argv[1], Path(sys.argv[2]))
