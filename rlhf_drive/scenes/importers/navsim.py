"""Scenes from NAVSIM: metric caches for the scorer, logs for what a policy sees, joined by token."""

from __future__ import annotations

import itertools
import multiprocessing
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_drive.errors import DataError
from rlhf_drive.scenes.importers.navsim_cache import NavsimCache, NavsimVersion, read_navsim_cache
from rlhf_drive.scenes.importers.navsim_files import navsim_cache_files
from rlhf_drive.scenes.importers.navsim_logs import (
    NavsimFrame,
    human_poses_at,
    observation_at,
    past_states_at,
    read_navsim_log,
)
from rlhf_drive.scenes.importers.navsim_map import map_view
from rlhf_drive.scenes.importers.navsim_observation import observe_cache
from rlhf_drive.scenes.importers.recorded import Refused
from rlhf_drive.scenes.model import Scene

__all__ = ["NavsimLogs", "import_navsim"]

_CHUNK = 16
_KEPT_LOGS = 4
_MAX_CLOCK_SHIFT_US = 1_000
_MAX_POSE_SHIFT_M = 1.0
_CACHING = "Give the folder of NAVSIM's metric caching (run_metric_caching.py) as well."


def import_navsim(
    cache_folder: Path | str | None,
    logs_folder: Path | str | None = None,
    *,
    version: NavsimVersion | None = None,
    workers: int = 1,
) -> Iterator[Scene | Refused]:
    """Scenes of a folder of metric caches, one at a time, in the order of its list, whatever the number of workers.

    With logs the observation is what was seen (road users over 1.5 s, driving command, cameras by path), and the
    human's drive and the logged past fill what the cache lacks. Without, it is what the cache tells about t=0. The map
    part comes from the cache in either case (:mod:`rlhf_drive.scenes.importers.navsim_map`).

    Args:
        cache_folder: Folder that NAVSIM's metric caching wrote, or a single cache.
        logs_folder: Folder of ``<log>.pkl``, searched in depth; None for the caches alone.
        version: Version all caches must be of; None takes either.
        workers: Processes; 1 stays in this one.

    Yields:
        Scenes of kind ``navsim``, with the progress reference of the cache's version and clusters by log; a refusal
        with its reason for every cache that cannot be used.

    Raises:
        DataError: A folder holds nothing of its kind, a listed cache is missing or ambiguous, or there are logs alone.

    Example:
        >>> for item in import_navsim("exp/metric_cache", "navsim_logs/mini"):  # doctest: +SKIP
        ...     print(item.token)
    """
    if cache_folder is None:
        raise DataError(f"NAVSIM logs alone cannot be scored: they have no map, centreline or reference. {_CACHING}")
    logs = None if logs_folder is None else NavsimLogs(logs_folder)
    try:
        files = navsim_cache_files(cache_folder)
    except DataError as error:
        if logs is None and Path(cache_folder).is_dir() and any(Path(cache_folder).glob("*.pkl")):
            raise DataError(f"{error} Logs alone cannot be scored: they have no map or centreline.") from error
        raise
    convert = partial(_convert, logs=logs, version=version)
    chunks = (files[i : i + _CHUNK] for i in range(0, len(files), _CHUNK))
    if workers <= 1:
        return (item for file in files for item in convert([file]))
    return _in_processes(convert, chunks, workers)


def _in_processes(
    convert: Any, chunks: Iterable[Sequence[tuple[str, Path]]], workers: int
) -> Iterator[Scene | Refused]:
    """Results of all chunks in order; no more than two chunks for each worker are under way or waiting."""
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting: deque[Future[list[Scene | Refused]]] = deque()
        rest = iter(chunks)
        try:
            waiting.extend(pool.submit(convert, chunk) for chunk in itertools.islice(rest, 2 * workers))
            while waiting:
                items = waiting.popleft().result()
                waiting.extend(pool.submit(convert, chunk) for chunk in itertools.islice(rest, 1))
                yield from items
        finally:
            pool.shutdown(cancel_futures=True)


