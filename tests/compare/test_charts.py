from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from rlhf_drive.compare.charts import GAIN, LOSS, UNCLEAR, Bar, Estimate, bar_chart, forest_plot, nice_ticks


@pytest.mark.parametrize(
    ("low", "high", "count", "ticks"),
    [
        (0.0, 100.0, 6, [0, 20, 40, 60, 80, 100]),
        (-3.0, 9.0, 4, [0, 5]),
        (-0.31, 0.42, 6, [-0.2, 0.0, 0.2, 0.4]),
        (-20.5, 27.0, 6, [-20, -10, 0, 10, 20]),
    ],
)
def test_ticks_are_round_numbers_inside_the_axis(low: float, high: float, count: int, ticks: list[float]) -> None:
    assert nice_ticks(low, high, count) == pytest.approx(ticks)


def rectangles(svg: str) -> list[float]:
    return [float(width) for width in re.findall(r'<rect [^>]*width="([0-9.]+)"', svg)]


def test_bars_are_as_long_as_their_values() -> None:
    svg = bar_chart([Bar("a", 80.0, 70, 90, "#111"), Bar("b", 20.0, 15, 25, "#222")], title="t")
    first, second = rectangles(svg)
    assert first / second == pytest.approx(4.0, rel=1e-3)
    assert "80.0" in svg


def test_a_bar_without_scenes_says_so() -> None:
    nan = math.nan
    svg = bar_chart([Bar("a", nan, nan, nan, "#111")], title="t")
    assert rectangles(svg) == []
    assert "no scenes" in svg


@pytest.mark.parametrize(
    ("low", "high", "clusters", "color"),
    [(0.5, 3.0, 50, GAIN), (-3.0, -0.5, 50, LOSS), (-0.5, 3.0, 50, UNCLEAR), (0.5, 3.0, 4, UNCLEAR)],
)
def test_an_estimate_is_coloured_only_where_it_is_clear(low: float, high: float, clusters: int, color: str) -> None:
    svg = forest_plot([Estimate("a", (low + high) / 2, low, high, clusters)], title="t")
    assert re.findall(r'<circle [^>]*fill="([^"]+)"', svg) == [color]


def test_an_estimate_lies_between_the_ends_of_its_interval() -> None:
    svg = forest_plot([Estimate("a", 2.0, 1.0, 5.0)], title="t")
    x = float(re.findall(r'<circle cx="([0-9.]+)"', svg)[0])
    low, high = re.findall(rf'<line x1="([0-9.]+)" [^>]*x2="([0-9.]+)" [^>]*stroke="{GAIN}"', svg)[0]
    assert (x - float(low)) / (float(high) - float(low)) == pytest.approx(0.25, abs=0.002)
    assert "+2.0  [+1.0, +5.0]" in svg


def test_text_is_escaped_and_the_svg_is_well_formed() -> None:
    svg = forest_plot([Estimate('<script>&"', 1.0, math.nan, math.nan)], title="a < b")
    texts = [element.text for element in ElementTree.fromstring(svg).iter("text")]
    assert '<script>&"' in texts
    assert "<script>" not in svg
