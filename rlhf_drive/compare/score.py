"""Scores of candidate plans, one row per (scene, candidate), as Parquet."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rewards.builtin import AGGREGATES
from rewards.carriers import ScorerInfo, Scores
from rewards.compose import Reward, RewardConfig
from rewards.from_recipe import metric_config
from rewards.pdm_closed import plan_pdm_closed
from rewards.service import LocalRewardService, RewardService
from rewards.two_frame import score_frames
from rlhf_drive.compare.candidates import Candidates, candidates_of, read_candidates
from rlhf_drive.errors import ConfigError, DataError, did_you_mean
from rlhf_drive.scenes import Command, Observation, Scene, SceneReference, Trajectories, to_ego_frame
from rlhf_drive.scenes.importers.vectors import VectorScene, read_vector
from rlhf_drive.scenes.store import SceneStore

__all__ = ["METRICS", "ScoreSummary", "metric_reward", "score_folder"]

METRICS = ("pdms", "epdms")
"""Metrics that need no recipe."""
_SUFFIX = ".scene.json"
_BATCH = 16
"""Scenes scored at once: enough for threads, few enough for the progress bar to move."""


@dataclass(frozen=True)
class ScoreSummary:
    """What a scoring run did."""

    scenes: int
    """Scenes with candidates."""
    rows: int
    """Candidates scored."""
    invalid: int
    """Candidates without a score: null in every column."""
    reasons: tuple[str, ...]
    """Why the first of them have none."""
    mean: float
    """Mean total over the valid candidates, 0..1; NaN if there is none."""
    scorer: ScorerInfo
    """Which scorer it was."""
    seconds: float
    """Time spent, reading and writing included (the first run also compiles)."""

    @property
    def rows_per_s(self) -> float:
        """Candidates per second."""
        return self.rows / max(self.seconds, 1e-9)


def metric_reward(metric: str, *, human_filter: str = "on") -> RewardConfig:
    """The reward that is a metric itself.

    Raises:
        ConfigError: There is no such metric.
    """
    if metric not in METRICS:
        raise ConfigError(f"Unknown metric {metric!r}. {did_you_mean(metric, METRICS)}")
    options = {"human_filter": human_filter} if metric == "epdms" else {}
    return replace(metric_config(metric), scorer_options=options)


def score_folder(
    scenes: str | Path,
    out: str | Path,
    *,
    reward: RewardConfig | None = None,
    candidates: str | Path | None = None,
    workers: int = 0,
    on_progress: Callable[[int, int, int], None] | None = None,
) -> ScoreSummary:
    """Score candidates of many scenes and write a Parquet file.

    Args:
        scenes: A folder of ``<id>.scene.json`` and ``<id>.scene.npz`` pairs, or a scene store.
        out: File to write, replaced as a whole once every scene is scored. Columns: `scene` (text), `candidate`
            (number of the plan), then the scorer's components, a recipe's own terms and, unless the reward is the
            scorer's aggregate, `reward` (float64; null where a plan has no score). The file's metadata names the
            scorer and its settings. Where a plan has no score, `<out>.failures.jsonl` says why.
        reward: What to compute; :func:`metric_reward` makes one of a metric; PDMS if not given.
        candidates: Plans (:func:`rlhf_drive.compare.candidates.read_candidates`); those of scene files if not given.
        workers: Threads; 0 = one per usable core.
        on_progress: Called as ``on_progress(scenes_done, scenes, rows_done)`` as scenes are scored.

    Raises:
        ConfigError: The reward is wrong, or `out` lies in a folder that does not exist.
        DataError: A file cannot be read, plans are given for a scene that is not there, or nothing could be scored;
            `out` is then left as it was.

    Example:
        ``score_folder("vectors", "scores.parquet", reward=metric_reward("epdms")).mean``
    """
    target, folder = Path(out), Path(scenes)
    if target.suffix != ".parquet":
        raise ConfigError(f"Scores are written as Parquet: end the output's name in .parquet; got {target.name!r}.")
    if not target.parent.is_dir():
        raise ConfigError(f"The folder {str(target.parent)!r} of the output file does not exist. Make it first.")
    built = (reward or metric_reward("pdms")).build()
    plans = read_candidates(candidates) if candidates is not None else None
    total, items = _open(folder, plans, built)
    started = time.perf_counter()
    parts: list[_Part] = []
    with LocalRewardService(built, workers=workers, cache_size=2 * _BATCH) as service:
        while batch := list(islice(items, _BATCH)):
            parts += _score_batch(service, batch, two_frame=built.two_frame)
            if on_progress is not None:
                on_progress(len(parts), total, sum(len(part.scores) for part in parts))
    if not parts:
        raise DataError(f"There are no plans to score: there are none for any scene of {folder}.")
    scores = Scores.concatenate([part.scores for part in parts])
    if not scores.valid.any():
        raise DataError(
            f"No plan could be scored. The first reason: {next(iter(scores.failures.values()), 'no plans')}"
        )
    _write(target, parts, scores, built)
    mean = float(scores.total[scores.valid].mean())
    reasons = tuple(str(failure) for failure in list(scores.failures.values())[:3])
    seconds = time.perf_counter() - started
    return ScoreSummary(len(parts), len(scores), len(scores.failures), reasons, mean, scores.scorer, seconds)


@dataclass(frozen=True)
class _Part:
    """One scene, scored."""

    token: str
    number: NDArray[np.int64]
    scores: Scores


def _open(
    folder: Path, plans: Mapping[str, Candidates] | None, reward: Reward
) -> tuple[int, Iterator[tuple[Scene, Candidates]]]:
    """Number of scenes to score, and the scenes with their plans as they are read."""
    paths = sorted(folder.glob(f"*{_SUFFIX}"))
    if paths:
        names = [path.name.removesuffix(_SUFFIX) for path in paths]
        if {term.name for term in reward.user_terms} - AGGREGATES:
            raise ConfigError(
                f"{folder} holds scenes without observations, so only the scorer's own components can be computed. "
                "Take metric pdms or epdms, or give a scene store."
            )
        _check_known(names, plans, folder)
        wanted = [path for path, name in zip(paths, names, strict=True) if plans is None or name in plans]
        return len(wanted), (_from_vector(read_vector(path), plans, reward) for path in wanted)
    if not (folder / "scenes.json").is_file():
        raise DataError(
            f"{folder}: no *{_SUFFIX} file found, and it is no scene store. Give the folder that holds <id>.scene.json "
            "and .npz, or a scene store."
        )
    if plans is None:
        raise ConfigError(f"{folder} is a scene store, which holds no plans. Give them with --candidates.")
    store = SceneStore.open(folder)
    _check_known(store.tokens, plans, folder)
    wanted_rows = [row for row, token in enumerate(store.tokens) if token in plans]
    return len(wanted_rows), ((_prepared(store[row], reward), plans[store.tokens[row]]) for row in wanted_rows)


def _check_known(names: Sequence[str], plans: Mapping[str, Candidates] | None, folder: Path) -> None:
    """Plans for a scene that is not there are a mistake, not something to leave out."""
    if unknown := sorted(set(plans or {}) - set(names)):
        raise DataError(
            f"{folder} holds no scene {unknown[0]!r}, for which plans are given ({len(unknown)} such scenes). "
            f"{did_you_mean(unknown[0], get_close_matches(unknown[0], names, 5) or list(names)[:5])}"
        )


def _from_vector(
    vector: VectorScene, plans: Mapping[str, Candidates] | None, reward: Reward
) -> tuple[Scene, Candidates]:
    scene = Scene(vector.name, vector.kind, vector.name, False, _nothing_seen(vector.reference), vector.reference)
    return _prepared(scene, reward), candidates_of(vector) if plans is None else plans[vector.name]


def _nothing_seen(reference: SceneReference) -> Observation:
    """An observation of the ego alone: scene files hold what the simulator knows, not what a policy sees."""
    now = np.concatenate([[0.0, 0.0, 0.0], reference.ego_init[3:7], reference.ego_init[9:10]])
    route = to_ego_frame(reference.centerline, reference.ego_init[:3])[:, :2]
    none = np.zeros(0, dtype=np.float32)
    return Observation(
        ego_history=np.tile(now, (4, 1)).astype(np.float32),
        agents=none.reshape(0, 4, 5),
        agents_valid=np.zeros((0, 4), dtype=np.bool_),
        agents_size=none.reshape(0, 2),
        agents_type=np.zeros(0, dtype=np.int8),
        map_xy=none.reshape(0, 2),
        map_offsets=np.zeros(1, dtype=np.int32),
        map_type=np.zeros(0, dtype=np.int8),
        map_speed_limit=none,
        map_on_route=np.zeros(0, dtype=np.bool_),
        map_red=np.zeros(0, dtype=np.bool_),
        route_xy=route.astype(np.float32),
        command=Command.STRAIGHT,
    )


def _prepared(scene: Scene, reward: Reward) -> Scene:
    """The scene with the progress reference that its scorer needs; one that cannot be planned fails in the service."""
    if reward.scorer.info.name not in METRICS:  # another scorer brings what it needs
        return scene
    extended = reward.scorer.info.name == "epdms"
    reference = scene.reference
    if len(reference.pdm_reference_v2 if extended else reference.pdm_reference_v1):
        return scene
    if scene.kind == "navsim":  # a metric cache holds what its own version needs, and no more
        has, wants = ("v1.1", "v2.2") if extended else ("v2.2", "v1.1")
        raise DataError(
            f"Scene {scene.token!r} comes from a metric cache of NAVSIM {has}, which does not hold what "
            f"{reward.scorer.info.name.upper()} of {wants} needs. Import caches of {wants}, or take the other metric."
        )
    try:
        planned = plan_pdm_closed(reference, version="v2" if extended else "v1").reference
    except DataError:
        return scene
    field = "pdm_reference_v2" if extended else "pdm_reference_v1"
    return scene.with_reference(**{field: planned})


def _score_batch(service: RewardService, batch: Sequence[tuple[Scene, Candidates]], *, two_frame: bool) -> list[_Part]:
    """Scores of a few scenes; rows without a plan of the frame before are scored without EC."""
    index = np.repeat(np.arange(len(batch)), [len(plans) for _, plans in batch])
    poses = Trajectories(np.concatenate([plans.poses for _, plans in batch]), index)
    none = [np.full_like(plans.poses, np.nan) if plans.previous is None else plans.previous for _, plans in batch]
    previous = Trajectories(np.concatenate(none), index)
    scenes = [scene for scene, _ in batch]
    scores = service.score(scenes, poses, previous) if two_frame else score_frames(service, scenes, poses, previous)
    parts = ((scene.token, plans.number, np.flatnonzero(index == i)) for i, (scene, plans) in enumerate(batch))
    return [_Part(token, number, scores.rows(rows)) for token, number, rows in parts if len(rows)]


def _write(target: Path, parts: Sequence[_Part], scores: Scores, reward: Reward) -> None:
    """Write the table beside its place, then move it there in one step."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = np.repeat([part.token for part in parts], [len(part.scores) for part in parts])
    numbers = np.concatenate([part.number for part in parts])
    columns: dict[str, Any] = {"scene": names.tolist(), "candidate": numbers}
    for name in scores.names:
        columns[name] = np.where(scores.valid, scores.component(name), np.nan)
    if [term.name for term in reward.terms] != [reward.scorer.columns[-1]] or reward.gates:
        columns["reward"] = scores.total
    table = pa.table({name: pa.array(column, from_pandas=True) for name, column in columns.items()})
    table = table.replace_schema_metadata({"rlhf_drive.scorer": json.dumps(asdict(scores.scorer))})
    partial = target.with_name(f".{target.name}.partial")
    try:
        pq.write_table(table, partial)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    reasons = target.with_name(f"{target.name}.failures.jsonl")
    reasons.unlink(missing_ok=True)
    if scores.failures:
        lines = (
            {"scene": str(names[row]), "candidate": int(numbers[row]), **asdict(f)}
            for row, f in scores.failures.items()
        )
        reasons.write_text("".join(json.dumps(line) + "\n" for line in lines))
