"""The reward service: scenes and plans in, scores out. A failure becomes a row with a reason, never a number."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rewards.carriers import Failure, RewardInputs, Scores
from rewards.compose import Reward, RewardTerm
from rewards.isolation import call_isolated, describe_error
from rewards.prepared_scenes import PreparedScenes
from rewards.scorer import Scorer
from rlhf_drive.errors import ConfigError, DataError, RewardError
from rlhf_drive.scenes import NUM_POSES, POSE_DT_S, Scene, Trajectories

__all__ = ["LocalRewardService", "RewardService", "RewardStats", "check_invalid", "check_trajectories"]


class RewardService(Protocol):
    """Scores plans, wherever that happens."""

    def score(
        self, scenes: Sequence[Scene], trajectories: Trajectories, previous: Trajectories | None = None
    ) -> Scores:
        """Scores of N plans; row n was planned for ``scenes[trajectories.scene_index[n]]``."""
        ...

    def submit(
        self, scenes: Sequence[Scene], trajectories: Trajectories, previous: Trajectories | None = None
    ) -> Future[Scores]:
        """The same, while the caller goes on."""
        ...

    def close(self) -> None:
        """End workers."""
        ...


@dataclass(frozen=True)
class RewardStats:
    """What a service has done so far."""

    rows: int = 0
    """Plans received."""
    failures: int = 0
    """Plans without a valid score."""
    prepared: int = 0
    """Scenes prepared, that is cache misses."""
    seconds: float = 0.0
    """Time spent in `score`."""

    @property
    def rows_per_s(self) -> float:
        """Plans per second; 0 before the first call."""
        return self.rows / self.seconds if self.seconds > 0 else 0.0


class LocalRewardService:
    """Scores in this process, scene by scene on threads; the result does not depend on their number.

    Example:
        >>> with LocalRewardService(build_reward([RewardSpec("pdms")])) as service:
        ...     scores = service.score(scenes, trajectories)
    """

    def __init__(self, reward: Reward, *, workers: int = 0, cache_size: int = 1024, timeout_s: float = 0.0) -> None:
        """Set up; nothing heavy happens before the first call of `score`.

        Args:
            reward: What to compute.
            workers: Threads that score; 0 takes one per usable core, 1 stays in the calling thread.
            cache_size: Prepared scenes kept, the most recently used ones; 0 keeps none.
            timeout_s: Time that a user's reward may take for one row; 0 = no limit.

        Raises:
            ConfigError: `workers` or `cache_size` is negative.
        """
        for name, value in (("workers", workers), ("cache_size", cache_size)):
            if value < 0:
                raise ConfigError(f"{name} of the reward service must be at least 0; got {value}.")
        self.reward = reward
        """What is computed."""
        self.stats = RewardStats()
        """What has been done so far."""
        self._timeout_s = timeout_s
        self._workers = workers or _usable_cores()
        self._executor: ThreadPoolExecutor | None = None
        self._cache = PreparedScenes(cache_size)

    def score(
        self, scenes: Sequence[Scene], trajectories: Trajectories, previous: Trajectories | None = None
    ) -> Scores:
        """Scores of N plans over S scenes.

        Args:
            scenes: S scenes.
            trajectories: ``[N, 8, 3]`` plans in their scene's t=0 ego frame, every 0.5 s.
            previous: ``[N, 8, 3]`` plans of the previous frame in that frame's ego frame, row by row; for EC.

        Returns:
            N rows. A row is invalid, with its reason, where the scene cannot be prepared, the plan holds NaN, or the
            scorer or a user's reward fails on it.

        Raises:
            DataError: The trajectories have another length or spacing, or point at a scene that is not there.
        """
        start = time.perf_counter()
        check_trajectories(trajectories, len(scenes))
        scorer = self.reward.scorer
        rows = len(trajectories)
        columns = {name: np.full(rows, np.nan) for name in self.reward.names}
        failures: dict[int, Failure] = {}
        finite = np.isfinite(trajectories.poses).all(axis=(1, 2))
        for row in np.flatnonzero(~finite):
            reason = f"{_of(scenes, trajectories, row)}: the plan holds a value that is not finite"
            failures[int(row)] = Failure("plan", "invalid_plan", reason)

        def run(scene_index: int) -> _SceneResult:
            mine = np.flatnonzero(finite & (trajectories.scene_index == scene_index))
            earlier = previous.poses if previous is not None else None
            return _score_scene(scorer, self._cache, scenes[scene_index], mine, trajectories.poses, earlier)

        for result in self._map(run, np.unique(trajectories.scene_index[finite]).tolist()):
            failures |= result.failures
            for i, name in enumerate(scorer.columns):
                columns[name][result.rows] = result.values[:, i]
        for term in self.reward.user_terms:
            failures |= _score_term(term, scenes, trajectories, previous, columns, scorer.columns, failures)
        scores = self._scores(scorer, columns, failures)
        self.stats = replace(
            self.stats,
            rows=self.stats.rows + rows,
            failures=self.stats.failures + len(scores.failures),
            prepared=self._cache.prepared,
            seconds=self.stats.seconds + time.perf_counter() - start,
        )
        return scores

    def submit(
        self, scenes: Sequence[Scene], trajectories: Trajectories, previous: Trajectories | None = None
    ) -> Future[Scores]:
        """:meth:`score` in a thread."""
        future: Future[Scores] = Future()
        future.set_result(self.score(scenes, trajectories, previous))
        return future

    def close(self) -> None:
        """End the threads. The service can be used again; it then starts new ones."""
        if self._executor is not None:
            self._executor.shutdown()
            self._executor = None

    def __enter__(self) -> LocalRewardService:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _map(self, run: Callable[[int], _SceneResult], scene_indices: list[int]) -> list[_SceneResult]:
        """``run`` of every index, in order."""
        if self._workers == 1 or len(scene_indices) < 2:
            return [run(i) for i in scene_indices]
        if self._executor is None:
            self._executor = ThreadPoolExecutor(self._workers, thread_name_prefix="reward")
        return list(self._executor.map(run, scene_indices))

    def _scores(
        self, scorer: Scorer, columns: Mapping[str, NDArray[np.float64]], failures: dict[int, Failure]
    ) -> Scores:
        """The scores as a carrier; a row that failed has no total."""
        total = self.reward.total(columns)
        for row in np.flatnonzero(~np.isfinite(total)):
            failures.setdefault(int(row), Failure("scorer", "unavailable", "a component of the reward has no value"))
        valid = np.ones(len(total), dtype=np.bool_)
        valid[list(failures)] = False
        return Scores(
            names=self.reward.names,
            components=np.stack([columns[name] for name in self.reward.names], axis=1),
            total=np.where(valid, total, np.nan),
            valid=valid,
            failures=dict(sorted(failures.items())),
            scorer=scorer.info,
        )


def check_invalid(scores: Scores, max_fraction: float) -> None:
    """Stop when too many rows are invalid.

    Args:
        scores: N scored rows.
        max_fraction: Largest share of invalid rows that is tolerated, 0..1.

    Raises:
        RewardError: The share is larger; the message has the count, the share and the first reasons.
    """
    invalid = len(scores.failures)
    if invalid == 0 or invalid / len(scores) <= max_fraction:
        return
    first = "\n".join(f"  row {row}: {reason}" for row, reason in list(scores.failures.items())[:3])
    raise RewardError(
        f"{invalid} of {len(scores)} rollouts ({invalid / len(scores):.1%}) could not be scored; "
        f"{max_fraction:.1%} are tolerated (reward.max_invalid_fraction). The first ones:\n{first}"
    )


@dataclass(frozen=True)
class _SceneResult:
    """PDMS components of one scene's rows."""

    rows: NDArray[np.int64]
    values: NDArray[np.float64]
    failures: dict[int, Failure]


