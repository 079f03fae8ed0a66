"""`rlhf-drive recipes`: list, show and copy the shipped recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rlhf_drive.config import read_recipe_text, shipped_recipes
from rlhf_drive.errors import ConfigError

__all__ = ["recipes_app"]

recipes_app = typer.Typer(help="Shipped recipes.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="RECIPE", help="Name of a shipped recipe.")]


@recipes_app.command("list")
def list_recipes() -> None:
    """Show the recipes with a line about each."""
    for name in shipped_recipes():
        first = read_recipe_text(name).splitlines()[0]
        typer.echo(f"{name:<16} {first.removeprefix('#').strip()}")


@recipes_app.command()
def show(recipe: Name) -> None:
    """Print a recipe with its comments."""
    typer.echo(read_recipe_text(recipe), nl=False)


@recipes_app.command()
def copy(
    recipe: Name,
    target: Annotated[Path | None, typer.Argument(metavar="[FILE.yaml]", help="Default: RECIPE.yaml here.")] = None,
) -> None:
    """Copy a recipe to a file of yours, to be edited; an existing file is left alone."""
    text = read_recipe_text(recipe)
    path = target or Path(f"{Path(recipe).stem}.yaml")
    if path.is_dir():
        path = path / f"{Path(recipe).stem}.yaml"
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"A recipe file ends in .yaml; got {str(path)!r}.")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(f"{path} exists already, and nothing is overwritten. Choose another name.") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error}.") from error
    typer.echo(f"Copied to {path}. Run it with: rlhf-drive train {path}")
