"""A recipe on 1, 8, 64 and 512 devices: as it stands, and with a step that grows with them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rlhf_drive.config import Recipe
from rlhf_drive.estimate.layout import NODE, Layout
from rlhf_drive.estimate.machine import Machine
from rlhf_drive.estimate.predict import Prediction, Workload, predict
from rlhf_drive.estimate.table import human_bytes, human_count, human_time

__all__ = ["COUNTS", "Row", "grown", "sweep", "sweep_table"]

COUNTS = (1, 8, 64, 512)
"""Devices."""
CORES_PER_DEVICE = 8
"""Cores beside each device that score, of the 12 to 24 that a node has for each."""


@dataclass(frozen=True)
class Row:
    """One number of devices."""

    devices: int
    """How many."""
    layout: Layout
    """How they are used."""
    work: Workload
    """What they do."""
    found: Prediction
    """What it takes."""


def grown(work: Workload, processes: int) -> Workload:
    """The same work with as many scenes a step for each process as the recipe's one process has, in chunks that give
    every process one at least."""
    scenes = work.step.scenes * processes
    return replace(work, step=replace(work.step, scenes=scenes, chunk=min(work.step.chunk, work.step.scenes)))


def sweep(recipe: Recipe, work: Workload, machine: Machine, counts: tuple[int, ...] = COUNTS) -> list[Row]:
    """Predictions for all numbers of devices, each as the recipe stands (fixed step) and grown (a step for each).

    Devices train and sample in turn; each has :data:`CORES_PER_DEVICE` cores that score.
    """
    parallel = recipe.parallel
    rows = []
    for grows in (False, True):
        for devices in counts:
            layout = Layout(
                trainers=devices,
                samplers=0,
                scorers=CORES_PER_DEVICE * devices,
                sharded=parallel is not None and parallel.strategy == "fsdp2",
                bfloat16=parallel is not None and parallel.precision == "bfloat16",
            )
            this = grown(work, devices) if grows else work
            rows.append(Row(devices, layout, this, predict(this, machine, layout)))
    return rows


def sweep_table(recipe: Recipe, work: Workload, machine: Machine) -> str:
    """Lines of at most 80 columns."""
    rows = sweep(recipe, work, machine)
    params = rows[0].found.params
    lines = [
        f"{recipe.name}: {human_count(params.total)} parameters; {machine.name}",
        f"{CORES_PER_DEVICE} cores a device score; nodes of {NODE}",
        "",
        f"{'GPUs':>5}{'S':>7}{'step':>9}{'scenes/s':>10}{'gain':>7}{'GB/GPU':>8}{'cores':>8}  bottleneck",
    ]
    for row in rows:
        if row.devices == COUNTS[0]:
            lines.append("  the recipe's step" if row is rows[0] else "  a step that grows with the GPUs")
        found = row.found
        gain = found.scenes_per_s / rows[0].found.scenes_per_s
        memory = f"{found.trainer.total / 1e9:.3g}{fits(machine, found)}"
        lines.append(
            f"{row.devices:>5}{row.work.step.scenes:>7}{human_time(found.step_s):>9}{found.scenes_per_s:>10.4g}"
            f"{gain:>7.3g}{memory:>8}{cores_needed(found):>8}  {found.bottleneck}"
        )
    if any(fits(machine, row.found) != " " for row in rows):
        lines.append(f"  ! does not fit into {human_bytes(machine.memory)}")
    million = 1e6 / rows[-1].found.scenes_per_s
    lines += [
        "",
        f"rollouts sent to every process: {human_bytes(rows[-1].found.gather_bytes)} a step (512, grown)",
        f"a million scenes, once: {human_time(million)} on {rows[-1].devices} GPUs, "
        f"{human_time(1e6 / rows[0].found.scenes_per_s)} on one",
    ]
    return "\n".join(lines)


def fits(machine: Machine, found: Prediction) -> str:
    """A mark where a training process does not fit into a device."""
    return "!" if machine.memory and found.trainer.total > machine.memory else " "


def cores_needed(found: Prediction) -> int:
    """Cores that would score a step's plans in the time that sampling takes."""
    return max(1, round(found.scoring_busy_s / max(found.parts["sampling"], 1e-9)))
