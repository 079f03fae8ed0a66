"""From rows to columns: the scorer on the plans of one scene, a user's reward on what the scorer could score."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rewards.call_thread import CallThread
from rewards.carriers import Failure, RewardInputs, Scores
from rewards.compose import Reward, RewardTerm
from rewards.isolation import OutputError, Pace, call_isolated, describe_error
from rewards.prepared_scenes import PreparedScenes
from rewards.scorer import Scorer
from rlhf_drive.scenes import Scene, Trajectories

__all__ = ["Batch", "SceneRows", "ScoredRows", "UserReward", "assemble", "start_table"]

Columns = dict[str, NDArray[np.float64]]
Failures = dict[int, Failure]


@dataclass(frozen=True)
class Batch:
    """One call of the service."""

    scenes: Sequence[Scene]
    """S scenes."""
    trajectories: Trajectories
    """N plans."""
    previous: Trajectories | None
    """N plans of the previous frame."""

    @cached_property
    def shown_scenes(self) -> tuple[Scene, ...]:
        """The scenes as users' rewards see them: over the same memory, through arrays that cannot be written to."""
        return tuple(
            replace(scene, observation=_read_only(scene.observation), reference=_read_only(scene.reference))
            for scene in self.scenes
        )

    def place(self, row: int) -> str:
        """The scene of a row, in words."""
        return f"scene {self.scenes[self.trajectories.scene_index[row]].token!r}"


def start_table(batch: Batch, names: Sequence[str]) -> tuple[Columns, Failures]:
    """Columns of NaN ``[N]``, and the failures that show before any work: plans that are not finite."""
    columns = {name: np.full(len(batch.trajectories), np.nan) for name in names}
    failures: Failures = {}
    for what, plans in (("plan", batch.trajectories), ("plan of the previous frame", batch.previous)):
        if plans is None:
            continue
        for row in np.flatnonzero(~np.isfinite(plans.poses).all(axis=(1, 2))).tolist():
            reason = f"{batch.place(row)}: the {what} holds a value that is not finite"
            failures.setdefault(row, Failure("plan", "invalid_plan", reason))
    return columns, failures


@dataclass(frozen=True)
class ScoredRows:
    """The scorer's columns of some rows."""

    rows: NDArray[np.int64]
    """``[n]`` indices of the rows."""
    values: NDArray[np.float64]
    """``[n, C]``."""
    failures: Failures
    """Those of them that have no score."""


