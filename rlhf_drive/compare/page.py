"""The report as one HTML page: inline style, inline charts, embedded pictures, nothing fetched and no script."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from rlhf_drive.compare.markup import LABELS, STYLE, bounds, grid, heading, key, label, number, signed, td, verdict
from rlhf_drive.compare.page_plans import failure_section, plan_section, warning_section
from rlhf_drive.compare.page_scores import comparison_section, score_section, scored_by, situation_section
from rlhf_drive.compare.statistics import FEW_CLUSTERS

__all__ = ["Picture", "render_page"]

Table = Mapping[str, Any]

_SUBSETS = {"all": "all scenes", "challenging": "challenging scenes"}


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
    """Headline score of the policy's drawn plan minus that of its reference, in points."""
    scores: Mapping[str, Mapping[str, float]]
    """Components of the drawn plan by planner, in points."""


def render_page(
    table: Table, pictures: Sequence[Picture], *, title: str, colors: Mapping[str, str], baselines: Sequence[str]
) -> str:
    """HTML of a whole report.

    Args:
        table: What :func:`rlhf_drive.compare.analysis.analyse` returns, and `alerts`, which
            :func:`rlhf_drive.compare.alerts.read_alerts` does; policies are shown in its order.
        pictures: Scenes of the first comparison, in order.
        title: Heading of the page.
        colors: Colour by planner, shared with the pictures.
        baselines: Planners that are not learned policies: never marked as the best.
    """
    body = [
        _header(table, title),
        warning_section(table),
        score_section(table, "Scores", colors, baselines),
        comparison_section(table, "Paired differences"),
    ]
    for other in table["secondary"]:
        name = label(other["headline"])
        body += [
            score_section(other, f"{name}: the same plans by another scorer", colors, baselines),
            comparison_section(other, f"{name}: paired differences"),
        ]
    body += [
        situation_section(table),
        plan_section(table, colors),
        _pictures(table, pictures, colors),
        _method(table),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>{''.join(body)}</main></body></html>\n"
    )


def _header(table: Table, title: str) -> str:
    cards = [
        _card(table, comparison, subset, table["headline"])
        for comparison in table["comparisons"]
        for subset in _SUBSETS
    ]
    cards += [
        _card(other, comparison, "all", component)
        for other in table["secondary"]
        for comparison in other["comparisons"]
        for component in (other["headline"], "ec")
        if component in other["components"]
    ]
    scorers = " and ".join(part["scorer"] for part in (table, *table["secondary"]))
    return (
        f'<h1>{escape(title)}</h1><p class="soft">{table["scenes"]} scenes in {table["clusters"]} independent '
        f"clusters, {table['challenging']} of them challenging; scored by {escape(scorers)}.</p>"
        f'<div class="cards">{"".join(cards)}</div>'
    )


def _card(table: Table, comparison: Table, subset: str, component: str) -> str:
    """A component's difference in one comparison; empty where no scene tells it."""
    gain = comparison[subset][component]
    if gain["n"] == 0:
        return ""
    seeds = f", mean of {len(comparison['policies'])} seeds" if len(comparison["policies"]) > 1 else ""
    return (
        f'<div class="card"><span class="soft">{escape(comparison["name"])} minus '
        f"{escape(comparison['reference'])}, {_SUBSETS[subset]}</span><b>{signed(gain)}</b>"
        f'<span class="soft">{label(component)} points {bounds(gain, "+.1f")} '
        f"({table['bootstrap']['confidence']:.0%}{seeds})</span></div>"
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
        f"{scored_by(table)}"
    )


def _method(table: Table) -> str:
    how, tables = table["bootstrap"], (table, *table["secondary"])
    shown = dict.fromkeys(component for part in tables for component in part["components"] if component in LABELS)
    terms = "".join(f"<li><b>{label(c)}</b>: {escape(LABELS[c][1])}</li>" for c in shown)
    return (
        f"<h2>Method</h2><ul>{terms}</ul><p>Intervals are {how['confidence']:.0%} percentile bootstraps of "
        f"{how['samples']:,} resamples (seed {how['seed']}) that draw whole clusters, because recordings of one "
        "cluster are not independent. Training seeds are averaged per scene before pairing; the interval covers the "
        "choice of scenes, not of training seeds. An estimate stays grey where its interval holds zero, and where it "
        f"rests on fewer than {FEW_CLUSTERS} clusters, too few to trust an interval. A plan that could not be scored "
        "is left out of its scene's mean and never counted as zero. "
        "Challenging: constant velocity scores below 80 points and the human at least 80, by PDMS, or by EPDMS where "
        "only the reference of NAVSIM v2.2 is known.</p>"
        f"{failure_section(tables)}"
    )
