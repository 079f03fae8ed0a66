"""The report's sections beyond scores: warnings of training, how plans move, and plans that could not be scored."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from rewards.hack_detector import MonitorLimits
from rewards.plan_motion import MOTION, MOVING_M, STANDSTILL_M
from rlhf_drive.compare.markup import grid, key, number, td

__all__ = ["failure_section", "plan_section", "warning_section"]

Table = Mapping[str, Any]

_SHOWN_ALERTS = 40
_SHOWN_REASONS = 10


def warning_section(table: Table) -> str:
    """Alerts of training; nothing where training was not watched."""
    alerts = table["alerts"]
    if alerts is None:
        return ""
    if not alerts:
        text = "Training was watched for signs that the policy games its reward; there were none."
        return f'<h2>Warnings</h2><p class="soft">{text}</p>'
    rows = [
        [td(escape(a["phase"])), td(str(a["step"])), td(escape(a["name"]), "text"), td(escape(a["message"]), "text")]
        for a in alerts[:_SHOWN_ALERTS]
    ]
    left = len(alerts) - len(rows)
    more = f'<p class="soft">{left} more are in alerts.jsonl.</p>' if left else ""
    head = ["<th>Phase</th>", "<th>Step</th>", '<th class="text">Sign</th>', '<th class="text">What was seen</th>']
    return (
        "<h2>Warnings</h2><p>Signs, noticed during training, that the policy may be gaming its reward. Judge the gains "
        f"below by them.</p>{grid(head, rows)}{more}"
    )


def plan_section(table: Table, colors: Mapping[str, str]) -> str:
    """How plans move: shares, speeds, distances, and motion as a multiple of the human's."""
    rows = [
        [
            td(key(name, colors)),
            td(number(policy["plan"]["mean_speed_mps"], ".2f")),
            td(number(policy["plan"]["ade_m"], ".2f")),
            td(number(policy["plan"]["fde_m"], ".2f")),
            td(str(policy["samples"])),
        ]
        for name, policy in table["policies"].items()
    ]
    head = ["Policy", "Mean speed (m/s)", "Mean distance to human (m)", "Final distance (m)", "Samples"]
    return (
        "<h2>Plan quality</h2><p>Of the first sample in every scene.</p>"
        + grid([f"<th>{text}</th>" for text in head], rows)
        + _monitors(table, colors)
    )


def _monitors(table: Table, colors: Mapping[str, str]) -> str:
    limits = MonitorLimits()
    shares = {"final_reversal": limits.reversal_share, "standstill": limits.standstill_share}
    rows = []
    for name, policy in table["policies"].items():
        cells = [td(key(name, colors))]
        for monitor, most in shares.items():
            share = policy["monitors"].get(f"monitor/{monitor}", math.nan)
            cells.append(td(number(100 * share) + " %", "loss" if share > most else ""))
        for quantity in MOTION:
            ratio = policy["monitors"].get(f"monitor/{quantity}_ratio", math.nan)
            off = ratio > limits.motion_factor or ratio < 1.0 / limits.motion_factor
            cells.append(td(number(ratio, ".2f"), "loss" if off else ""))
        rows.append(cells)
    head = [
        "Policy",
        "Last step reverses",
        "Stands still",
        *(f"{name.replace('_', ' ').capitalize()}" for name in MOTION),
    ]
    return (
        "<h3>Signs of a gamed reward</h3><p>Of all samples. Stands still: gets no farther than "
        f"{STANDSTILL_M:g} m where the human (else PDM-Closed) gets {MOVING_M:g} m far. The others are multiples of "
        "the human's in the same scenes, 1 = alike. Red: beyond the limits that training is watched with.</p>"
        + grid([f"<th>{text}</th>" for text in head], rows)
    )


def failure_section(tables: Sequence[Table]) -> str:
    """Plans that could not be scored: counts by kind for every scorer and planner, and the first reasons."""
    parts = [_failures(table) for table in tables if any(policy["failures"] for policy in table["policies"].values())]
    return "<h3>Plans that could not be scored</h3>" + "".join(parts) if parts else ""


def _failures(table: Table) -> str:
    policies = {name: policy for name, policy in table["policies"].items() if policy["failures"]}
    kinds = sorted({kind for policy in policies.values() for kind in policy["failure_kinds"]})
    rows = [
        [td(escape(name)), *(td(str(policy["failure_kinds"].get(kind, 0))) for kind in kinds)]
        for name, policy in policies.items()
    ]
    reasons = "".join(
        f"<li>{escape(name)}, {escape(token)}: {escape(reason)}</li>"
        for name, policy in policies.items()
        for token, reason in list(policy["failures"].items())[:_SHOWN_REASONS]
    )
    head = ["<th>Policy</th>", *(f"<th>{escape(kind.replace('_', ' '))}</th>" for kind in kinds)]
    counts = grid(head, rows) if kinds else ""
    return f'<p class="soft">By {escape(table["scorer"])}:</p>{counts}<ul>{reasons}</ul>'
