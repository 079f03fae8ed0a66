"""Bar and forest charts as inline SVG: sharp at any size, no script, no font to load."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from rlhf_drive.compare.statistics import FEW_CLUSTERS

__all__ = ["Bar", "Estimate", "bar_chart", "forest_plot", "nice_ticks"]

_WIDTH, _LABEL, _VALUE, _ROW = 920.0, 220.0, 205.0, 30.0
"""Of a chart, its label column, its value column and one row, in SVG units."""
GAIN, LOSS, UNCLEAR = "#2b8a3e", "#c92a2a", "#68727d"
"""Colour of an estimate whose interval lies above, below or across zero."""


@dataclass(frozen=True)
class Bar:
    """One bar with an interval; NaN bounds draw none."""

    label: str
    """Text at the left; empty for a further bar of the group above."""
    value: float
    """Length, in axis units."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""
    color: str
    """Fill."""
    note: str = ""
    """Small grey text after the value."""


@dataclass(frozen=True)
class Estimate:
    """One row of a forest plot: a difference and its interval."""

    label: str
    """Text at the left."""
    mean: float
    """Point estimate; NaN draws an empty row."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""
    clusters: int = FEW_CLUSTERS
    """Clusters it rests on; with fewer than `FEW_CLUSTERS` it is drawn grey."""
    strong: bool = False
    """Drawn bolder: the row that the others are parts of."""


def nice_ticks(low: float, high: float, count: int = 6) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) within [low, high].

    Example:
        >>> nice_ticks(-3.0, 9.0, 4)
        [0.0, 5.0]
    """
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw)) if raw > 0 else 1.0
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 10) + 0.0 for i in range(first, last + 1)]


def _text(x: float, y: float, text: str, *, anchor: str = "start", kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, color: str, width: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}" stroke-width="{width}"/>'


def _svg(height: float, parts: Sequence[str], title: str) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH:.0f} {height:.0f}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )


def _axis(ticks: Sequence[float], scale: _Scale, height: float) -> list[str]:
    parts = []
    for tick in ticks:
        x = scale(tick)
        parts.append(_line(x, 6, x, height - 24, "#e3e7eb", 1))
        parts.append(_text(x, height - 8, f"{tick:g}".replace("-", "−"), anchor="middle", kind="tick"))
    return parts


@dataclass(frozen=True)
class _Scale:
    """Axis value to x on the page."""

    low: float
    high: float

    def __call__(self, value: float) -> float:
        clipped = min(max(value, self.low), self.high)
        return _LABEL + (clipped - self.low) / (self.high - self.low) * (_WIDTH - _LABEL - _VALUE)


def bar_chart(bars: Sequence[Bar], *, title: str, low: float = 0.0, high: float = 100.0) -> str:
    """Horizontal bars with interval whiskers, value at the right.

    Args:
        bars: Rows from the top.
        title: Read by screen readers.
        low: Left end of the axis.
        high: Right end of the axis.
    """
    height, scale = len(bars) * _ROW + 34, _Scale(low, high)
    parts = _axis(nice_ticks(low, high), scale, height)
    for i, bar in enumerate(bars):
        y = 8 + i * _ROW
        parts.append(_text(_LABEL - 12, y + 19, bar.label, anchor="end", kind="label"))
        if not math.isfinite(bar.value):
            parts.append(_text(_LABEL + 6, y + 19, "no scenes", kind="tick"))
            continue
        width = scale(bar.value) - _LABEL
        parts.append(
            f'<rect x="{_LABEL}" y="{y + 4:.1f}" width="{width:.1f}" height="{_ROW - 9}" rx="2" fill="{bar.color}"/>'
        )
        if math.isfinite(bar.low):
            parts.append(_line(scale(bar.low), y + 14.5, scale(bar.high), y + 14.5, "#ffffff", 4.0))
            parts.append(_line(scale(bar.low), y + 14.5, scale(bar.high), y + 14.5, "#15202b", 1.6))
        parts.append(_text(_WIDTH - _VALUE + 14, y + 19, f"{bar.value:.1f}", kind="value"))
        parts.append(_text(_WIDTH - _VALUE + 52, y + 19, bar.note, kind="tick"))
    return _svg(height, parts, title)


def _range(rows: Sequence[Estimate]) -> tuple[float, float]:
    """Axis that holds every interval and zero, with a margin."""
    numbers = [v for row in rows for v in (row.mean, row.low, row.high) if math.isfinite(v)]
    low, high = min([0.0, *numbers]), max([0.0, *numbers])
    margin = 0.06 * (high - low) or 1.0
    return low - margin, high + margin


def _color(row: Estimate) -> str:
    if row.clusters < FEW_CLUSTERS:
        return UNCLEAR
    return GAIN if row.low > 0 else LOSS if row.high < 0 else UNCLEAR


def forest_plot(rows: Sequence[Estimate], *, title: str) -> str:
    """Differences with their intervals around a zero line; green above zero, red below, else grey."""
    height, scale = len(rows) * _ROW + 34, _Scale(*_range(rows))
    parts = _axis(nice_ticks(scale.low, scale.high), scale, height)
    parts.append(_line(scale(0), 6, scale(0), height - 24, "#15202b", 1.2))
    for i, row in enumerate(rows):
        y = 8 + i * _ROW + 14
        parts.append(_text(_LABEL - 12, y + 5, row.label, anchor="end", kind="label strong" if row.strong else "label"))
        if not math.isfinite(row.mean):
            parts.append(_text(_WIDTH - _VALUE + 14, y + 5, "no scenes", kind="tick"))
            continue
        color = _color(row)
        text = f"{row.mean:+.1f}"
        if np.isfinite([row.low, row.high]).all():
            parts.append(_line(scale(row.low), y, scale(row.high), y, color, 3.0 if row.strong else 1.8))
            text += f"  [{row.low:+.1f}, {row.high:+.1f}]"
        radius = 5.5 if row.strong else 4.0
        parts.append(f'<circle cx="{scale(row.mean):.1f}" cy="{y:.1f}" r="{radius}" fill="{color}"/>')
        text = text.replace("-", "−")
        parts.append(_text(_WIDTH - _VALUE + 14, y + 5, text, kind="value strong" if row.strong else "value"))
    return _svg(height, parts, title)