def _score_scene(
    scorer: Scorer,
    cache: PreparedScenes,
    scene: Scene,
    rows: NDArray[np.int64],
    poses: NDArray[np.float64],
    previous: NDArray[np.float64] | None,
) -> _SceneResult:
    """The scorer's columns ``[n, C]`` of the plans `rows`, all for `scene`."""
    width = len(scorer.columns)
    try:
        prepared = cache.get(scene, scorer.prepare)
    except Exception as error:  # a scene that cannot be prepared costs its own rows, nothing else
        reason = f"scene {scene.token!r} cannot be prepared: {describe_error(error)}"
        failure = Failure("scene", "invalid_scene", reason)
        return _SceneResult(rows, np.full((len(rows), width), np.nan), {int(row): failure for row in rows})

    def function(part: NDArray[np.int64]) -> NDArray[np.float64]:
        scored = scorer.score(prepared, poses[part], None if previous is None else previous[part])
        return np.stack([scored[name] for name in scorer.columns], axis=1)

    values, reasons = call_isolated(function, rows, width)
    failures = {row: Failure("scorer", kind, why) for row, (kind, why) in reasons.items()}
    needed = [i for i, name in enumerate(scorer.columns) if name not in scorer.optional]
    for row in rows[~np.isfinite(values[:, needed]).all(axis=1)]:
        failures.setdefault(int(row), Failure("scorer", "not_finite", "it gave no finite score"))
    return _SceneResult(
        rows,
        values,
        {r: replace(f, reason=f"scene {scene.token!r}: scoring failed: {f.reason}") for r, f in failures.items()},
    )


