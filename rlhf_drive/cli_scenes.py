"""`rlhf-drive scenes`: generate, import, describe and draw driving scenes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlhf_drive.cli_check import load_checked
from rlhf_drive.config import ScenesSection
from rlhf_drive.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from rlhf_drive.scenes import Scene
    from rlhf_drive.scenes.store import SceneStore

__all__ = ["scenes_app"]

scenes_app = typer.Typer(help="Driving scenes.", no_args_is_help=True)

Store = Annotated[Path, typer.Argument(metavar="STORE", help="Folder of the scene store.")]
Seed = Annotated[int | None, typer.Option(help="Seed of the split, and of the generator.")]
Heldout = Annotated[float | None, typer.Option(help="Share of the clusters of related scenes kept for comparison.")]
MinHuman = Annotated[float | None, typer.Option(help="Leave out scenes whose driver scores less PDMS (0..1).")]


@scenes_app.command()
def generate(
    store: Store,
    count: Annotated[int | None, typer.Option(help="Scenes to generate.")] = None,
    kinds: Annotated[str, typer.Option(help="Situation kinds, separated by commas; empty = all.")] = "",
    seed: Seed = None,
    heldout_fraction: Heldout = None,
    min_human_pdms: MinHuman = None,
) -> None:
    """Generate scenes by rule and write a scene store. What is not given is as in the recipe `scenes`."""
    names = [name.strip() for name in kinds.split(",") if name.strip()]
    _build("scenes", store, count=count, kinds=names, seed=seed, heldout_fraction=heldout_fraction,
           min_human_pdms=min_human_pdms)  # fmt: skip


@scenes_app.command("import")
def import_scenes(
    what: Annotated[
        list[str],
        typer.Argument(
            metavar="[recorded|navsim-cache|navsim-logs] FOLDER STORE",
            help="What FOLDER holds (recordings unless said), the folder, and the scene store to write.",
        ),
    ],
    logs: Annotated[Path | None, typer.Option(metavar="FOLDER", help="navsim-cache: logs with observations.")] = None,
    cache: Annotated[Path | None, typer.Option(metavar="FOLDER", help="navsim-logs: metric caches.")] = None,
    starts: Annotated[str | None, typer.Option(help="recorded: start frames: recommended, moving or all.")] = None,
    seed: Seed = None,
    heldout_fraction: Heldout = None,
    min_human_pdms: MinHuman = None,
) -> None:
    """Import recorded driving, or NAVSIM metric caches and logs, and write a scene store.

    What is not given is as in the recipe `real_scenes`. NAVSIM's files are read without NAVSIM, and nothing in them is
    executed. Caches hold what scoring needs; logs add what a policy sees.
    """
    kind, folder, store = _import_places(what)
    changes: dict[str, object] = {"seed": seed, "heldout_fraction": heldout_fraction, "min_human_pdms": min_human_pdms}
    if kind == "recorded":
        _refuse(logs=logs, cache=cache)
        _build("real_scenes", store, path=str(folder), starts=starts, **changes)
        return
    caches, with_logs = (folder, logs) if kind == "navsim-cache" else (cache, folder)
    _refuse(starts=starts, **({"cache": cache} if kind == "navsim-cache" else {"logs": logs}))
    if caches is None:
        raise ConfigError(
            "Logs alone hold no map and cannot be scored. Give the metric caches of the same scenes with --cache."
        )
    changes |= {"source": "navsim", "path": str(caches), "logs": str(with_logs) if with_logs else None}
    _build("real_scenes", store, **changes)


def _import_places(what: list[str]) -> tuple[str, Path, Path]:
    """Kind, folder and store of the command line."""
    kinds = ("recorded", "navsim-cache", "navsim-logs")
    if len(what) == 2 and what[0] not in kinds:
        what = ["recorded", *what]
    if len(what) != 3 or what[0] not in kinds:
        raise ConfigError(
            f"Write `scenes import FOLDER STORE`, with one of {', '.join(kinds)} before FOLDER if it does not hold "
            f"recordings; got {' '.join(what)!r}."
        )
    return what[0], Path(what[1]), Path(what[2])


def _refuse(**options: object) -> None:
    """Options that do nothing here are mistakes."""
    for name, value in options.items():
        if value is not None:
            raise ConfigError(f"--{name} has no effect for this kind of import. Leave it out.")


@scenes_app.command()
def info(store: Store) -> None:
    """Say what a scene store holds: scenes by kind and split, and where they come from."""
    from rich.console import Console

    from rlhf_drive.scenes.store import SceneStore

    opened = SceneStore.open(store)
    Console().print(_table(opened, str(store)))
    refused = opened.info.get("refused", {})
    for key, value in opened.info.items():
        typer.echo(f"{key}: {len(refused) if key == 'refused' else value}")
    for token, reason in list(refused.items())[:5] if isinstance(refused, dict) else []:
        typer.echo(f"  refused {token}: {reason}")


@scenes_app.command()
def show(
    store: Store,
    out: Annotated[Path, typer.Option(metavar="FILE.png", help="Picture to write.")],
    scene: Annotated[str, typer.Option(help="Token, or position in the store.")] = "0",
    policy: Annotated[
        list[str] | None, typer.Option(metavar="FOLDER", help="Draw plans of this run or checkpoint too; repeatable.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Plans per policy.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the plans.")] = 0,
    size: Annotated[int, typer.Option(min=100, max=4000, help="Edge length in pixels.")] = 800,
) -> None:
    """Draw a scene from above: road, agents with their motion, the human's drive, and plans sampled from policies."""
    from rlhf_drive.scenes.picture import draw_scene
    from rlhf_drive.scenes.store import SceneStore

    opened = SceneStore.open(store)
    chosen = _choose(opened, scene)
    plans = _sampled_plans(policy, chosen, samples, seed) if policy else {}
    picture = draw_scene(chosen, plans, title=f"{chosen.token}\n{chosen.kind}", size_px=size)
    try:
        out.write_bytes(picture)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error}.") from error
    typer.echo(f"Scene {chosen.token}: {out}")


