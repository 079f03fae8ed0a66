"""The report's sections about one scorer: scores, paired differences, situations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from rlhf_drive.compare.charts import Bar, Estimate, bar_chart, forest_plot
from rlhf_drive.compare.markup import bounds, breakable, grid, heading, key, label, number, signed, split, td

__all__ = ["comparison_section", "score_section", "scored_by", "situation_section"]

Table = Mapping[str, Any]


def scored_by(table: Table) -> str:
    """A line under a table: whose numbers these are, and which of them stand apart."""
    apart = ""
    if table["without_ec"]:
        names = ", ".join(escape(name) for name in table["without_ec"])
        apart = (
            f" {names}: no plan of the previous frame, so EPDMS leaves EC out and is not comparable with the others."
        )
    return f'<p class="soft">Scored by {escape(table["scorer"])}.{apart}</p>'


def score_section(table: Table, title: str, colors: Mapping[str, str], baselines: Sequence[str]) -> str:
    """Means of every component by policy, as bars of the headline and as a table, on all and challenging scenes.

    Args:
        table: Of :func:`rlhf_drive.compare.analysis.analyse`.
        title: Heading.
        colors: Colour by planner.
        baselines: Planners that are never marked as the best.
    """
    headline = table["headline"]
    parts = [
        f"<h2>{escape(title)}</h2><p>Points of 100, mean over scenes; the bars show {label(headline)} with its "
        "interval. Bold: best learned policy.</p>"
    ]
    for subset, words in (("all", "All scenes"), ("challenging", "Challenging scenes")):
        parts.append(f"<h3>{words}</h3>")
        if subset == "challenging" and not table["challenging"]:
            parts.append('<p class="soft">No scene of this set is challenging.</p>')
            continue
        bars = []
        for name, policy in table["policies"].items():
            mean = policy[subset][headline]
            bars.append(Bar(name, mean["mean"], mean["low"], mean["high"], colors.get(name, "#868e96"), bounds(mean)))
        parts += [
            bar_chart(bars, title=f"{label(headline)} by policy, {words.lower()}"),
            _score_table(table, subset, colors, baselines),
            scored_by(table),
        ]
    return "".join(parts)


def _score_table(table: Table, subset: str, colors: Mapping[str, str], baselines: Sequence[str]) -> str:
    rows = []
    learned = [policy for name, policy in table["policies"].items() if name not in baselines]
    for name, policy in table["policies"].items():
        cells = [td(key(name, colors))]
        for component in table["components"]:
            value = policy[subset][component]["mean"]
            best = max((_rounded(p[subset][component]["mean"]) for p in learned), default=math.nan)
            is_best = name not in baselines and len(learned) > 1 and _rounded(value) == best and math.isfinite(value)
            cells.append(td(number(value), "best" if is_best else ""))
        rows.append([*cells, td(str(policy[subset][table["headline"]]["n"])), td(f"{policy['valid']:.1%}")])
    head = ["<th>Policy</th>", *map(heading, table["components"]), "<th>Scenes</th>", "<th>Scored plans</th>"]
    return grid(head, rows)


def _rounded(value: float) -> float:
    return round(value, 1) if math.isfinite(value) else -math.inf


def _span(difference: Table) -> Table:
    return {name: difference[name] for name in ("mean", "low", "high", "clusters")}


def comparison_section(table: Table, title: str) -> str:
    """Paired differences with their intervals, comparison by comparison; empty where none was asked for."""
    headline = table["headline"]
    parts = [
        f"<h2>{escape(title)}</h2><p>Every policy drives the same scenes, so the difference is taken scene by scene. "
        "Green and red: the interval excludes zero. "
        f"The divided bar counts scenes where {label(headline)} is better, equal or worse.</p>"
    ]
    for comparison in table["comparisons"]:
        parts.append(f"<h3>{escape(comparison['name'])} minus {escape(comparison['reference'])}</h3>")
        rows = []
        several = len(comparison["seeds"]) > 1
        for subset in ("all", "challenging") if table["challenging"] else ("all",):
            words = f"{subset}, mean of seeds" if several else subset
            rows.append(Estimate(words, **_span(comparison[subset][headline]), strong=True))
            for seed in comparison["seeds"] if several else ():
                rows.append(Estimate(seed["name"], **_span(seed[subset][headline])))
        parts += [
            forest_plot(rows, title=f"{label(headline)} difference of {comparison['name']}"),
            _difference_table(table, comparison),
        ]
    return "".join([*parts, scored_by(table)]) if table["comparisons"] else ""


def _difference_table(table: Table, comparison: Table) -> str:
    rows = []
    for subset in ("all", "challenging") if table["challenging"] else ("all",):
        cells = [td(subset)]
        for component in table["components"]:
            difference = comparison[subset][component]
            cells.append(td(f"{signed(difference)}<br><small>{bounds(difference, '+.1f')}</small>"))
        main = comparison[subset][table["headline"]]
        rows.append([*cells, td(split(main)), td(str(main["n"]))])
    head = [
        "<th></th>",
        *map(heading, table["components"]),
        "<th>Better / worse</th>",
        "<th>Scenes</th>",
    ]
    return grid(head, rows, "dense" if len(head) > 10 else "")


def situation_section(table: Table) -> str:
    """The headline by situation kind, and the first comparison's gain in each."""
    names = list(table["policies"])
    first = table["comparisons"][0] if table["comparisons"] else None
    rows = []
    for kind, count in table["kinds"].items():
        cells = [td(escape(kind)), td(str(count))]
        cells += [td(number(table["policies"][name]["kinds"][kind])) for name in names]
        if first:
            gain = first["kinds"][kind]
            cells += [td(f"{signed(gain)}<br><small>{bounds(gain, '+.1f')}</small>"), td(split(gain))]
        rows.append(cells)
    head = ["<th>Situation</th>", "<th>Scenes</th>", *(f"<th>{breakable(name)}</th>" for name in names)]
    plot = ""
    if first:
        words = f"{first['name']} − {first['reference']}"
        head += [f"<th>{breakable(words)}</th>", "<th>Better / worse</th>"]
        gains = sorted(first["kinds"].items(), key=lambda item: -_rounded(item[1]["mean"]))
        plot = forest_plot(
            [Estimate(kind, **_span(gain)) for kind, gain in gains],
            title=f"{label(table['headline'])} difference by situation, {words}",
        )
    text = f"{label(table['headline'])}, points of 100; few scenes of a kind give wide intervals."
    return f"<h2>By situation</h2><p>{text}</p>{plot}{grid(head, rows)}{scored_by(table)}"
