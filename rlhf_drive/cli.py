"""The command line: thin commands over `training`, `compare` and `scenes`. Nothing heavy is imported for `--help`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from rlhf_drive.cli_check import load_checked
from rlhf_drive.cli_recipes import recipes_app
from rlhf_drive.cli_rewards import rewards_app, score
from rlhf_drive.cli_scenes import scenes_app
from rlhf_drive.errors import ConfigError, RlhfDriveError

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
app.command()(score)

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="Name of a shipped recipe, or a .yaml file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe, such as rl.max_steps=20.")
]


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `rlhf-drive`: an error on purpose becomes one message on stderr and exit code 2.

    Args:
        arguments: Command line without the program's name; that of the process if not given.
    """
    # Waiting OpenMP threads sleep instead of spinning; torch slows many times over when another process needs the core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not sys.stdout.isatty():
        os.environ.setdefault("COLUMNS", LOG_WIDTH)
    try:
        app(args=list(arguments) if arguments is not None else None)
    except RlhfDriveError as error:
        typer.echo(f"Error: {error}", err=True)
        sys.exit(EXIT_WRONG_INPUT)


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
) -> None:
    """Run a recipe: make scenes, train, compare, whatever its job is."""
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
    checked = load_checked(recipe, overrides or [])
    typer.echo(f"{checked.name}: {checked.description}")
    from rlhf_drive.training.pipeline import run

    _print_run_folder(run(checked, resume=resume))


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