class SceneRows:
    """The rows of one scene; several threads may score parts of them, and the first prepares the scene for all."""

    def __init__(self, scorer: Scorer, cache: PreparedScenes, scene: Scene, batch: Batch) -> None:
        self._scorer = scorer
        self._scene = scene
        self._batch = batch
        self._get: Callable[[], Any] | None = partial(cache.get, scene, scorer.prepare)
        self._lock = threading.Lock()
        self._prepared: Any = None
        self._failure: Failure | None = None

    def score(self, rows: NDArray[np.int64]) -> ScoredRows:
        """The scorer's columns of `rows`; a row that it fails on is lost alone."""
        self._prepare()
        if self._failure is not None:
            nothing = np.full((len(rows), len(self._scorer.columns)), np.nan)
            return ScoredRows(rows, nothing, dict.fromkeys(rows.tolist(), self._failure))
        values, found = call_isolated(self._values, rows, len(self._scorer.columns))
        failures = {row: Failure("scorer", kind, reason) for row, (kind, reason) in found.items()}
        needed = [i for i, name in enumerate(self._scorer.columns) if name not in self._scorer.optional]
        for row in rows[~np.isfinite(values[:, needed]).all(axis=1)].tolist():
            failures.setdefault(row, Failure("scorer", "not_finite", "it gave no finite score"))
        where = f"scene {self._scene.token!r}: scoring failed"
        return ScoredRows(rows, values, {r: replace(f, reason=f"{where}: {f.reason}") for r, f in failures.items()})

    def _prepare(self) -> None:
        """Prepare the scene if no other thread has."""
        with self._lock:
            if self._get is None:
                return
            try:
                self._prepared = self._get()
            except (Exception, SystemExit) as error:  # it costs the scene's own rows, nothing else
                reason = f"scene {self._scene.token!r} cannot be prepared: {describe_error(error)}"
                self._failure = Failure("scene", "invalid_scene", reason)
            self._get = None

    def _values(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        previous = self._batch.previous
        earlier = None if previous is None else previous.poses[rows]
        scored = self._scorer.score(self._prepared, self._batch.trajectories.poses[rows], earlier)
        if lacking := [name for name in self._scorer.columns if name not in scored]:
            raise OutputError(f"the scorer returned no {', '.join(lacking)}")
        columns = [np.asarray(scored[name]) for name in self._scorer.columns]
        for name, column in zip(self._scorer.columns, columns, strict=True):
            if column.shape != rows.shape:
                raise OutputError(f"the scorer returned {name} of shape {list(column.shape)} for {len(rows)} rows")
        return np.stack(columns, axis=1)


class UserReward:
    """A gate or term of the user's, called in a thread of its own, one call at a time."""

    def __init__(self, term: RewardTerm, timeout_s: float) -> None:
        self.name = term.name
        """Its column."""
        self.thread = CallThread(f"reward-{term.name}", timeout_s)
        """Where it is called."""
        self._function = term.function
        self._pace = Pace(timeout_s)

    def score(
        self, batch: Batch, columns: Columns, components: Sequence[str], failures: Failures, stop: threading.Event
    ) -> None:
        """Fill in its column where no row has failed yet, and add the rows that it fails on to `failures`."""
        rows = np.setdiff1d(np.arange(len(batch.trajectories)), list(failures))
        if len(rows) == 0:
            return
        seen = {name: columns[name] for name in components}
        _ = batch.shown_scenes  # made here, so that the time it takes is not the reward's
        values, found = call_isolated(
            lambda part: self._function(_inputs(batch, seen, part)),
            rows,
            1,
            call=partial(self.thread.call, stop=stop),
            pace=self._pace,
        )
        for row, value in zip(rows.tolist(), values[:, 0].tolist(), strict=True):
            if not np.isfinite(value):
                found.setdefault(row, ("not_finite", f"returned {value}"))
        columns[self.name][rows] = np.where(np.isin(rows, list(found)), np.nan, values[:, 0])
        for row, (kind, reason) in found.items():
            failures[row] = Failure(self.name, kind, f"{batch.place(row)}: reward {self.name!r}: {reason}")


def assemble(reward: Reward, batch: Batch, columns: Columns, failures: Failures) -> Scores:
    """The carrier; a row that failed has no total, and a row without a total has failed."""
    total = reward.total(columns)
    for row in np.flatnonzero(~np.isfinite(total)).tolist():
        if row not in failures:
            failures[row] = _without_total(reward, batch, columns, row, float(total[row]))
    valid = np.ones(len(total), dtype=np.bool_)
    valid[list(failures)] = False
    return Scores(
        names=reward.names,
        components=np.stack([columns[name] for name in reward.names], axis=1),
        total=np.where(valid, total, np.nan),
        valid=valid,
        failures=dict(sorted(failures.items())),
        scorer=reward.scorer.info,
    )


def _without_total(reward: Reward, batch: Batch, columns: Columns, row: int, total: float) -> Failure:
    """Why a row whose every part was computed has no finite total."""
    names = dict.fromkeys(term.name for term in (*reward.gates, *reward.terms))
    lacking = [name for name in names if not np.isfinite(columns[name][row])]
    if lacking:
        reason = f"{batch.place(row)}: component {', '.join(lacking)} is not available"
        return Failure(lacking[0], "unavailable", reason)
    return Failure("total", "not_finite", f"{batch.place(row)}: gates and terms together give {total}")


def _inputs(batch: Batch, columns: Columns, rows: NDArray[np.int64]) -> RewardInputs:
    """What a user's reward sees of `rows`: their scenes alone, and nothing that it could change for others."""
    used, scene_index = np.unique(batch.trajectories.scene_index[rows], return_inverse=True)

    def part(whole: Trajectories) -> Trajectories:
        return Trajectories(_frozen(whole.poses[rows]), _frozen(scene_index), whole.dt_s)

    values = {name: _frozen(column[rows]) for name, column in columns.items()}
    earlier = None if batch.previous is None else part(batch.previous)
    return RewardInputs(tuple(batch.shown_scenes[i] for i in used), part(batch.trajectories), values, earlier)


def _frozen(array: NDArray[Any]) -> NDArray[Any]:
    array.setflags(write=False)
    return array


def _read_only(part: Any) -> Any:
    """An observation or reference with views for arrays; it was checked when it was made and is not again."""
    view = object.__new__(type(part))
    for item in fields(part):
        value = getattr(part, item.name)
        if isinstance(value, np.ndarray):
            value = _frozen(value.view())
        object.__setattr__(view, item.name, dict(value) if isinstance(value, Mapping) else value)
    return view
