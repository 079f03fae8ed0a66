"""All about one run as text: recipe, stages, metrics, checkpoints, warnings, pictures."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_drive.runs.changes import recipe_changes
from rlhf_drive.runs.folders import Run, checkpoints, last_activity, planned_stages, state_of
from rlhf_drive.runs.layout import WIDTH, aligned, duration, number, shortened, size_of, wrapped
from rlhf_drive.runs.lines import METRICS_FILE, complete_lines, read_metrics
from rlhf_drive.runs.overview import progress_of, seconds_of
from rlhf_drive.runs.series import BLOCKS, kind_of, metric_names, series_of, sparkline

__all__ = ["RL_HEADLINES", "SFT_HEADLINES", "summary"]

RL_HEADLINES = (
    "reward/total",
    "heldout/epdms",
    "ratio/clip_frac",
    "kl/ref_k3",
    "policy/sampled_nll",
    "optim/grad_norm",
    "time/step_s",
)
"""What says how RL goes."""
SFT_HEADLINES = ("loss/train", "loss/heldout")
"""What says how SFT goes."""
ALERTS_FILE = "alerts.jsonl"
ALERTS = 3
"""Latest warnings that are shown."""
VALUE_WIDTH = 24


def summary(run: Run, *, phase: str | None = None, blocks: str = BLOCKS) -> list[str]:
    """Lines that tell a run.

    Args:
        run: Whose.
        phase: Phase whose metrics are listed; the latest if not given. It must be one of the run's.
        blocks: Characters that courses are drawn with, from low to high.

    Raises:
        DataError: Its metrics are damaged.
    """
    lines = read_metrics(run.path) if (run.path / METRICS_FILE).is_file() else []
    parts = [_head(run), _recipe(run), _stages(run, lines), _headlines(lines, blocks)]
    parts += [_metrics(lines, phase), _alerts(run), _files(run)]
    return [line for part in parts if part for line in [*part, ""]][:-1]


def _head(run: Run) -> list[str]:
    progress = progress_of(run)
    facts = [
        run.ended if state_of(run) == "failed" else state_of(run),
        f"job {run.job}",
        *([progress.where] if progress.where else []),
    ]
    facts += [f"took {duration(seconds_of(run))}", f"last written {duration(time.time() - last_activity(run))} ago"]
    return [f"{run.path}", *wrapped(facts, indent="  "), *_paragraph(str(run.setting("description", "")))]


def _paragraph(text: str) -> list[str]:
    return wrapped(text.split(), indent="  ", separator=" ")


def _recipe(run: Run) -> list[str]:
    changes = recipe_changes(run.recipe)
    if not changes.keys:
        return [f"Recipe: {changes.recipe}, unchanged"]
    rows = [
        [key, shortened(_value(before), VALUE_WIDTH // 2), "->", shortened(_value(now), VALUE_WIDTH)]
        for key, (before, now) in changes.keys.items()
    ]
    count = "a change" if len(rows) == 1 else f"{len(rows)} changes"
    return [f"Recipe: {changes.recipe} with {count}", *aligned(rows, right=(1,), indent="  ")]


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _stages(run: Run, lines: Sequence[Mapping[str, Any]]) -> list[str]:
    steps = {line["phase"]: line["step"] for line in lines}
    kept, rows = checkpoints(run), []
    planned = planned_stages(run)
    for stage in [*planned, *(phase for phase in steps if phase not in planned)]:
        state = "done" if stage in run.done else "begun" if stage in steps else "to do"
        reached = f"{steps[stage]} steps" if stage in steps else ""
        resume = f"checkpoints {', '.join(map(str, kept[stage]))}" if stage in kept else ""
        rows.append([stage, state, reached, resume])
    return ["Stages", *aligned(rows, right=(2,), indent="  ")] if rows else []


def _headlines(lines: Sequence[Mapping[str, Any]], blocks: str) -> list[str]:
    rows = []
    for metric in (*SFT_HEADLINES, *RL_HEADLINES):
        for phase, series in series_of(lines, metric).items():
            if (metric in SFT_HEADLINES) != (kind_of(phase) == "sft"):
                continue
            values = series.values[np.isfinite(series.values)]
            if len(values):
                course = sparkline(series.values, blocks=blocks)
                rows.append([metric, phase, number(values[0]), "->", number(values[-1]), course])
    return ["Courses, from the first to the last step", *aligned(rows, right=(2, 4), indent="  ")] if rows else []


def _metrics(lines: Sequence[Mapping[str, Any]], phase: str | None) -> list[str]:
    if not lines:
        return ["No metrics: no step was logged."]
    phase = phase or lines[-1]["phase"]
    own = [line for line in lines if line["phase"] == phase]
    rows, area = [], ""
    for metric in metric_names(own):
        values = series_of(own, metric)[phase].values
        numbers = values[np.isfinite(values)]
        if metric.partition("/")[0] != area:
            area = metric.partition("/")[0]
            rows.append([area, "", "", ""])
        low, mean = (number(numbers.min()), number(numbers.mean())) if len(numbers) else ("", "")
        rows.append([f"  {metric.partition('/')[2]}", low, mean, number(values[-1])])
    head = f"Metrics of {phase}, steps {own[0]['step']} to {own[-1]['step']}"
    return [head, *aligned([["", "min", "mean", "last"], *rows], right=(1, 2, 3), indent="  ")]


def _alerts(run: Run) -> list[str]:
    path = run.path / ALERTS_FILE
    if not path.is_file():
        return []
    alerts = [json.loads(line) for line in complete_lines(path)]
    if not alerts:
        return ["Warnings: none"]
    shown = [
        line
        for alert in alerts[-ALERTS:]
        for line in _paragraph(f"{alert['phase']} step {alert['step']}: {alert['message']}")
    ]
    count = f"{len(alerts)}" if len(alerts) <= ALERTS else f"{len(alerts)}, the latest {ALERTS}"
    return [f"Warnings: {count}", *shown]


def _files(run: Run) -> list[str]:
    """Pictures, profiles, report and the size of all."""
    found = []
    for stage, kind, ending in (("*", "pictures", "png"), ("*", "profiles", "txt")):
        paths = sorted(run.path.glob(f"{stage}/{kind}/*.{ending}"), key=lambda path: path.stat().st_mtime)
        if paths:
            found.append(f"{kind}: {len(paths)}, the latest {paths[-1].relative_to(run.path)}")
    found += [name for name in ("report.html", "summary.json") if (run.path / name).is_file()]
    return [f"Files ({size_of(run.path)})", *(f"  {shortened(line, WIDTH - 2)}" for line in found)]
