"""From a source to a scene store: generate or import, add the progress reference, judge, split, write."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import threading
from array import array
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_drive.config import ScenesSection
from rlhf_drive.errors import ConfigError, DataError
from rlhf_drive.scenes import Scene
from rlhf_drive.scenes.generator import generate_scenes
from rlhf_drive.scenes.importers.navsim import import_navsim
from rlhf_drive.scenes.importers.navsim_files import navsim_cache_files
from rlhf_drive.scenes.importers.recorded import Refused, import_recording, recording_paths
from rlhf_drive.scenes.store import SceneStore, write_scenes
from rlhf_drive.scenes.verified import Progress
from rlhf_drive.training.judge import Judged, judge, judge_imported

__all__ = ["build_scenes", "check_store", "open_scenes", "split_of_cluster"]

REFUSALS_KEPT = 10_000
"""Refused scenes that a store names with the reason; the others are counted, since every start reads the manifest."""
AHEAD = 2
"""Pieces of work a worker may be ahead of the writing: what is done and not written waits in memory."""


@dataclass
class _Tally:
    """What happened to the scenes of a source."""

    refused: dict[str, str] = field(default_factory=dict)
    refused_more: int = 0
    scores: dict[str, dict[str, array[float]]] = field(default_factory=dict)
    kinds: Counter[str] = field(default_factory=Counter)
    splits: Counter[str] = field(default_factory=Counter)
    clusters: set[str] = field(default_factory=set)

    def refuse(self, item: Refused) -> None:
        """Note a scene that is left out."""
        if len(self.refused) < REFUSALS_KEPT or item.token in self.refused:
            self.refused[item.token] = item.reason
        else:
            self.refused_more += 1

    @property
    def refusals(self) -> int:
        """Scenes left out."""
        return len(self.refused) + self.refused_more


def split_of_cluster(cluster: str, seed: int, heldout_fraction: float) -> str:
    """`heldout` or `train`: a function of the cluster's name alone, so adding scenes never moves others across."""
    digest = hashlib.blake2b(f"{seed}/{cluster}".encode(), digest_size=8).digest()
    return "heldout" if int.from_bytes(digest, "little") / 2**64 < heldout_fraction else "train"


@dataclass(frozen=True)
class _Job:
    """A piece of a source that one worker turns into judged scenes."""

    section: ScenesSection
    item: Any
    """Range of scene indices, or path of a recording."""


def _produce(job: _Job) -> list[Judged | Refused]:
    """All judged scenes of a job, in order."""
    section = job.section
    raw: Iterable[Scene | Refused]
    if section.source == "generate":
        raw = generate_scenes(len(job.item), seed=section.seed, kinds=section.kinds, start=job.item.start)
    else:
        raw = _compared(import_recording(job.item, section.starts), job)
    return [item if isinstance(item, Refused) else judge(item, min_human_pdms=section.min_human_pdms) for item in raw]


def _compared(items: Iterable[Scene | Refused], job: _Job) -> Iterator[Scene | Refused]:
    """Without the held-out scenes that start between the recording's recommended starts.

    Training may use starts that overlap; comparing on them would count the same seconds several times.
    """
    section = job.section
    try:
        recommended = set(json.loads(job.item.read_text())["recommended_start_indices"])
    except (OSError, ValueError, KeyError, TypeError):
        recommended = set()  # the importer has refused this recording already, or it gives no recommendation
    for item in items:
        heldout = isinstance(item, Scene) and (
            split_of_cluster(item.cluster, section.seed, section.heldout_fraction) == "heldout"
        )
        if not (heldout and recommended) or int(item.token.rpartition("__")[2]) in recommended:
            yield item


def _jobs(section: ScenesSection) -> list[_Job]:
    if section.source == "generate":
        chunk = 25
        starts = range(0, section.count, chunk)
        return [_Job(section, range(s, min(section.count, s + chunk))) for s in starts]
    return [_Job(section, path) for path in recording_paths(Path(str(section.path)))]


def _imported(section: ScenesSection, workers: int) -> Iterator[list[Judged | Refused]]:
    """Judged scenes of NAVSIM's caches, one at a time."""
    for item in import_navsim(str(section.path), section.logs, workers=workers):
        yield [item if isinstance(item, Refused) else judge_imported(item, min_human_score=section.min_human_pdms)]


