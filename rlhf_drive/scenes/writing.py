"""Writing scenes: shards and their manifest grow aside and are renamed into place, so a store is whole or absent."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from rlhf_drive.disk import writing
from rlhf_drive.errors import DataError
from rlhf_drive.scenes.columns import arrow_schema, scene_batch
from rlhf_drive.scenes.manifest import MANIFEST_NAME, Manifest, Shard, file_sha256
from rlhf_drive.scenes.model import Scene
from rlhf_drive.scenes.verified import is_note

__all__ = ["SPLITS", "write_scenes"]

SPLITS = ("train", "heldout")
"""Splits a scene can belong to."""
_BATCH_SIZE = 32


def write_scenes(
    path: str | Path,
    scenes: Iterable[Scene],
    *,
    split_of: Mapping[str, str],
    info: Mapping[str, object],
    shard_size: int = 512,
    overwrite: bool = False,
) -> None:
    """Write `scenes` as a scene store at `path`; memory use does not grow with their number.

    Args:
        path: Folder to create. The parent is created as needed.
        scenes: Scenes in the order they will be read; tokens must be unique.
        split_of: ``"train"`` or ``"heldout"`` by token, asked after a scene has arrived; a cluster lies in one split.
        info: Anything worth keeping about the scenes' origin, as JSON values; what `scenes` adds while it runs counts.
        shard_size: Scenes per Arrow file.
        overwrite: Whether to replace a scene store that is already there. Any other folder is left alone.

    Raises:
        DataError: The folder is taken, there is no scene, a token repeats, a scene has no split or a cluster has two.
            Whatever was at `path` is then still there, and errors that `scenes` raises pass through in the same way.
        StorageError: It cannot be written; nothing is left of it.

    Example:
        >>> write_scenes("runs/scenes", scenes, split_of={"a": "train", "b": "heldout"}, info={"seed": 1})
    """
    target = Path(path)
    _check_target(target, overwrite)
    if shard_size < 1:
        raise DataError(f"shard_size must be at least 1; got {shard_size}.")
    _as_json(info, target)
    with writing("The scene store", target):
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        aside.chmod(0o755)
        shards, splits = _write_shards(aside, scenes, split_of, shard_size)
        _check_target(target, overwrite)
        with writing("The scene store", target):
            Manifest({name: splits[name] for name in SPLITS}, tuple(shards), _as_json(info, target)).write(aside)
            _move_into_place(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _as_json(info: Mapping[str, object], target: Path) -> dict[str, Any]:
    """`info` as it will be read back."""
    try:
        values: dict[str, Any] = json.loads(json.dumps(dict(info)))
    except (TypeError, ValueError) as error:
        raise DataError(f"info of the scene store {target} must hold JSON values only: {error}.") from error
    return values


def _check_target(target: Path, overwrite: bool) -> None:
    """Refuse a path that must not be replaced; an empty folder counts as absent."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not (target / MANIFEST_NAME).is_file():
        raise DataError(f"{target} exists and is not a scene store (no {MANIFEST_NAME}). Choose another folder.")
    if foreign := [
        p.name
        for p in target.iterdir()
        if p.name != MANIFEST_NAME and not is_note(p.name) and not fnmatch(p.name, "scenes-*.arrow")
    ]:
        raise DataError(
            f"{target} also holds {foreign[0]!r}, which is no part of a scene store. Choose another folder."
        )
    if not overwrite:
        raise DataError(f"{target} already holds scenes. Choose another folder (in Python: or overwrite=True).")


def _move_into_place(aside: Path, target: Path) -> None:
    """Rename `aside` to `target`; an old store is renamed away first and back again if that fails."""
    if not target.exists() or not any(target.iterdir()):
        aside.rename(target)
        return
    old = aside.with_suffix(".old")
    target.rename(old)
    try:
        aside.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old)


def _write_shards(
    folder: Path, scenes: Iterable[Scene], split_of: Mapping[str, str], shard_size: int
) -> tuple[list[Shard], Counter[str]]:
    """Write all shards into `folder`; returns their description and the number of scenes by split."""
    checked = _with_split(scenes, split_of)
    shards: list[Shard] = []
    counts: Counter[str] = Counter()
    for first in checked:
        rows = itertools.chain([first], itertools.islice(checked, shard_size - 1))
        shards.append(_write_shard(folder / f"scenes-{len(shards):05d}.arrow", rows, counts))
    if not shards:
        raise DataError("There is no scene to write. Check the source the scenes come from.")
    return shards, counts


def _write_shard(path: Path, rows: Iterable[tuple[Scene, str]], counts: Counter[str]) -> Shard:
    """Write one Arrow file, a record batch at a time, and describe it."""
    from datasets import Features
    from datasets.arrow_writer import ArrowWriter

    rows, what, count = iter(rows), "The scene store", 0
    stream = path.open("wb")
    try:
        writer = ArrowWriter(features=Features.from_arrow_schema(arrow_schema()), stream=stream)
        while batch := list(itertools.islice(rows, _BATCH_SIZE)):  # its errors are the source's
            with writing(what, path):
                writer.write_table(scene_batch([scene for scene, _ in batch], [split for _, split in batch]))
            counts.update(split for _, split in batch)
            count += len(batch)
        with writing(what, path):
            writer.finalize(close_stream=False)
            stream.flush()
            os.fsync(stream.fileno())
    finally:
        with writing(what, path):  # what could not be written is tried again, in vain
            stream.close()
    return Shard(file=path.name, count=count, bytes=path.stat().st_size, sha256=file_sha256(path))


def _with_split(scenes: Iterable[Scene], split_of: Mapping[str, str]) -> Iterator[tuple[Scene, str]]:
    """Each scene with its split, once token, split and cluster are in order."""
    tokens: set[str] = set()
    split_of_cluster: dict[str, str] = {}
    for scene in scenes:
        if scene.token in tokens:
            raise DataError(f"Scene token {scene.token!r} occurs twice. Tokens must be unique in a store.")
        tokens.add(scene.token)
        split = split_of.get(scene.token)
        if split not in SPLITS:
            raise DataError(f"Scene {scene.token!r} has split {split!r}; it must be one of {', '.join(SPLITS)}.")
        if split_of_cluster.setdefault(scene.cluster, split) != split:
            raise DataError(
                f"Cluster {scene.cluster!r} would be divided: scene {scene.token!r} is {split}, an earlier one is "
                f"{split_of_cluster[scene.cluster]}. Give all scenes of a cluster one split."
            )
        yield scene, split
