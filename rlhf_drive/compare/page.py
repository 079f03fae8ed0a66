"""The report as one HTML page: inline style, inline charts, embedded pictures, nothing fetched and no script."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from rlhf_drive.compare.charts import Bar, Estimate, bar_chart, forest_plot
from rlhf_drive.compare.markup import (
    LABELS,
    STYLE,
    bounds,
    breakable,
    grid,
    heading,
    key,
    number,
    signed,
    split,
    td,
    verdict,
)
from rlhf_drive.compare.statistics import FEW_CLUSTERS

__all__ = ["Picture", "render_page"]

Table = Mapping[str, Any]


@dataclass(frozen=True)
class Picture:
    """One scene where two policies differ."""

    png: bytes
    """The picture."""
    token: str
    """Scene token."""
    kind: str
    """Situation kind."""
    difference: float
    """PDMS of the policy's drawn plan minus that of its reference, in points."""
    scores: Mapping[str, Mapping[str, float]]
    """Components of the drawn plan by planner, in points."""


def render_page(
    table: Table, pictures: Sequence[Picture], *, title: str, colors: Mapping[str, str], baselines: Sequence[str]
) -> str:
    """HTML of a whole report.

    Args:
        table: What :func:`rlhf_drive.compare.analysis.analyse` returns; policies are shown in its order.
        pictures: Scenes of the first comparison, in order.
        title: Heading of the page.
        colors: Colour by planner, shared with the pictures.
        baselines: Planners that are not learned policies: never marked as the best.
    """
    body = [
        _header(table, title),
        _scores(table, colors, baselines),
        _comparisons(table),
        _situations(table),
        _plans(table, colors),
        _pictures(table, pictures, colors),
        _method(table),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>{''.join(body)}</main></body></html>\n"
    )


def _header(table: Table, title: str) -> str:
    confidence = f"{table['bootstrap']['confidence']:.0%}"
    cards = []
    for comparison in table["comparisons"]:
        for subset, words in (("all", "all scenes"), ("challenging", "challenging scenes")):
            gain = comparison[subset]["pdms"]
            if gain["n"] == 0:
                continue
            seeds = f", mean of {len(comparison['policies'])} seeds" if len(comparison["policies"]) > 1 else ""
            cards.append(
                f'<div class="card"><span class="soft">{escape(comparison["name"])} minus '
                f"{escape(comparison['reference'])}, {words}</span><b>{signed(gain)}</b>"
                f'<span class="soft">PDMS points {bounds(gain, "+.1f")} ({confidence}{seeds})</span></div>'
            )
    return (
        f'<h1>{escape(title)}</h1><p class="soft">{table["scenes"]} scenes in {table["clusters"]} independent '
        f"clusters, {table['challenging']} of them challenging; scored by {escape(table['scorer'])}.</p>"
        f'<div class="cards">{"".join(cards)}</div>'
    )


def _scores(table: Table, colors: Mapping[str, str], baselines: Sequence[str]) -> str:
    parts = [
        "<h2>Scores</h2><p>Points of 100, mean over scenes; the bars show PDMS with its interval. "
        "Bold: best learned policy.</p>"
    ]
    for subset, words in (("all", "All scenes"), ("challenging", "Challenging scenes")):
        parts.append(f"<h3>{words}</h3>")
        if subset == "challenging" and not table["challenging"]:
            parts.append('<p class="soft">No scene of this set is challenging.</p>')
            continue
        bars = []
        for name, policy in table["policies"].items():
            pdms = policy[subset]["pdms"]
            bars.append(Bar(name, pdms["mean"], pdms["low"], pdms["high"], colors.get(name, "#868e96"), bounds(pdms)))
        parts += [
            bar_chart(bars, title=f"PDMS by policy, {words.lower()}"),
            _score_table(table, subset, colors, baselines),
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
            is_best = name not in baselines and len(learned) > 1 and _rounded(value) == best
            cells.append(td(number(value), "best" if is_best else ""))
        rows.append([*cells, td(str(policy[subset]["pdms"]["n"])), td(f"{policy['valid']:.1%}")])
    head = ["<th>Policy</th>", *map(heading, table["components"]), "<th>Scenes</th>", "<th>Scored plans</th>"]
    return grid(head, rows)


def _rounded(value: float) -> float:
    return round(value, 1) if math.isfinite(value) else -math.inf


def _span(difference: Table) -> Table:
    return {name: difference[name] for name in ("mean", "low", "high", "clusters")}


def _comparisons(table: Table) -> str:
    parts = [
        "<h2>Paired differences</h2><p>Every policy drives the same scenes, so the difference is taken scene by scene. "
        "Green and red: the interval excludes zero. "
        "The divided bar counts scenes where PDMS is better, equal or worse.</p>"
    ]
    for comparison in table["comparisons"]:
        parts.append(f"<h3>{escape(comparison['name'])} minus {escape(comparison['reference'])}</h3>")
        rows = []
        several = len(comparison["seeds"]) > 1
        for subset in ("all", "challenging") if table["challenging"] else ("all",):
            gain = comparison[subset]["pdms"]
            label = f"{subset}, mean of seeds" if several else subset
            rows.append(Estimate(label, **_span(gain), strong=True))
            for seed in comparison["seeds"] if several else ():
                single = seed[subset]["pdms"]
                rows.append(Estimate(seed["name"], **_span(single)))
        parts += [
            forest_plot(rows, title=f"PDMS difference of {comparison['name']}"),
            _difference_table(table, comparison),
        ]
    return "".join(parts) if table["comparisons"] else ""


def _difference_table(table: Table, comparison: Table) -> str:
    rows = []
    for subset in ("all", "challenging") if table["challenging"] else ("all",):
        cells = [td(f"{subset} scenes")]
        for component in table["components"]:
            difference = comparison[subset][component]
            cells.append(td(f"{signed(difference)}<br><small>{bounds(difference, '+.1f')}</small>"))
        pdms = comparison[subset]["pdms"]
        rows.append([*cells, td(split(pdms)), td(str(pdms["n"]))])
    head = [
        "<th></th>",
        *map(heading, table["components"]),
        "<th>Better / worse</th>",
        "<th>Scenes</th>",
    ]
    return grid(head, rows)


def _situations(table: Table) -> str:
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
            title=f"PDMS difference by situation, {words}",
        )
    text = "PDMS, points of 100; few scenes of a kind give wide intervals."
    return f"<h2>By situation</h2><p>{text}</p>{plot}{grid(head, rows)}"


