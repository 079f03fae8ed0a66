"""What a person sees while training runs: a live table on a terminal, else one plain line per step."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TextIO

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["RL_COLUMNS", "SFT_COLUMNS", "Column", "LiveTable", "format_duration"]

STEPS = 12
"""Latest steps that the table shows at most."""
NAME_WIDTH, STEP_WIDTH = 18, 11
"""Characters for a metric's name, and for its value at one step."""
HEAD_LINES = 8
"""Lines of the table that hold no metric: title, heading, rules, what a mark means."""
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
    shown: Literal["always", "present", "not_zero"] = "always"
    """Whether it has its line in any case, only where a step has the metric, or only where that is not 0 either."""


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
    Column("step s", "time/step_s", 2, "present"),
    Column("push s", "time/push_s", 2, "present"),
    Column("staleness", "async/staleness_mean", 2, "present"),
    Column("stalest", "async/staleness_max", 0, "present"),
    Column("trainer idle", "async/trainer_idle_frac", 2, "present"),
    Column("sampler idle", "async/sampler_idle_frac", 2, "present"),
    Column("scorer idle", "async/scorer_idle_frac", 2, "present"),
    Column("queued chunks", "async/queued_chunks", 0, "present"),
    Column("ready steps", "async/ready_steps", 0, "present"),
    Column("restarts", "rollout/restarts", 0, "not_zero"),
    Column("retries", "rollout/retries", 0, "not_zero"),
    Column("trackers off", "logging/trackers_off", 0, "not_zero"),
)
"""Columns of the RL phase."""
SFT_COLUMNS = (
    Column("epoch", "sft/epoch", 0),
    Column("loss", "loss/train"),
    Column("held-out", "loss/heldout"),
    Column("best", "loss/heldout_best"),
    Column("lr", "optim/learning_rate", 6),
    Column("scenes/s", "time/scenes_per_s", 1),
    Column("trackers off", "logging/trackers_off", 0, "not_zero"),
)
"""Columns of the SFT phase."""
LIMITS = {"guard/rollbacks": "undone", "guard/early_stops": "cut short"}
"""What became of a step in which a count rose: a limit was passed, and its updates were undone or left out."""


@dataclass(frozen=True)
class _Row:
    """What is shown of one step."""

    step: int
    cells: dict[str, str]
    left: str
    fate: str


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
        total_steps: int | None,
        columns: tuple[Column, ...] = RL_COLUMNS,
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare a table of `total_steps` steps.

        Args:
            phase: Name of the phase, shown as the title.
            total_steps: Last step; None where nobody knows, and then nobody knows the time left.
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
        self._rows: deque[_Row] = deque(maxlen=STEPS)
        self._counts = dict.fromkeys(LIMITS, 0.0)
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

    def resume(self, last: Mapping[str, Any]) -> None:
        """The phase goes on after a step with these metrics; what they counted was shown then."""
        self._counts |= {name: float(last[name]) for name in LIMITS if last.get(name) is not None}

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the metrics of `step`, and whether a limit ended it."""
        if not self._times:
            self._times.append((step - 1, self._start))
        self._times.append((step, self._clock()))
        left = "" if self._total is None else format_duration((self._total - step) * self._step_seconds())
        row = _Row(step, self._cells(metrics), left, self._fate(metrics))
        self._rows.append(row)
        if self._live is not None:
            self._live.update(self._table(*self._live.console.size), refresh=True)
            return
        head = f"{self._phase} {step}" + (f"/{self._total}" if self._total else "")
        head += f" ({row.fate})" if row.fate else ""
        parts = [head, *(f"{k} {v}" for k, v in row.cells.items() if v)]
        parts += [f"left {left}"] if left else []
        self._stream.write(" | ".join(parts) + "\n")
        self._stream.flush()

    def _fate(self, metrics: Mapping[str, float]) -> str:
        """`undone` or `cut short` where a count of the limits rose, else nothing."""
        rose = [fate for name, fate in LIMITS.items() if metrics.get(name, 0.0) > self._counts[name]]
        self._counts |= {name: metrics[name] for name in LIMITS if name in metrics}
        return rose[0] if rose else ""

    def note(self, text: str) -> None:
        """A line above the table."""
        if self._live is not None:
            self._live.console.print(text)
            return
        self._stream.write(text + "\n")
        self._stream.flush()

    def _step_seconds(self) -> float:
        """Mean duration of the latest steps (s)."""
        first_step, first_time = self._times[0]
        last_step, last_time = self._times[-1]
        return (last_time - first_time) / max(1, last_step - first_step)

    def _cells(self, metrics: Mapping[str, float]) -> dict[str, str]:
        """Text by heading, in the order of the columns."""
        named = {column.metric for column in self._columns}
        cells: dict[str, str] = {}
        for column in self._columns:
            if column.metric.endswith("/*"):
                area = column.metric[:-1]
                rest = [name for name in metrics if name.startswith(area) and name not in named]
                cells |= {name.removeprefix(area): f"{metrics[name]:.{column.digits}f}" for name in rest}
                continue
            value = metrics.get(column.metric)
            if value is not None and (value or column.shown != "not_zero"):
                cells[column.title] = f"{value:.{column.digits}f}"
            elif column.shown == "always":
                cells[column.title] = ""
        return cells

    def _fitting(self, titles: list[str], height: int) -> list[str]:
        """The lines that fit below each other: parts of an area without a column of their own give way first."""
        excess = len(titles) + HEAD_LINES - height
        own = {column.title for column in self._columns}
        parts = [title for title in titles if title not in own]
        dropped = set(parts[max(0, len(parts) - excess) :]) if excess > 0 else set()
        return [title for title in titles if title not in dropped]

    def _table(self, width: int, height: int) -> Table:
        """A line per metric, a column per step, as many of the latest steps as fit into `width` characters."""
        from rich import box
        from rich.table import Table

        titles = self._fitting(_merged([list(row.cells) for row in self._rows]), height)
        shown = list(self._rows)[-max(1, (width - NAME_WIDTH) // STEP_WIDTH) :]
        whole = "" if self._total is None else f" of {self._total}, {shown[-1].left} left"
        title = f"{self._phase}: step {shown[-1].step}{whole}"
        fates = [fate for fate in LIMITS.values() if fate in {row.fate for row in shown}]
        ended = " and ".join(fates)
        caption = f"{ended}: a limit (rl.kl_limit, rl.ratio_limit) was passed" if fates else ""
        least = max(len(title), len(caption))
        table = Table(title=title, caption=caption or None, box=box.SIMPLE_HEAD, min_width=least)
        table.add_column("step")
        for row in shown:
            head = f"{row.step}\n{row.fate}" if row.fate else str(row.step)
            table.add_column(head, justify="right", no_wrap=True, header_style="bold red" if row.fate else "bold")
        for name in titles:
            table.add_row(name, *(row.cells.get(name, "") for row in shown))
        return table


def _merged(orders: list[list[str]]) -> list[str]:
    """All names, those of a later list that are new standing after the name before them there."""
    found: list[str] = []
    for names in orders:
        place = 0
        for name in names:
            if name not in found:
                found.insert(place, name)
            place = found.index(name) + 1
    return found


def format_duration(seconds: float) -> str:
    """Seconds in words: ``45 s``, ``3 min 05 s``, ``2 h 07 min``."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
