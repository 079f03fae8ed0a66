"""`rlhf-drive estimate`: what a recipe costs on one machine or on many, before it runs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from rlhf_drive.cli_check import load_checked
from rlhf_drive.errors import ConfigError

if TYPE_CHECKING:
    from rlhf_drive.config import Recipe
    from rlhf_drive.estimate import Machine, Workload

__all__ = ["estimate"]

UNKNOWN_SCENES = 10_000
"""Training scenes where neither the recipe nor --scenes says how many there are."""


def estimate(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Name of a shipped recipe, or a .yaml file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe.")
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs, or processes on a CPU, in all.")] = 1,
    gpu: Annotated[
        str | None, typer.Option(metavar="NAME", help="A GPU by its data sheet: H100, A100, L40S, …")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Rollout workers (Ray); their GPUs are of --gpus.")] = None,
    reward_workers: Annotated[int | None, typer.Option(min=1, help="Workers that score, a core each.")] = None,
    scenes: Annotated[int | None, typer.Option(min=1, help="Training scenes.")] = None,
    flat: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of groups without spread in reward.")] = 0.0,
    measure: Annotated[bool, typer.Option(help="Measure pieces of the work here, some 20 s.")] = True,
    sweep: Annotated[bool, typer.Option(help="A table for 1, 8, 64 and 512 GPUs.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Everything, as JSON.")] = False,
) -> None:
    """Say what an RL step takes, where its time and memory go, and what limits it."""
    if sweep and as_json:
        raise ConfigError("--sweep prints a table and has no JSON form. Leave one of --sweep and --json out.")
    checked = load_checked(recipe, overrides or [])
    from rlhf_drive.estimate import layout_of, predict
    from rlhf_drive.estimate.sweep import sweep_table
    from rlhf_drive.estimate.table import as_data, as_table

    work = _workload(checked, scenes, flat)
    machine = _machine(checked, work, gpu, measure)
    if sweep:
        typer.echo(sweep_table(checked, work, machine))
        return
    layout = layout_of(checked, gpus=gpus, workers=workers, reward_workers=reward_workers)
    found = predict(work, machine, layout)
    if as_json:
        typer.echo(json.dumps(as_data(work, machine, layout, found), indent=2))
    else:
        typer.echo(as_table(checked.name, work, machine, layout, found))


def _workload(recipe: Recipe, scenes: int | None, flat: float) -> Workload:
    from rlhf_drive.estimate import Workload, network_of, step_of

    step = step_of(recipe)
    if scenes is None:
        made = round(recipe.scenes.count * (1.0 - recipe.scenes.heldout_fraction))
        scenes = made or UNKNOWN_SCENES
    return Workload(network_of(recipe), step, scenes, recipe.rl.max_steps, flat)


def _machine(recipe: Recipe, work: Workload, gpu: str | None, measure: bool) -> Machine:
    """Measured here, or by data sheet; the scorer is measured here either way, unless that is refused."""
    from rlhf_drive.estimate import from_sheet
    from rlhf_drive.estimate.predict import parameters_of
    from rlhf_drive.estimate.traffic import costs_of

    params = parameters_of(work.net, work.step)
    bfloat16 = bool(recipe.parallel and recipe.parallel.precision == "bfloat16")
    group = float(work.step.group)
    costs = costs_of(work.net, params, rows_per_scene=group, element=2 if bfloat16 else 4)
    if gpu is None and measure:
        import torch

        from rlhf_drive.estimate.measure import measure as measured

        device = recipe.device if recipe.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
        return measured(recipe, device=device)
    if gpu is None or not measure:
        return from_sheet(gpu or "CPU", costs, bfloat16=bfloat16)
    from rlhf_drive.estimate.measure import SCENES, measure_scorer
    from rlhf_drive.estimate.samples import sample_scenes

    host = measure_scorer(recipe, sample_scenes(recipe, SCENES), {}, name="this machine")
    return from_sheet(gpu, costs, bfloat16=bfloat16, host=host)