def _score_term(
    term: RewardTerm,
    scenes: Sequence[Scene],
    trajectories: Trajectories,
    previous: Trajectories | None,
    columns: Mapping[str, NDArray[np.float64]],
    components: Sequence[str],
    failed: Mapping[int, Failure],
) -> dict[int, Failure]:
    """Compute a user's reward on the rows that have not failed yet, into its column; returns the rows it fails on."""
    rows = np.setdiff1d(np.arange(len(trajectories)), list(failed))
    if len(rows) == 0:
        return {}
    values, reasons = call_isolated(
        lambda part: np.asarray(term.function(_inputs(scenes, trajectories, previous, columns, components, part))),
        rows,
        1,
    )
    columns[term.name][rows] = values[:, 0]
    failures = {row: Failure(term.name, kind, why) for row, (kind, why) in reasons.items()}
    for row, value in zip(rows, values[:, 0], strict=True):
        if not np.isfinite(value):
            failures.setdefault(int(row), Failure(term.name, "not_finite", f"returned {value}"))
    return {
        row: replace(f, reason=f"{_of(scenes, trajectories, row)}: reward {term.name!r}: {f.reason}")
        for row, f in failures.items()
    }


def _inputs(
    scenes: Sequence[Scene],
    trajectories: Trajectories,
    previous: Trajectories | None,
    columns: Mapping[str, NDArray[np.float64]],
    components: Sequence[str],
    rows: NDArray[np.int64],
) -> RewardInputs:
    """What a user's reward sees of `rows`: their scenes alone, and copies that cannot be written to."""
    used, scene_index = np.unique(trajectories.scene_index[rows], return_inverse=True)

    def part(whole: Trajectories) -> Trajectories:
        return Trajectories(_frozen(whole.poses[rows]), _frozen(scene_index), whole.dt_s)

    values = {name: _frozen(columns[name][rows]) for name in components}
    earlier = None if previous is None else part(previous)
    return RewardInputs([scenes[i] for i in used], part(trajectories), values, earlier)


def _frozen(array: NDArray[Any]) -> NDArray[Any]:
    array.setflags(write=False)
    return array


def _of(scenes: Sequence[Scene], trajectories: Trajectories, row: int | np.int64) -> str:
    """The scene of a row, in words."""
    return f"scene {scenes[trajectories.scene_index[row]].token!r}"


def _usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_trajectories(trajectories: Trajectories, scenes: int) -> None:
    """Refuse plans that could not be scored as they are meant."""
    if trajectories.poses.shape[1] != NUM_POSES or trajectories.dt_s != POSE_DT_S:
        raise DataError(
            f"Plans must have {NUM_POSES} poses {POSE_DT_S} s apart to be scored; got "
            f"{trajectories.poses.shape[1]} poses {trajectories.dt_s} s apart. Resample them."
        )
    index = trajectories.scene_index
    if len(index) and not 0 <= index.min() <= index.max() < scenes:
        raise DataError(f"scene_index must lie in 0 … {scenes - 1}; got {index.min()} … {index.max()}.")
