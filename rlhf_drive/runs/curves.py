"""Curves of several runs in one picture: a panel per metric, a colour per run, thin lines for its seeds."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_drive.errors import DataError
from rlhf_drive.runs.series import Series, kind_of, mean_over_seeds, series_of, smoothed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["DEFAULT_METRICS", "Panel", "draw_curves", "panels_of"]

DEFAULT_METRICS = (
    "loss/heldout",
    "reward/total",
    "heldout/epdms",
    "ratio/clip_frac",
    "kl/ref_k3",
    "policy/sampled_nll",
    "optim/grad_norm",
    "time/step_s",
)
"""What is drawn unless metrics are named."""
RL_ONLY = {"optim/grad_norm"}
"""Of these, what SFT has too; it is drawn for RL where there is any."""
COLORS = ("#1c6fd1", "#e8590c", "#2b8a3e", "#7048e8", "#c2255c", "#0b7285", "#9c6b00", "#495057")
INK = "#15202b"
FEW = 60
"""Values up to which points are marked."""
SMOOTHING = 40
"""A window is this part of the longest series, unless one is asked for."""


@dataclass(frozen=True)
class Panel:
    """One metric of one kind of phase, of all runs."""

    metric: str
    """Which."""
    kind: str
    """`sft`, `rl`, …"""
    runs: Mapping[str, Mapping[str, Series]]
    """Series by phase, by run."""

    @property
    def longest(self) -> int:
        """Values of the longest series."""
        return max(len(series.steps) for phases in self.runs.values() for series in phases.values())


def panels_of(runs: Mapping[str, Sequence[Mapping[str, Any]]], metrics: Sequence[str], *, named: bool) -> list[Panel]:
    """What there is to draw.

    Args:
        runs: Lines of the metrics file, by run.
        metrics: Names; a metric that two kinds of phase have gets a panel for each.
        named: Whether somebody asked for these metrics, so that those of SFT are drawn too where RL has them.

    Raises:
        DataError: None of the metrics is there.
    """
    panels = []
    for metric in metrics:
        found = {run: series_of(lines, metric) for run, lines in runs.items()}
        kinds = list(dict.fromkeys(kind_of(phase) for phases in found.values() for phase in phases))
        if not named and metric in RL_ONLY and "rl" in kinds:
            kinds = ["rl"]
        for kind in kinds:
            own = {run: {p: s for p, s in phases.items() if kind_of(p) == kind} for run, phases in found.items()}
            panels.append(Panel(metric, kind, {run: phases for run, phases in own.items() if phases}))
    if not panels:
        raise DataError("These runs have none of the metrics that are drawn. Name some with --metric.")
    return panels


def draw_curves(runs: Sequence[str], panels: Sequence[Panel], path: Path, *, smooth: int | None = None) -> None:
    """PNG with a panel for each metric.

    The mean over a run's seeds is thick, each seed thin; where lines are smoothed, one seed alone is shown faint as it
    was, too.

    Args:
        runs: Names in the order of their colours.
        panels: See :func:`panels_of`.
        path: File to write.
        smooth: Steps that a value is the mean of; None = a fortieth of the longest series, 1 = as it was.

    Raises:
        DataError: It cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    columns = min(3, math.ceil(math.sqrt(len(panels))))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.6 * columns + 0.4, 2.9 * rows + 0.7), dpi=110, facecolor="white", layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).reshape(-1)
    colors = {run: COLORS[i % len(COLORS)] for i, run in enumerate(runs)}
    for axes, panel in zip(grid, panels, strict=False):
        window = max(1, panel.longest // SMOOTHING) if smooth is None else smooth
        for run, phases in panel.runs.items():
            _draw_run(axes, list(phases.values()), colors[run], window)
        _dress(axes, panel, window)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    handles = [Line2D([], [], color=color, lw=2.4) for color in colors.values()]
    names = [run.replace("$", r"\$") for run in colors]
    figure.legend(handles, names, loc="outside upper left", ncols=min(4, len(names)), frameon=False, fontsize=10)
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            FigureCanvasAgg(figure).print_png(file)
        os.replace(partial, path)  # noqa: PTH105
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error}. Choose another --out.") from error


def _draw_run(axes: Axes, seeds: Sequence[Series], color: str, window: int) -> None:
    alone = len(seeds) == 1
    for seed in seeds:
        if alone and window > 1:
            axes.plot(seed.steps, seed.values, color=color, lw=0.8, alpha=0.25)
        if not alone:
            axes.plot(*_line(seed, window), color=color, lw=0.9, alpha=0.4)
    mean = seeds[0] if alone else mean_over_seeds(seeds)
    steps, values = _line(mean, window)
    axes.plot(steps, values, color=color, lw=2.2, marker="o" if len(steps) <= FEW else None, ms=3.2)


def _line(series: Series, window: int) -> tuple[Any, Any]:
    """Steps and smoothed values, without those that are no numbers: a line leads over them."""
    values = smoothed(series.values, window)
    there = np.isfinite(series.values)
    return series.steps[there], values[there]


def _dress(axes: Axes, panel: Panel, window: int) -> None:
    """Title, grid and labels."""
    from matplotlib.ticker import MaxNLocator

    axes.set_title(panel.metric, fontsize=10.5, color=INK, loc="left", weight="bold")
    note = f"{panel.kind} step" + (f", mean of {window}" if window > 1 else "")
    axes.set_xlabel(note, fontsize=8.5, color="#68727d", labelpad=2)
    axes.grid(color="#e6eaee", lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8.5, colors="#46525e", length=3)
    axes.margins(x=0.02)
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#c5ccd3")
