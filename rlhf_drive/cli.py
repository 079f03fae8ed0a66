"""The command line: thin commands over `training`, `compare` and `scenes`. Nothing heavy is imported for `--help`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from rlhf_drive.cli_check import load_checked
from rlhf_drive.cli_estimate import estimate
from rlhf_drive.cli_recipes import recipes_app
from rlhf_drive.cli_rewards import rewards_app, score
from rlhf_drive.cli_runs import runs_app
from rlhf_drive.cli_scenes import scenes_app
from rlhf_drive.config import Recipe
from rlhf_drive.errors import ConfigError, RlhfDriveError, RunStoppedError

__all__ = ["app", "main"]

LOG_WIDTH = "140"
"""Columns of a table that goes to a file or pipe, where there is no terminal to ask."""
EXIT_WRONG_INPUT = 2
"""Exit code for an error that the user can mend."""

app = typer.Typer(
    name="rlhf-drive",
    help="RL fine-tuning of driving policies that decode discrete tokens.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(recipes_app, name="recipes")
app.add_typer(scenes_app, name="scenes")
app.add_typer(rewards_app, name="rewards")
app.add_typer(runs_app, name="runs")
app.command()(score)
app.command()(estimate)

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="Name of a shipped recipe, or a .yaml file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe, such as rl.max_steps=20.")
]


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `rlhf-drive`: an error on purpose becomes one message on stderr and exit code 2.

    A run that a signal stopped ends with 128 and the signal's number. Where a launcher started several processes, the
    main one speaks, and the first error ends all.

    Args:
        arguments: Command line without the program's name; that of the process if not given.
    """
    # Waiting OpenMP threads sleep instead of spinning; torch slows many times over when another process needs the core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not sys.stdout.isatty():
        os.environ.setdefault("COLUMNS", LOG_WIDTH)
    from rlhf_drive.training.launch import one_voice

    with one_voice(_report):
        app(args=list(arguments) if arguments is not None else None)


def _report(error: RlhfDriveError) -> int:
    """Show an error on purpose; the exit code."""
    if isinstance(error, RunStoppedError):
        typer.echo(str(error), err=True)
        return error.exit_code
    typer.echo(f"Error: {error}", err=True)
    return EXIT_WRONG_INPUT


@app.command()
def validate(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Check a recipe as a whole; no work is started."""
    checked = load_checked(recipe, overrides or [])
    typer.echo(f"{recipe} is valid: job {checked.job}, run folder {Path(checked.output_dir) / checked.name}")


@app.command()
def train(
    recipe: Annotated[str | None, typer.Argument(metavar="[RECIPE]", help="Name or .yaml file.")] = None,
    overrides: Overrides = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN_DIR", help="Go on with an unfinished run; its recipe is used.")
    ] = None,
    ray: Annotated[
        bool, typer.Option("--ray", help="Train on processes that Ray starts, here or on a cluster.")
    ] = False,
    processes: Annotated[int, typer.Option(min=1, help="With --ray: processes that train together.")] = 1,
    gpus: Annotated[float, typer.Option("--gpus-per-process", help="With --ray: GPUs of each, 0 or 1.")] = 0.0,
    cpus: Annotated[float, typer.Option("--cpus-per-process", help="With --ray: cores of each.")] = 1.0,
) -> None:
    """Run a recipe: make scenes, train, compare, whatever its job is.

    Several processes on one machine: torchrun --nproc-per-node N -m rlhf_drive.cli train RECIPE, or --ray.
    """
    checked = _recipe_to_run(recipe, overrides, resume)
    typer.echo(f"{checked.name}: {checked.description}")
    if ray:
        _print_run_folder(_train_on_ray(checked, resume, processes, gpus, cpus))
        return
    if processes > 1 or gpus or cpus != 1.0:
        raise ConfigError(
            "--processes, --gpus-per-process and --cpus-per-process are for --ray. Add it, or start several processes "
            "with torchrun."
        )
    from rlhf_drive.training.pipeline import run

    _print_run_folder(run(checked, resume=resume))


def _recipe_to_run(recipe: str | None, overrides: Overrides, resume: Path | None) -> Recipe:
    """The recipe that `train` was given, or that of the run it goes on with."""
    if recipe is None and resume is None:
        raise ConfigError("Name a recipe (`rlhf-drive recipes list` shows them), or a run folder with --resume.")
    if resume is not None and (recipe is not None or overrides):
        raise ConfigError(
            "--resume goes on with the recipe in the run folder and takes no recipe and no overrides. To change "
            f"something, edit {resume / 'recipe.yaml'}, or start a new run."
        )
    if resume is not None and not (resume / "recipe.yaml").is_file():
        raise ConfigError(
            f"--resume {resume}: there is no run folder with a recipe.yaml. Give a folder such as runs/quickstart."
        )
    if recipe is None:
        recipe = str(resume / "recipe.yaml") if resume else ""
    return load_checked(recipe, overrides or [])


def _train_on_ray(recipe: Recipe, resume: Path | None, processes: int, gpus: float, cpus: float) -> Path:
    """Make or take up the run folder, and let Ray's processes work in it."""
    if not recipe.parallel:
        raise ConfigError(f"--ray trains on several processes, but job {recipe.job!r} trains nothing. Leave it out.")
    from rlhf_drive.training.ray_launch import RayProcesses, run_on_ray
    from rlhf_drive.training.run_folder import RunFolder

    placement = recipe.ray.placement if recipe.ray else "spread"
    asked = RayProcesses(processes, gpus, cpus, placement, recipe.parallel.timeout_s)
    folder = RunFolder.resume(recipe, resume) if resume else RunFolder.create(recipe)
    return run_on_ray(recipe, folder.path, asked, address=recipe.ray.address if recipe.ray else None)


@app.command()
def compare(
    policies: Annotated[
        list[str], typer.Argument(metavar="RUN_OR_CHECKPOINT...", help="Run or checkpoint folders, or NAME=FOLDER.")
    ],
    scenes: Annotated[Path, typer.Option(metavar="STORE", help="Scene store; its held-out scenes are driven.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="New folder for the report.")],
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Changes to the recipe `compare`.")
    ] = None,
) -> None:
    """Compare policies and baselines on held-out scenes: JSON and one HTML report."""
    from rlhf_drive.cli_policies import compare_overrides, find_policies

    if out.exists():
        raise ConfigError(f"{out} exists already, and nothing is overwritten. Choose another --out.")
    recipe = load_checked("compare", [*compare_overrides(find_policies(policies), scenes, out), *(changes or [])])
    from rlhf_drive.training.pipeline import run

    _print_run_folder(run(recipe, resume=None))


def _print_run_folder(folder: Path) -> None:
    """The last line of a run says where its results are."""
    report = folder / "report.html"
    typer.echo(f"Run folder: {folder}" + (f" (report: {report})" if report.exists() else ""))


if __name__ == "__main__":
    main()
