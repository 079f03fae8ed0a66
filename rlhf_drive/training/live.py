"""What a person sees while training runs: a live table on a terminal, else one plain line per step."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["RL_COLUMNS", "SFT_COLUMNS", "Column", "LiveTable", "format_duration"]

STEPS = 12
"""Latest steps that the table shows at most."""
NAME_WIDTH, STEP_WIDTH = 18, 11
"""Characters for a metric's name, and for its value at one step."""
WINDOW = 20
"""Steps whose mean duration predicts the time left."""


@dataclass(frozen=True)
class Column:
    """One column of the table."""

    title: str
    """Heading."""
    metric: str
    """Metric shown; an entry that ends in ``/*`` shows every metric of that area that no other column shows."""
    digits: int = 3
    """Decimals."""


RL_COLUMNS = (
    Column("reward", "reward/total"),
    Column("", "reward/*"),
    Column("first ratio", "ratio/first_mean", 4),
    Column("ratio", "ratio/mean", 4),
    Column("KL", "kl/ref_k3", 4),
    Column("clip", "ratio/clip_frac"),
    Column("spread", "groups/spread"),
    Column("flat groups", "groups/degenerate_frac", 2),
    Column("invalid", "reward/invalid_frac", 2),
    Column("held-out EPDMS", "heldout/epdms"),
    Column("scenes/s", "time/scenes_per_s", 1),
)
"""Columns of the RL phase."""
SFT_COLUMNS = (
    Column("epoch", "sft/epoch", 0),
    Column("loss", "loss/train"),
    Column("held-out", "loss/heldout"),
    Column("best", "loss/heldout_best"),
    Column("lr", "optim/learning_rate", 6),
    Column("scenes/s", "time/scenes_per_s", 1),
)
"""Columns of the SFT phase."""


class LiveTable:
    """Rows of the latest steps, with the time left; a context manager.

    Example:
        >>> import io
        >>> out = io.StringIO()
        >>> with LiveTable("rl", 2, (Column("reward", "reward/total"),), stream=out, clock=lambda: 0.0) as table:
        ...     table.update(1, {"reward/total": 0.5})
        >>> out.getvalue()
        'rl 1/2 | reward 0.500 | left 0 s\\n'
    """

    def __init__(
        self,
        phase: str,
        total_steps: int,
        columns: tuple[Column, ...] = RL_COLUMNS,
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare a table of `total_steps` steps.

        Args:
            phase: Name of the phase, shown as the title.
            total_steps: Last step.
            columns: What is shown; a column whose metric is absent from a row stays empty.
            stream: Where to write; standard output if not given. A live table needs a terminal there.
            clock: Seconds, rising.
        """
        self._phase = phase
        self._total = total_steps
        self._columns = columns
        self._stream = stream if stream is not None else sys.stdout
        self._clock = clock
        self._times: deque[tuple[int, float]] = deque(maxlen=WINDOW + 1)
        self._rows: deque[tuple[int, dict[str, str], str]] = deque(maxlen=STEPS)
        self._live: Any = None

    def __enter__(self) -> LiveTable:
        if self._stream.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(file=self._stream), auto_refresh=False)
            self._live.start()
        self._start = self._clock()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the metrics of `step`."""
        if not self._times:
            self._times.append((step - 1, self._start))
        self._times.append((step, self._clock()))
        left = format_duration(self._seconds_left(step))
        cells = self._cells(metrics)
        self._rows.append((step, cells, left))
        if self._live is not None:
            self._live.update(self._table(self._live.console.width), refresh=True)
            return
        parts = [f"{self._phase} {step}/{self._total}", *(f"{k} {v}" for k, v in cells.items() if v), f"left {left}"]
        self._stream.write(" | ".join(parts) + "\n")
        self._stream.flush()

    def note(self, text: str) -> None:
        """A line above the table."""
        if self._live is not None:
            self._live.console.print(text)
            return
        self._stream.write(text + "\n")
        self._stream.flush()

    def _seconds_left(self, step: int) -> float:
        """Remaining steps times the mean duration of the latest ones (s)."""
        first_step, first_time = self._times[0]
        last_step, last_time = self._times[-1]
        return (self._total - step) * (last_time - first_time) / max(1, last_step - first_step)

    def _cells(self, metrics: Mapping[str, float]) -> dict[str, str]:
        """Text by heading, in the order of the columns."""
        named = {column.metric for column in self._columns}
        cells: dict[str, str] = {}
        for column in self._columns:
            if column.metric.endswith("/*"):
                area = column.metric[:-1]
                rest = [name for name in metrics if name.startswith(area) and name not in named]
                cells |= {name.removeprefix(area): f"{metrics[name]:.{column.digits}f}" for name in rest}
            else:
                known = column.metric in metrics
                cells[column.title] = f"{metrics[column.metric]:.{column.digits}f}" if known else ""
        return cells

    def _table(self, width: int) -> Table:
        """A line per metric, a column per step, as many of the latest steps as fit into `width` characters."""
        from rich import box
        from rich.table import Table

        titles = list(dict.fromkeys(title for _, cells, _ in self._rows for title in cells))
        shown = list(self._rows)[-max(1, (width - NAME_WIDTH) // STEP_WIDTH) :]
        last, _, left = shown[-1]
        title = f"{self._phase}: step {last} of {self._total}, {left} left"
        table = Table(title=title, box=box.SIMPLE_HEAD, min_width=len(title))
        table.add_column("step")
        for step, _, _ in shown:
            table.add_column(str(step), justify="right", no_wrap=True)
        for name in titles:
            table.add_row(name, *(cells.get(name, "") for _, cells, _ in shown))
        return table


def format_duration(seconds: float) -> str:
    """Seconds in words: ``45 s``, ``3 min 05 s``, ``2 h 07 min``."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
