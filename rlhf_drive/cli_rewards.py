"""`rlhf-drive rewards` and `rlhf-drive score`: which rewards there are, and what plans score."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rlhf_drive.config import inspect_recipe, raise_problems, shipped_recipes
from rlhf_drive.errors import ConfigError, UnknownNameError, did_you_mean

if TYPE_CHECKING:
    from rewards import RewardConfig

__all__ = ["rewards_app", "score"]

rewards_app = typer.Typer(help="Reward functions.", no_args_is_help=True)


@rewards_app.command("list")
def list_rewards() -> None:
    """Show the scorers and the rewards that a recipe can name."""
    from rewards import REWARDS
    from rewards.registry import describe_options, offered_rewards
    from rewards.scorer import SCORERS

    typer.echo("Scorers (reward.scorer):")
    for name in SCORERS:
        factory = SCORERS.get(name)
        described = describe_options(name, factory, skip=0)
        options = ", ".join(f"{o.name}: {o.kind.__name__}{' (required)' if o.required else ''}" for o in described)
        typer.echo(f"  {name:<18} {_first_line(factory)}{f'  [{options}]' if options else ''}")
    typer.echo("Rewards (reward.gates, reward.terms):")
    for name in REWARDS:
        entry = REWARDS.get(name)
        if entry.name != name and entry.name in REWARDS:
            typer.echo(f"  {name:<18} = {entry.name}")
            continue
        options = ", ".join(f"{o.name}: {o.kind.__name__}{' (required)' if o.required else ''}" for o in entry.options)
        typer.echo(f"  {name:<18} {_first_line(entry.function)}{f'  [{options}]' if options else ''}")
    for name, target in sorted(offered_rewards().items()):
        typer.echo(f"  {name:<18} offered by an installed package: {target}")
    typer.echo("A function of yours: name it path/to/file.py:function or package.module:function.")


@rewards_app.command("show")
def show_reward(
    name: Annotated[str, typer.Argument(help="A reward, a scorer, or path/to/file.py:function.")],
) -> None:
    """Show what a reward or scorer computes, its options with their defaults, and where it is written."""
    from rewards.registry import describe_options, resolve_reward
    from rewards.scorer import SCORERS

    facts: list[str] = []
    if name in SCORERS and any(o.required for o in describe_options(name, SCORERS.get(name), skip=0)):
        facts.append("scorer: what it yields depends on its options")
    elif name in SCORERS:
        made = SCORERS.get(name)()
        facts += [f"scorer: {made.info}", f"components: {', '.join(made.columns)}"]
    try:
        entry = resolve_reward(name, where="rewards show")
    except (ConfigError, UnknownNameError):
        if not facts:
            raise
        _show(name, SCORERS.get(name), facts)
        return
    if entry.needs:
        facts.append(f"needs components: {', '.join(entry.needs)}")
    if entry.two_frame:
        facts.append("needs the plan of the previous frame (rollout.previous_plan)")
    if entry.auxiliary:
        facts.append("only beside another reward")
    _show(name, entry.function, facts)
    if name in SCORERS:
        _show(f"scorer {name}", SCORERS.get(name), [])


def _first_line(function: object) -> str:
    return (inspect.getdoc(function) or "").partition("\n")[0]


def _show(name: str, function: object, facts: list[str]) -> None:
    """Name, documentation, options and place of a function."""
    typer.echo(name)
    typer.echo("  " + (inspect.getdoc(function) or "It has no description.").replace("\n", "\n  "))
    for fact in facts:
        typer.echo(f"  {fact}")
    for parameter in inspect.signature(function).parameters.values():  # type: ignore[arg-type]
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            typer.echo(f"  option {parameter}")
    module = inspect.getmodule(function)
    if module is not None:
        typer.echo(f"  written in {module.__name__}")


def score(
    scenes: Annotated[
        Path, typer.Argument(metavar="SCENES", help="Folder of <id>.scene.json/.npz files, or a scene store.")
    ],
    out: Annotated[Path, typer.Option(metavar="FILE.parquet", help="One row per (scene, candidate).")],
    candidates: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Plans: .parquet, .npz, or a folder of scene files. Default: SCENES' own."),
    ] = None,
    metric: Annotated[str, typer.Option(metavar="pdms|epdms|RECIPE", help="A metric, or a recipe's reward.")] = "pdms",
    human_filter: Annotated[
        str | None, typer.Option(help="--metric epdms only: on (if not given), off or pre_2025_09_29.")
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Threads; 0 = one per usable core.")] = 0,
) -> None:
    """Score candidate plans, scene by scene."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from rlhf_drive.compare.score import score_folder

    reward = _reward_of(metric, human_filter)
    columns = (TextColumn("scenes"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task("", total=None)

        def advance(done: int, total: int, rows: int) -> None:
            rate = rows / max(progress.tasks[task].elapsed or 0.0, 1e-9)
            progress.update(task, completed=done, total=total, description=f"{rows} plans, {rate:,.0f} plans/s")

        result = score_folder(scenes, out, reward=reward, candidates=candidates, workers=workers, on_progress=advance)
    typer.echo(
        f"{result.rows} plans of {result.scenes} scenes in {result.seconds:.1f} s ({result.rows_per_s:,.0f} plans/s), "
        f"{result.invalid} invalid, mean {100 * result.mean:.2f} of 100"
    )
    for reason in result.reasons:
        typer.echo(f"  {reason}")
    typer.echo(f"Scorer: {result.scorer}")
    typer.echo(f"Scores: {out}" + (f" (why plans have none: {out}.failures.jsonl)" if result.invalid else ""))


def _reward_of(metric: str, human_filter: str | None) -> RewardConfig:
    """The reward that `--metric` means.

    Raises:
        ConfigError: There is no such metric or recipe, or the filter would have no effect.
    """
    from rewards.from_recipe import reward_config
    from rlhf_drive.compare.score import METRICS, metric_reward

    if human_filter is not None and metric != "epdms":
        raise ConfigError(
            f"--human-filter has no effect with --metric {metric}: PDMS has none, and a recipe states its own "
            "(reward.scorer_options). Leave it out."
        )
    if metric in METRICS:
        return metric_reward(metric, human_filter=human_filter or "on")
    if metric not in shipped_recipes() and not metric.endswith((".yaml", ".yml")):
        raise ConfigError(f"Unknown metric {metric!r}. {did_you_mean(metric, [*METRICS, *shipped_recipes()])}")
    recipe, problems = inspect_recipe(metric, [])  # what the recipe asks for elsewhere, such as scenes, plays no part
    raise_problems(metric, [problem for problem in problems if problem.startswith("reward")])
    if recipe.reward is None:
        raise ConfigError(f"The recipe {metric!r} has no reward section. Name one that has, or pdms or epdms.")
    return reward_config(recipe.reward)
