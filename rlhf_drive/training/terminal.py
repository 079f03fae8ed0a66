"""What a run says on the terminal beside its live table."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["print_info", "print_rich", "progress"]


def print_info(text: str) -> None:
    """One line for the person who watches."""
    print(text, flush=True)  # noqa: T201


def print_rich(renderable: Any) -> None:
    """A rich table on the terminal."""
    from rich.console import Console

    Console().print(renderable)


@contextmanager
def progress(name: str) -> Iterator[Any]:
    """A progress bar that is advanced by ``on_progress(done, total, text)``."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task(name, total=None)

        def on_progress(done: int, total: int, text: str) -> None:
            progress.update(task, completed=done, total=total, description=f"{name}: {text}")

        yield on_progress
