"""The page's style, its headings, and the cells that its tables are made of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from rlhf_drive.compare.statistics import FEW_CLUSTERS

__all__ = [
    "LABELS",
    "STYLE",
    "bounds",
    "breakable",
    "grid",
    "heading",
    "key",
    "label",
    "number",
    "signed",
    "split",
    "td",
    "verdict",
]

Table = Mapping[str, Any]

LABELS = {
    "pdms": ("PDMS", "NC × DAC × (5 EP + 5 TTC + 2 C) / 12"),
    "epdms": (
        "EPDMS",
        "NC × DAC × DDC × TLC × (5 EP + 5 TTC + 2 LK + 2 HC + 2 EC) / 16; where there is no EC, without it and / 14",
    ),
    "nc": ("NC", "no at-fault collision"),
    "dac": ("DAC", "stays on the drivable area"),
    "ddc": ("DDC", "driving direction; without weight in PDMS, a factor of EPDMS"),
    "tlc": ("TLC", "runs no red light"),
    "ep": ("EP", "progress along the route relative to the PDM-Closed planner"),
    "ttc": ("TTC", "time to collision stays above 1 s"),
    "lk": ("LK", "lane keeping: never 2 s on end more than 0.5 m off the centreline, intersections apart"),
    "c": ("C", "comfort: acceleration, jerk, yaw rate and yaw acceleration within bounds"),
    "hc": ("HC", "history comfort: the same bounds over the past 1.5 s and the plan together"),
    "ec": (
        "EC",
        "two-frame extended comfort: agrees with the plan of 0.5 s earlier; – for planners without such a plan",
    ),
    "reward": ("Reward", "weighted total of the reward terms"),
}
"""Heading and explanation by component; a user's own term is shown by its name."""

STYLE = """
:root{--ink:#15202b;--soft:#5b6672;--line:#e3e7eb;--tint:#f6f8fa;--gain:#2b8a3e;--loss:#c92a2a}
*{box-sizing:border-box}
body{margin:0;background:#fff;color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:1140px;margin:0 auto;padding:40px 28px 80px}
h1{font-size:28px;line-height:1.2;margin:0 0 6px}
h2{font-size:19px;margin:46px 0 6px;padding-top:14px;border-top:1px solid var(--line)}
h3{font-size:15px;margin:24px 0 6px}p{margin:6px 0 12px;max-width:80ch}.soft{color:var(--soft)}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(230px,1fr));gap:14px;margin:24px 0 8px}
.card{border:1px solid var(--line);border-radius:10px;padding:16px 18px;background:var(--tint)}
.card b{display:block;font-size:30px;line-height:1.15;font-variant-numeric:tabular-nums}.card .soft{font-size:13px}
.gain{color:var(--gain)}.loss{color:var(--loss)}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;margin:8px 0 14px}
th,td{padding:7px 8px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th{white-space:normal;vertical-align:bottom;font-size:12.5px;color:var(--soft);font-weight:600}th:first-child,td:first-child{text-align:left}
td.text,th.text{text-align:left;white-space:normal}
table.dense td,table.dense th{padding:7px 5px}table.dense td small{font-size:10px}
tbody tr:hover{background:var(--tint)}td small{color:var(--soft);font-size:11.5px}.best{font-weight:700}
i.key{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:8px}
.split{display:inline-flex;width:90px;height:11px;border-radius:3px;overflow:hidden;vertical-align:middle;background:var(--line)}
.split span{display:block}svg.chart{width:100%;height:auto;margin:6px 0 10px}
svg text{font-size:13px;fill:var(--ink)}svg .tick{font-size:11.5px;fill:var(--soft)}svg .strong{font-weight:700}
svg .value{white-space:pre;font-variant-numeric:tabular-nums}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(440px,1fr));gap:22px}
figure{margin:0;border:1px solid var(--line);border-radius:10px;overflow:hidden}figure img{display:block;width:100%}
figcaption{padding:12px 14px 4px;font-size:13.5px}
figure table{font-size:13px;margin:8px 0}figure td,figure th{padding:4px 7px}
@media (max-width:560px){.grid{grid-template-columns:1fr}}@media print{figure,table,svg{break-inside:avoid}}
"""


def number(value: float, form: str = ".1f") -> str:
    return format(value, form).replace("-", "−") if math.isfinite(value) else "–"


def verdict(low: float, high: float) -> str:
    """Style of a difference by its interval: ``gain`` above zero, ``loss`` below, else none."""
    return "gain" if low > 0 else "loss" if high < 0 else ""


def breakable(text: str) -> str:
    """Escaped text that may wrap after `_` and `/`."""
    return escape(text).replace("_", "_<wbr>").replace("/", "/<wbr>")


def signed(difference: Table) -> str:
    """Difference coloured where its interval excludes zero."""
    kind = "" if difference["clusters"] < FEW_CLUSTERS else verdict(difference["low"], difference["high"])
    return f'<span class="{kind}">{number(difference["mean"], "+.1f")}</span>'


def bounds(interval: Table, form: str = ".1f") -> str:
    if not math.isfinite(interval["low"]):
        return ""
    return f"[{number(interval['low'], form)}, {number(interval['high'], form)}]"


def key(name: str, colors: Mapping[str, str]) -> str:
    return f'<i class="key" style="background:{escape(colors.get(name, "#868e96"))}"></i>{escape(name)}'


def heading(component: str) -> str:
    meaning = LABELS.get(component, ("", "user-defined reward term"))[1]
    return f'<th title="{escape(meaning)}">{label(component)}</th>'


def label(component: str) -> str:
    """Short name of a component, escaped."""
    return escape(LABELS.get(component, (component, ""))[0])


def grid(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """A table that scrolls by itself where the page is narrow; kind `dense` fits more columns."""
    lines = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    opened = f'<table class="{kind}">' if kind else "<table>"
    return f'<div class="scroll">{opened}<thead><tr>{"".join(head)}</tr></thead><tbody>{lines}</tbody></table></div>'


def td(text: str, kind: str = "") -> str:
    return f'<td class="{kind}">{text}</td>' if kind else f"<td>{text}</td>"


def split(difference: Table) -> str:
    """Wins, ties and losses as a divided bar."""
    win, tie = difference["win_rate"], difference["tie_rate"]
    if not math.isfinite(win):
        return ""
    parts = ((win, "var(--gain)", "better"), (tie, "#ced4da", "equal"), (1.0 - win - tie, "var(--loss)", "worse"))
    spans = "".join(f'<span style="width:{100 * share:.1f}%;background:{color}"></span>' for share, color, _ in parts)
    words = ", ".join(f"{word} in {share:.0%}" for share, _, word in parts)
    return f'<span class="split" title="{words}">{spans}</span><br><small>{win:.0%} / {1.0 - win - tie:.0%}</small>'
