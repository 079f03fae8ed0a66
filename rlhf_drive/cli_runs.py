"""`rlhf-drive runs`: list, show, tail and plot what runs have written."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from rlhf_drive.errors import ConfigError, DataError, did_you_mean

__all__ = ["runs_app"]

runs_app = typer.Typer(help="Runs: list, show, follow and plot them.", no_args_is_help=True)

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder, such as runs/quickstart.")]


@runs_app.command("list")
def list_runs(
    folder: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="Folder of run folders.")] = Path("runs"),
) -> None:
    """Show the runs of a folder: what they are, how far they are, and what they reached."""
    from rlhf_drive.runs.folders import find_runs
    from rlhf_drive.runs.overview import overview

    found = find_runs(folder)
    if not found:
        raise DataError(f"{folder} holds no runs. A run folder has a recipe.yaml; output_dir says where they are made.")
    _print(overview(found))


@runs_app.command()
def show(
    run: RunArgument,
    phase: Annotated[str | None, typer.Option(help="Phase whose metrics are listed; default: the latest.")] = None,
) -> None:
    """Tell all about a run: recipe, stages, courses of the main metrics, all metrics, warnings, pictures."""
    from rlhf_drive.runs.folders import open_run
    from rlhf_drive.runs.series import BLOCKS, PLAIN_BLOCKS
    from rlhf_drive.runs.summary import summary

    opened = open_run(run)
    if phase is not None:
        known = list(dict.fromkeys(line["phase"] for line in _lines_of(run)))
        if phase not in known:
            raise ConfigError(f"{run} has no phase {phase!r}. {did_you_mean(phase, known)}")
    _print(summary(opened, phase=phase, blocks=BLOCKS if _knows(BLOCKS) else PLAIN_BLOCKS))


@runs_app.command()
def tail(
    run: RunArgument,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="Latest steps shown at first.")] = 10,
    go_on: Annotated[
        bool | None, typer.Option("--follow/--no-follow", help="Wait for more; default: while the run is running.")
    ] = None,
) -> None:
    """Show a run's latest steps as training does, and go on while it runs, also beyond a resume."""
    from rlhf_drive.runs.folders import open_run, state_of
    from rlhf_drive.runs.follow import follow
    from rlhf_drive.runs.lines import METRICS_FILE, last_lines
    from rlhf_drive.training.live_replay import Replay

    opened = open_run(run)
    state = state_of(opened)
    before = last_lines(run / METRICS_FILE, lines + 1)
    if not (run / METRICS_FILE).is_file() and state != "running":
        raise DataError(f"{run} has no metrics: no step was logged, and the run is not running ({state}).")
    waits = go_on if go_on is not None else state == "running"
    with Replay(opened, before[0] if len(before) > lines else None) as replay:
        try:
            for found in follow(
                run / METRICS_FILE,
                lines=lines,
                goes_on=lambda: waits and (go_on is True or state_of(open_run(run)) == "running"),
            ):
                replay.show(found)
        except KeyboardInterrupt:
            return
    typer.echo(f"{run}: {state_of(open_run(run))}")


@runs_app.command()
def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")],
    metric: Annotated[
        list[str] | None,
        typer.Option("--metric", "-m", help="Metric, or an area such as reward/; repeatable. Default: the main ones."),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="FILE.png", help="Picture to write.")] = Path("curves.png"),
    smooth: Annotated[
        int | None, typer.Option(min=1, help="Steps that a value is the mean of; 1 = none. Default: by length.")
    ] = None,
) -> None:
    """Draw curves of several runs into one picture, a panel per metric, with the mean over the seeds of each run."""
    from rlhf_drive.runs.curves import DEFAULT_METRICS, draw_curves, panels_of
    from rlhf_drive.runs.series import find_metrics, metric_names

    lines = {name: _lines_of(path) for name, path in _names(runs).items()}
    known = metric_names(line for found in lines.values() for line in found)
    wanted = find_metrics(metric, known) if metric else [name for name in DEFAULT_METRICS if name in known]
    panels = panels_of(lines, wanted, named=bool(metric))
    if out.suffix != ".png":
        raise ConfigError(f"--out {out}: the picture is a PNG; give a name that ends in .png.")
    draw_curves(list(lines), panels, out, smooth=smooth)
    count = "a panel" if len(panels) == 1 else f"{len(panels)} panels"
    typer.echo(f"Curves: {out} ({count}, {len(lines)} run{'s' if len(lines) > 1 else ''})")


def _names(paths: list[Path]) -> dict[str, Path]:
    """Run folders by the shortest end of their path that no other has."""
    distinct = list({path.resolve(): path for path in paths}.values())
    for parts in range(1, 20):
        names = ["/".join(path.resolve().parts[-parts:]) for path in distinct]
        if len(set(names)) == len(names):
            break
    return dict(zip(names, distinct, strict=True))


def _lines_of(run: Path) -> list[dict[str, Any]]:
    """All metrics of a run folder, which must have some."""
    from rlhf_drive.runs.folders import open_run
    from rlhf_drive.runs.lines import METRICS_FILE, read_metrics

    open_run(run)
    lines = read_metrics(run) if (run / METRICS_FILE).is_file() else []
    if not lines:
        raise DataError(f"{run} has no metrics: no step was logged, or its job trains nothing.")
    return lines


def _knows(text: str) -> bool:
    """Whether the output can show these characters."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _print(lines: list[str]) -> None:
    for line in lines:
        typer.echo(line if _knows(line) else line.encode("ascii", "replace").decode("ascii"))