def _convert(
    files: Sequence[tuple[str, Path]], logs: NavsimLogs | None, version: NavsimVersion | None
) -> list[Scene | Refused]:
    found: list[Scene | Refused] = []
    for token, path in files:
        try:
            cache = read_navsim_cache(path, version=version)
            found.append(_from_cache(cache) if logs is None else _from_both(cache, *logs.find(cache.log, token)))
        except DataError as error:
            found.append(Refused(token, str(error)))
    return found


def _from_cache(cache: NavsimCache) -> Scene:
    return Scene(cache.token, "navsim", cache.log, False, observe_cache(cache), cache.reference)


def _from_both(cache: NavsimCache, frames: Sequence[NavsimFrame], index: int) -> Scene:
    """The scene of a cache and the frame of its log."""
    frame, reference = frames[index], cache.reference
    shift = float(np.hypot(*(frame.pose[:2] - reference.ego_init[:2])))
    if abs(frame.time_us - reference.t0_us) > _MAX_CLOCK_SHIFT_US or shift > _MAX_POSE_SHIFT_M:
        raise DataError(
            f"Scene {cache.token}: the frame of log {frame.log} lies {(frame.time_us - reference.t0_us) / 1e6:g} s and "
            f"{shift:.3g} m from that of the metric cache. Give logs and caches of the same data."
        )
    changes: dict[str, object] = {}
    if not len(reference.human_poses) and not cache.synthetic:
        changes["human_poses"] = human_poses_at(frames, index)
    if not len(reference.past_states):
        times, states = past_states_at(frames, index)
        changes |= {
            "past_times_us": times,
            "past_states": states,
            "prev_t0_us": int(times[-2]),
            "prev_ego_init": states[-2],
        }
    observation = observation_at(frames, index, map_view(cache, frame.red))
    scene = Scene(cache.token, "navsim", frame.log, False, observation, reference)
    return scene.with_reference(**changes) if changes else scene


class NavsimLogs:
    """The logs of a folder, found by name or token; the latest few stay in memory."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        """Where they are."""
        self._paths: dict[str, Path] = {}
        self._latest: dict[Path, tuple[NavsimFrame, ...]] = {}
        self._by_token: dict[str, Path] | None = None
        for path in sorted(self.folder.rglob("*.pkl")):
            if path.stem in self._paths:
                raise DataError(f"Log {path.stem!r} is there twice: {self._paths[path.stem]} and {path}. Remove one.")
            self._paths[path.stem] = path
        if not self._paths:
            raise DataError(f"{self.folder} holds no NAVSIM log (<log>.pkl). Check the path.")

    def find(self, log: str, token: str) -> tuple[tuple[NavsimFrame, ...], int]:
        """The frames of the log that has a frame `token`, and which one it is.

        Args:
            log: Name of the log, as far as known; if none is called so, all are searched.
            token: Token of a frame.

        Raises:
            DataError: No log has the frame, or its log cannot be read.
        """
        path = self._paths.get(log) or self._tokens().get(token)
        frames = () if path is None else self._frames(path)
        index = next((i for i, frame in enumerate(frames) if frame.token == token), None)
        if index is None:
            where = f"the log {path}" if path else f"any of the {len(self._paths)} logs in {self.folder}"
            raise DataError(f"Scene {token}: {where} has no frame of this token. Give the logs of the same split.")
        return frames, index

    def _frames(self, path: Path) -> tuple[NavsimFrame, ...]:
        frames = self._latest.pop(path, None) or read_navsim_log(path)
        self._latest[path] = frames
        if len(self._latest) > _KEPT_LOGS:
            del self._latest[next(iter(self._latest))]
        return frames

    def _tokens(self) -> dict[str, Path]:
        """Log of every token; logs that cannot be read have none."""
        if self._by_token is None:
            self._by_token = {}
            for path in self._paths.values():
                try:
                    self._by_token |= {frame.token: path for frame in read_navsim_log(path)}
                except DataError:
                    continue
        return self._by_token
