"""Scores of candidate plans in a folder of scene files, one row per (scene, candidate), as Parquet."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rewards.pdm_closed import plan_pdm_closed
from rewards.pdms import PdmsResult, score_pdms
from rewards.prepare import prepare_scene
from rlhf_drive.errors import ConfigError, DataError, did_you_mean
from rlhf_drive.scenes import SceneReference
from rlhf_drive.scenes.importers.vectors import VectorScene, read_vector

__all__ = ["COMPONENTS", "METRICS", "ScoreSummary", "score_folder"]

COMPONENTS = ("nc", "dac", "ep", "ttc", "c", "ddc", "pdms")
"""Score columns, each in 0..1."""
METRICS = ("pdms",)
"""Metrics that can be computed."""
_SUFFIX = ".scene.json"


@dataclass(frozen=True)
class ScoreSummary:
    """What a scoring run did."""

    scenes: int
    """Scenes scored."""
    rows: int
    """Candidates scored."""
    invalid: int
    """Candidates without a score: null in every column."""
    mean_pdms: float
    """Mean over the valid candidates, 0..1; NaN if there is none."""
    seconds: float
    """Time spent, reading and writing included (the first run also compiles)."""

    @property
    def rows_per_s(self) -> float:
        """Candidates per second."""
        return self.rows / max(self.seconds, 1e-9)


def score_folder(
    folder: str | Path,
    out: str | Path,
    *,
    metric: str = "pdms",
    on_progress: Callable[[int, int, int], None] | None = None,
) -> ScoreSummary:
    """Score every candidate of every scene in `folder` and write a Parquet file.

    Args:
        folder: Holds ``<id>.scene.json`` and ``<id>.scene.npz`` pairs with candidates.
        out: File to write, replaced as a whole once every scene is scored. Columns: `scene` (text), `candidate`
            (position in the scene file), then `COMPONENTS` (float64, 0..1; null where a plan has no score).
        metric: One of `METRICS`.
        on_progress: Called as ``on_progress(scenes_done, scenes, rows_done)`` after each scene.

    Raises:
        ConfigError: Unknown metric, or `out` lies in a folder that does not exist.
        DataError: The folder holds no scene, or a scene cannot be read or scored; the message names it. `out` is then
            left as it was.

    Example:
        ``score_folder("vectors", "scores.parquet").mean_pdms``
    """
    target = Path(out)
    if metric not in METRICS:
        raise ConfigError(f"Unknown metric {metric!r}. {did_you_mean(metric, METRICS)}")
    if not target.parent.is_dir():
        raise ConfigError(f"The folder {str(target.parent)!r} of the output file does not exist. Make it first.")
    paths = sorted(Path(folder).glob(f"*{_SUFFIX}"))
    if not paths:
        raise DataError(f"{folder}: no *{_SUFFIX} file found. Give the folder that holds <id>.scene.json and .npz.")
    started = time.perf_counter()
    names: list[str] = []
    results: list[PdmsResult] = []
    for i, path in enumerate(paths):
        scene = read_vector(path)
        results.append(_score(scene))
        names.append(scene.name)
        if on_progress is not None:
            on_progress(i + 1, len(paths), sum(len(result.valid) for result in results))
    columns = _columns(names, results)
    _write(target, columns)
    valid, pdms = np.concatenate([r.valid for r in results]), columns["pdms"]
    mean = float(pdms[valid].mean()) if valid.any() else float("nan")
    return ScoreSummary(len(paths), len(valid), int((~valid).sum()), mean, time.perf_counter() - started)


def _score(scene: VectorScene) -> PdmsResult:
    """Scores of a scene's candidates; the progress reference is planned where the file holds none."""
    try:
        return score_pdms(prepare_scene(_with_reference(scene.reference)), scene.candidates)
    except DataError as error:
        raise DataError(f"Scene {scene.name!r} cannot be scored: {error}") from error


def _with_reference(reference: SceneReference) -> SceneReference:
    if len(reference.pdm_reference_v1):
        return reference
    return replace(reference, pdm_reference_v1=plan_pdm_closed(reference, version="v1").reference)


def _columns(names: list[str], results: list[PdmsResult]) -> dict[str, Any]:
    """Columns of the file; invalid rows hold NaN."""
    counts = [len(result.valid) for result in results]
    columns: dict[str, Any] = {
        "scene": np.repeat(np.array(names, dtype=object), counts),
        "candidate": np.concatenate([np.arange(count) for count in counts]),
    }
    for name in COMPONENTS:
        columns[name] = np.concatenate([getattr(result, name) for result in results])
    return columns


def _write(target: Path, columns: dict[str, Any]) -> None:
    """Write the table beside its place, then move it there in one step."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({name: pa.array(column, from_pandas=True) for name, column in columns.items()})
    partial = target.with_name(f".{target.name}.partial")
    try:
        pq.write_table(table, partial)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