def _plans(table: Table, colors: Mapping[str, str]) -> str:
    rows = []
    for name, policy in table["policies"].items():
        plan = policy["plan"]
        rows.append(
            [
                td(key(name, colors)),
                td(number(100 * plan["final_reversal"]) + " %"),
                td(number(plan["mean_speed_mps"], ".2f")),
                td(number(plan["ade_m"], ".2f")),
                td(number(plan["fde_m"], ".2f")),
                td(str(policy["samples"])),
            ]
        )
    head = [
        "Policy",
        "Last step reverses",
        "Mean speed (m/s)",
        "Mean distance to human (m)",
        "Final distance (m)",
        "Samples",
    ]
    return (
        "<h2>Plan quality</h2><p>Of the first sample in every scene. A rising share of plans whose last step goes back "
        "shows a policy that games the progress reward.</p>" + grid([f"<th>{text}</th>" for text in head], rows)
    )


def _pictures(table: Table, pictures: Sequence[Picture], colors: Mapping[str, str]) -> str:
    if not pictures:
        return ""
    first = table["comparisons"][0]
    cards = []
    for picture in pictures:
        source = base64.b64encode(picture.png).decode("ascii")
        points = picture.difference
        gain = f'<span class="{verdict(points, points)}">{number(points, "+.1f")}</span>'
        rows = [
            [td(key(name, colors)), *(td(number(scores.get(c, math.nan), ".0f")) for c in table["components"])]
            for name, scores in picture.scores.items()
        ]
        cards.append(
            f'<figure><img alt="{escape(picture.kind)}: plans from above" src="data:image/png;base64,{source}">'
            f"<figcaption><b>{escape(picture.kind)}</b> {gain} "
            f'<span class="soft">{escape(picture.token)}</span></figcaption>'
            f"{grid(['<th>Plan</th>', *map(heading, table['components'])], rows)}</figure>"
        )
    return (
        f"<h2>Where {escape(first['policies'][0])} and {escape(first['reference'])} differ most</h2>"
        "<p>The largest gains first, then the largest losses. Forward is up; a dot per half second, the outlined box "
        "is the ego after 4 s, the green band is what the human drove, fading boxes are where others will be "
        f'in 1 to 4 s. Scores are those of the drawn plan.</p><div class="grid">{"".join(cards)}</div>'
    )


def _method(table: Table) -> str:
    how = table["bootstrap"]
    terms = "".join(
        f"<li><b>{escape(LABELS[c][0])}</b>: {escape(LABELS[c][1])}</li>" for c in table["components"] if c in LABELS
    )
    failed = [
        f"<li>{escape(name)}, {escape(token)}: {escape(reason)}</li>"
        for name, policy in table["policies"].items()
        for token, reason in list(policy["failures"].items())[:10]
    ]
    failures = f"<h3>Plans that could not be scored</h3><ul>{''.join(failed)}</ul>" if failed else ""
    return (
        f"<h2>Method</h2><ul>{terms}</ul><p>Intervals are {how['confidence']:.0%} percentile bootstraps of "
        f"{how['samples']:,} resamples (seed {how['seed']}) that draw whole clusters, because recordings of one "
        "cluster are not independent. Training seeds are averaged per scene before pairing; the interval covers the "
        "choice of scenes, not of training seeds. An estimate stays grey where its interval holds zero, and where it "
        f"rests on fewer than {FEW_CLUSTERS} clusters, too few to trust an interval. A plan that could not be scored "
        "is left out of its scene's mean and never counted as zero. "
        f"Challenging: constant velocity scores below 80 and the human at least 80.</p>{failures}"
    )
