"""A prediction as a table of 80 columns, or as plain data."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from rlhf_drive.estimate.layout import Layout
from rlhf_drive.estimate.machine import Machine
from rlhf_drive.estimate.predict import Prediction, Workload

__all__ = ["as_data", "as_table", "human_bytes", "human_count", "human_time"]

NOTES = {
    "push": "new weights to samplers",
    "sampling": "encode and decode",
    "scoring": "waited for after the last plan",
    "gather": "rollouts to every process",
    "reference": "log-probabilities of the reference",
    "likelihood": "forward passes of all updates",
    "update": "gradients and optimizer",
    "exchange": "gradients and weights between processes",
    "monitors": "statistics, held-out scenes",
}


def human_bytes(size: float) -> str:
    """Example: ``1.50 GB``."""
    units = ("B", "kB", "MB", "GB", "TB", "PB")
    power = min(len(units) - 1, int(math.log(size, 1000))) if size >= 1 else 0
    return f"{size / 1000**power:.3g} {units[power]}"


def human_time(seconds: float) -> str:
    """Example: ``1.5 h``."""
    for limit, unit in ((86400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * limit:
            return f"{seconds / limit:.3g} {unit}"
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def human_count(count: float) -> str:
    """Example: ``3.6 billion``."""
    return f"{count / 1e9:.3g} billion" if count >= 1e9 else f"{count / 1e6:.3g} million"


def as_table(name: str, work: Workload, machine: Machine, layout: Layout, found: Prediction) -> str:
    """Lines of at most 80 columns."""
    step, params = work.step, found.params
    sampling = f"{layout.samplers} rollout workers" if layout.samplers else "which sample too"
    scoring = f"{layout.scorers} reward workers" if layout.scorers else f"{machine.cores} cores score"
    lines = [
        f"{name}: {human_count(params.total)} parameters, {human_count(params.trained)} trained, {work.net.process}",
        *_folded(f"{machine.name}: {layout.trainers} training processes, {sampling}, {scoring}"),
        *_folded(
            f"a step: {step.scenes} scenes x {step.group} plans; {work.flat:.0%} of the groups taken as without spread"
        ),
        "",
        f"  {'part of a step':<14}{'time':>10}{'share':>8}",
    ]
    for part, seconds in found.parts.items():
        if seconds > 0:
            lines.append(f"  {part:<14}{human_time(seconds):>10}{seconds / found.step_s:8.0%}  {NOTES[part]}")
    lines += [
        f"  {'step':<14}{human_time(found.step_s):>10}{'':8}  {found.scenes_per_s:.3g} scenes/s, "
        f"{found.rollouts_per_s:.4g} plans/s",
        f"  {'run':<14}{human_time(found.run_s):>10}{'':8}  {work.max_steps} steps, checkpoints included",
        "",
        "  waiting: " + ", ".join(f"{who} {share:.0%}" for who, share in found.idle.items()),
        "",
    ]
    for who, memory in (("training process", found.trainer), ("rollout worker", found.sampler)):
        if memory is not None:
            held = [
                f"{key} {human_bytes(value)}" for key, value in vars(memory).items() if value >= 1e-3 * memory.total
            ]
            lines += [f"  memory of a {who}: {human_bytes(memory.total)}", *_wrapped(held)]
    sent = [f"rollouts {human_bytes(found.gather_bytes)}"] if layout.trainers > 1 else []
    sent += [f"weights {human_bytes(found.push_bytes)}"] if found.push_bytes else []
    lines.append(f"  checkpoint: {human_bytes(found.checkpoint_size)}, {human_time(found.checkpoint_s)}")
    if sent:
        lines.append("  sent every step: " + ", ".join(sent))
    lines += ["", f"bottleneck: {found.bottleneck}", *_folded(f"advice: {found.advice}")]
    for warning in found.warnings:
        lines += _folded(f"warning: {warning}")
    return "\n".join(lines)


def _wrapped(items: list[str]) -> list[str]:
    lines, line = [], "   "
    for item in items:
        if len(line) + len(item) + 2 > 78:
            lines.append(line)
            line = "   "
        line += f" {item}" if line == "   " else f", {item}"
    return [*lines, line]


def _folded(text: str) -> list[str]:
    import textwrap

    return textwrap.wrap(text, 78, subsequent_indent="  ")


def as_data(work: Workload, machine: Machine, layout: Layout, found: Prediction) -> dict[str, Any]:
    """Everything, for `--json`."""
    return {
        "machine": asdict(machine),
        "layout": asdict(layout),
        "workload": asdict(work),
        "prediction": {**asdict(found), "trainer_bytes": found.trainer.total},
    }
