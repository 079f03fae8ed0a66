"""A profile of single steps: where the time of a step goes, as a table and as a trace.

What a step consists of is marked where it happens::

    with part("sampling"):
        rollout = service.sample(…)

Without a profile that is a look at a variable. Written for CPU and CUDA; not run on a GPU.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_drive.disk import writing

if TYPE_CHECKING:
    from torch.profiler import profile

__all__ = ["part", "profiled"]

OPERATIONS = 30
"""Most expensive operations that the table shows."""
NAME_WIDTH = 44
"""Characters of an operation's name."""
_NOTHING: AbstractContextManager[None] = nullcontext()


@dataclass
class _Clock:
    """Seconds of the parts of the step that is being profiled, by path (``update/backward``)."""

    synchronize: Any
    """Waits for the GPU, so that a part's seconds are its own."""
    thread: int = field(default_factory=threading.get_ident)
    seconds: dict[str, float] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    open_parts: list[str] = field(default_factory=list)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count a part, and mark it in the trace; other threads' parts overlap with the step and are only marked."""
        from torch.profiler import record_function

        if threading.get_ident() != self.thread:
            with record_function(f"part/{name}"):
                yield
            return
        self.open_parts.append(name)
        path, started = "/".join(self.open_parts), time.perf_counter()
        try:
            with record_function(f"part/{name}"):
                yield
                self.synchronize()
        finally:
            self.open_parts.pop()
            self.seconds[path] = self.seconds.get(path, 0.0) + time.perf_counter() - started
            self.calls[path] = self.calls.get(path, 0) + 1


_clock: _Clock | None = None
"""Of the profile that runs; there is one at a time."""


def part(name: str) -> AbstractContextManager[None]:
    """Marks what runs within the block as the part `name` of a step; parts may lie within parts.

    Example:
        >>> with part("sampling"):
        ...     plans = 8
    """
    return _NOTHING if _clock is None else _clock.part(name)


@contextmanager
def profiled(folder: Path, step: int, wanted: Collection[int]) -> Iterator[None]:
    """Profile what runs within the block, if `step` is among the wanted.

    Writes ``step-000005.json.gz``, a trace for Perfetto or chrome://tracing, and ``step-000005.txt``, the parts of the
    step and its most expensive operations. The profiler slows the step down, small operations most. Of threads beside
    the one that trains, only the parts are seen.

    Args:
        folder: Folder of profiles; made if need be.
        step: Counted from 1.
        wanted: Steps to profile.

    Raises:
        StorageError: The files cannot be written.
    """
    global _clock
    if step not in wanted:
        yield
        return
    import torch
    from torch.profiler import ProfilerActivity, profile

    cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    clock = _Clock(torch.cuda.synchronize if cuda else lambda: None)
    with profile(activities=activities) as found:
        _clock, started = clock, time.perf_counter()
        try:
            yield
            clock.synchronize()
        finally:
            _clock = None
        seconds = time.perf_counter() - started
    name = f"step-{step:06d}"
    with writing(f"The profile of step {step}", folder / name):
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{name}.json.gz"  # the suffix says that it is to be packed
        found.export_chrome_trace(str(partial))
        partial.replace(folder / f"{name}.json.gz")
        (folder / f"{name}.txt").write_text("\n".join(_report(step, seconds, clock, found, cuda)) + "\n", "utf-8")


def _report(step: int, seconds: float, clock: _Clock, found: profile, cuda: bool) -> list[str]:
    """Lines of the text file."""
    lines = [f"step {step}: {seconds:.3f} s with the profiler running", "", f"{'part':<36} {'calls':>6} {'s':>9} share"]
    shown = sorted(clock.seconds, key=lambda path: _order(path, clock.seconds))
    for path in shown:
        depth, name = path.count("/"), path.rpartition("/")[2]
        lines.append(_part_line("  " * depth + name, str(clock.calls[path]), clock.seconds[path], seconds))
    rest = seconds - sum(value for path, value in clock.seconds.items() if "/" not in path)
    lines += [_part_line("(everything else)", "", rest, seconds), ""]
    kind = "GPU" if cuda else "CPU"
    rows = [_Operation.of(event, cuda) for event in found.key_averages() if not event.key.startswith("part/")]
    total = sum(row.milliseconds for row in rows) or 1.0
    lines.append(f"{f'operation, by its own {kind} time':<{NAME_WIDTH}} {'calls':>8} {'ms':>10} share")
    for row in sorted(rows, key=lambda row: (-row.milliseconds, row.name))[:OPERATIONS]:
        share = row.milliseconds / total
        lines.append(f"{row.name[:NAME_WIDTH]:<{NAME_WIDTH}} {row.calls:>8} {row.milliseconds:>10.2f} {share:>5.1%}")
    return lines


def _order(path: str, seconds: dict[str, float]) -> list[tuple[float, str]]:
    """Sorts a part before its own parts, and neighbours by their seconds, most first."""
    names = path.split("/")
    above = ["/".join(names[: i + 1]) for i in range(len(names))]
    return [(-seconds.get(name, 0.0), name) for name in above]


def _part_line(name: str, calls: str, seconds: float, total: float) -> str:
    return f"{name:<36} {calls:>6} {seconds:>9.4f} {seconds / total:>5.1%}"


@dataclass(frozen=True)
class _Operation:
    """One kind of operation."""

    name: str
    calls: int
    milliseconds: float
    """Spent in the operation itself, not in those that it calls."""

    @classmethod
    def of(cls, event: Any, cuda: bool) -> _Operation:
        """From an average of torch's profiler (microseconds)."""
        own = event.self_device_time_total if cuda else event.self_cpu_time_total
        return cls(str(event.key), int(event.count), float(own) / 1e3)