def _run_jobs(jobs: Sequence[_Job], workers: int) -> Iterator[list[Judged | Refused]]:
    """Results in the order of the jobs, whatever the number of workers."""
    if workers <= 1:
        yield from map(_produce, jobs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent) as pool:
        waiting: deque[Future[list[Judged | Refused]]] = deque()
        try:
            for job in jobs:
                waiting.append(pool.submit(_produce, job))
                if len(waiting) > AHEAD * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """In a worker: end when the run is killed. A pool's workers otherwise wait for the next job for ever."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def build_scenes(
    section: ScenesSection, folder: Path, *, workers: int | None = None, on_progress: Progress | None = None
) -> SceneStore:
    """Write the store that a recipe's `scenes` section describes, and open it.

    Args:
        section: Source `generate`, `recorded` or `navsim`.
        folder: Where the store goes; must not exist.
        workers: Processes; None takes one per core.
        on_progress: Called as ``on_progress(done, total, text)``.

    Raises:
        DataError: No usable scene, or one of the splits is empty; caches of NAVSIM may all be in one split, since they
            may be there to be scored only.
    """
    workers = workers or len(os.sched_getaffinity(0))
    if section.source == "navsim":
        total, results = len(navsim_cache_files(str(section.path))), _imported(section, workers)
    else:
        jobs = _jobs(section)
        total, results = len(jobs), _run_jobs(jobs, min(len(jobs), workers))
    tally = _Tally()
    splits: dict[str, str] = {}
    info: dict[str, object] = _origin(section)
    write_scenes(folder, _kept(section, results, total, tally, splits, info, on_progress), split_of=splits, info=info)
    return SceneStore.open(folder, verify=False)  # the checksums were taken from these very files a moment ago


def _kept(
    section: ScenesSection,
    produced: Iterator[list[Judged | Refused]],
    total: int,
    tally: _Tally,
    splits: dict[str, str],
    info: dict[str, object],
    on_progress: Progress | None,
) -> Iterator[Scene]:
    """Usable scenes as they are made; notes their split, and at the end what became of all of them."""
    for done, results in enumerate(produced, start=1):
        for item in results:
            if isinstance(item, Refused):
                tally.refuse(item)
                continue
            scene = item.scene
            splits[scene.token] = split_of_cluster(scene.cluster, section.seed, section.heldout_fraction)
            tally.splits[splits[scene.token]] += 1
            tally.kinds[scene.kind] += 1
            tally.clusters.add(scene.cluster)
            for name, value in item.scores.items():
                tally.scores.setdefault(item.metric, {}).setdefault(name, array("d")).append(value)
            yield scene
        if on_progress:
            on_progress(done, total, f"{sum(tally.splits.values())} scenes, {tally.refusals} refused")
    info["kinds"] = dict(tally.kinds)
    info["refused"] = tally.refused
    if tally.refused_more:
        info["refused_more"] = tally.refused_more
    empty = [name for name in ("train", "heldout") if not tally.splits[name]]
    if empty and (section.source != "navsim" or len(empty) == 2):
        first = next((f" The first refusal: {token}: {why}" for token, why in tally.refused.items()), "")
        raise DataError(
            f"Split {empty[0]!r} would be empty: {sum(tally.splits.values())} usable scenes in {len(tally.clusters)} "
            f"clusters of related ones, which are never divided, and {tally.refusals} refused. Use more scenes or "
            f"another scenes.heldout_fraction or scenes.seed.{first}"
        )
    for metric, scores in tally.scores.items():
        info[metric] = {name: round(float(np.mean(values)), 4) for name, values in scores.items()}


def _origin(section: ScenesSection) -> dict[str, object]:
    """What decides a store's content, as JSON data."""
    origin: dict[str, object] = {"source": section.source, "seed": section.seed}
    origin |= {"heldout_fraction": section.heldout_fraction, "min_human_pdms": section.min_human_pdms}
    if section.source == "generate":
        return origin | {"count": section.count, "wanted_kinds": list(section.kinds)}
    if section.source == "navsim":
        names = [token for token, _ in navsim_cache_files(str(section.path))]
        digest = hashlib.blake2b("/".join(sorted(names)).encode(), digest_size=8).hexdigest()
        return origin | {"caches": f"{len(names)} by the tokens of {digest}", "logs": section.logs is not None}
    names = [path.stem for path in recording_paths(Path(str(section.path)))]
    digest = hashlib.blake2b("/".join(names).encode(), digest_size=8).hexdigest()
    return origin | {"starts": section.starts, "recordings": f"{len(names)} by the names of {digest}"}


def check_store(store: SceneStore, splits: Sequence[str], metrics: Sequence[str]) -> None:
    """Refuse a store that a job cannot work with, before it starts.

    Args:
        store: The scenes; those of a split come from one source, so its first scene speaks for it.
        splits: Splits that the job uses.
        metrics: Simulator scores that it computes.

    Raises:
        DataError: A split is empty, or its scenes lack the progress reference of a metric.
    """
    for split in splits:
        rows = store.rows(split)
        if not len(rows):
            raise DataError(
                f"{store.path} holds no scene in split {split!r}, which this job needs. Make the store again with more "
                "scenes or another --heldout-fraction or --seed; related scenes stay together."
            )
        reference = store[int(rows[0])].reference
        known = {"pdms": len(reference.pdm_reference_v1) > 0, "epdms": len(reference.pdm_reference_v2) > 0}
        if lacking := [metric for metric in metrics if not known.get(metric, True)]:
            has = ", ".join(metric for metric, there in known.items() if there) or "neither"
            raise DataError(
                f"{store.path} cannot be scored by {', '.join(lacking)}: its scenes hold a reference for {has} alone, "
                "as metric caches of one NAVSIM version do. Let reward.scorer, reward.terms and compare.metrics "
                "match, or import caches of the other version."
            )


def open_scenes(section: ScenesSection, run_dir: Path, *, on_progress: Progress | None = None) -> SceneStore:
    """The store of a recipe: opened if it is there, made otherwise.

    Raises:
        ConfigError: Source `store` without a folder.
    """
    folder = Path(section.store) if section.store else run_dir / "scenes"
    if section.source == "store" and not section.store:
        raise ConfigError("scenes.source is 'store': scenes.store must name the folder of a scene store.")
    if section.source == "store":
        return SceneStore.open(folder, on_progress=on_progress)
    if (folder / "scenes.json").exists():
        store = SceneStore.open(folder, on_progress=on_progress)
        wanted = _origin(section)
        differing = [f"{k}: {store.info.get(k)} there, {v} here" for k, v in wanted.items() if store.info.get(k) != v]
        if differing:
            raise ConfigError(
                f"The scene store {folder} was made otherwise ({'; '.join(differing)}). Give another scenes.store, or "
                "scenes.source=store to take it as it is."
            )
        return store
    return build_scenes(section, folder, on_progress=on_progress)