def _build(recipe: str, store: Path, **changes: object) -> None:
    """Write the store that a recipe's section describes, with those of the changes that are not None."""
    overrides = [f"scenes.{key}={json.dumps(value)}" for key, value in changes.items() if value is not None]
    section: ScenesSection = load_checked(recipe, overrides).scenes
    from rlhf_drive.training.scenes import build_scenes

    with _progress() as on_progress:
        built = build_scenes(section, store, on_progress=on_progress)
    refused = built.info.get("refused", {})
    splits = f"{len(built.indices('train'))} train, {len(built.indices('heldout'))} held out"
    typer.echo(f"Scene store: {store} ({splits}, {len(refused)} refused)")
    for token, reason in list(refused.items())[:3] if isinstance(refused, dict) else []:
        typer.echo(f"  refused {token}: {reason}")


@contextmanager
def _progress() -> Iterator[Any]:
    """A progress bar, advanced by ``on_progress(done, total, text)``."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task("", total=None)
        yield lambda done, total, text: progress.update(task, completed=done, total=total, description=text)


def _choose(store: SceneStore, name: str) -> Scene:
    """The scene with this token or position."""
    if name in store.tokens:
        return store[store.tokens.index(name)]
    if name.isdecimal() and int(name) < len(store):
        return store[int(name)]
    if name.isdecimal():
        raise ConfigError(f"There is no scene {name}: {store.path} holds {len(store)}, counted from 0.")
    close = [token for token in store.tokens if name in token][:10] or store.tokens[:10]
    raise ConfigError(f"No scene {name!r} in {store.path}. {did_you_mean(name, close)}")


def _sampled_plans(folders: list[str], scene: Scene, samples: int, seed: int) -> dict[str, Any]:
    """``[samples, 8, 3]`` plans by policy name."""
    from rlhf_drive.cli_policies import find_policies
    from rlhf_drive.compare.planners import PolicyPlanner
    from rlhf_drive.policies import Decoding, load_policy
    from rlhf_drive.policies.feature_cache import FeatureCache

    decoding = Decoding(steps=16, order="causal", temperature=1.0, top_k=0)
    plans = {}
    for name, path in find_policies(folders).items():
        planner = PolicyPlanner(name, load_policy(path), decoding, samples, seed, FeatureCache())
        plans[name] = planner.plan([scene]).poses
    return plans


def _table(store: SceneStore, title: str) -> Any:
    """Scenes by kind and split."""
    from rich.table import Table

    table = Table(title=f"{title}: {len(store)} scenes")
    for name in ("kind", "train", "heldout", "challenging"):
        table.add_column(name, justify="left" if name == "kind" else "right")
    splits = {name: set(store.indices(name)) for name in ("train", "heldout")}
    everything = set(range(len(store)))
    for kind in [*sorted(set(store.kinds)), "all"]:
        rows = {i for i in everything if kind in ("all", store.kinds[i])}
        challenging = sum(store.challenging[i] for i in rows)
        table.add_row(kind, *(str(len(rows & splits[name])) for name in splits), str(challenging))
    return table
