"""Rows on their way through many workers: cutting a batch, joining its results, and closing in on rows that kill."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rewards.carriers import Failure, ScorerInfo, Scores
from rlhf_drive.errors import RewardError
from rlhf_drive.scenes import Scene, Trajectories

__all__ = ["Homes", "Job", "Shard", "ShardLoss", "after_loss", "plan_shards"]

Rows = NDArray[np.int64]
ShardLoss = Literal["worker_died", "timeout", "raised"]
"""What came back instead of scores: nothing since the process ended, nothing in time, or an error of the call."""

_LEAST_ROWS = 16
"""Smaller shards cost more in calls than they gain in balance."""
_PARTS = 16
"""Shards that kill are cut into so many parts: of 256 rows, one that kills is found after two more losses."""


class Job:
    """One call of `score` under way: what to score, and the rows that are back."""

    def __init__(
        self,
        scenes: Sequence[Scene],
        trajectories: Trajectories,
        previous: Trajectories | None,
        names: tuple[str, ...],
        scorer: ScorerInfo,
    ) -> None:
        """A job of N rows, none of which is back."""
        rows = len(trajectories)
        self.scenes, self.trajectories, self.previous = scenes, trajectories, previous
        self.future: Future[Scores] = Future()
        """The scores, once every row is back."""
        self.clock = ExitStack()
        """Closed when the job ends, however it ends."""
        self._names, self._scorer = names, scorer
        self._components = np.full((rows, len(names)), np.nan)
        self._total = np.full(rows, np.nan)
        self._valid = np.zeros(rows, dtype=np.bool_)
        self._failures: dict[int, Failure] = {}
        self._back = np.zeros(rows, dtype=np.bool_)

    @property
    def complete(self) -> bool:
        """Whether every row is back."""
        return bool(self._back.all())

    def part(self, rows: Rows) -> tuple[list[Scene], Trajectories, Trajectories | None]:
        """The plans `rows` with the scenes they belong to."""
        used, scene_index = np.unique(self.trajectories.scene_index[rows], return_inverse=True)
        plans = Trajectories(self.trajectories.poses[rows], scene_index, self.trajectories.dt_s)
        earlier = self.previous
        before = None if earlier is None else Trajectories(earlier.poses[rows], scene_index, earlier.dt_s)
        return [self.scenes[i] for i in used], plans, before

    def put(self, rows: Rows, scores: Scores) -> None:
        """Take the scores of `rows`.

        Raises:
            RewardError: A row is back already, or the worker's columns are not the ones asked for.
        """
        self._mark(rows)
        if scores.names != self._names or scores.scorer != self._scorer or len(scores) != len(rows):
            raise RewardError(
                f"A worker returned {len(scores)} rows of {scores.scorer} {scores.names} where {len(rows)} of "
                f"{self._scorer} {self._names} were asked for. Give every machine the same version of rlhf-drive."
            )
        self._components[rows], self._total[rows], self._valid[rows] = scores.components, scores.total, scores.valid
        self._failures |= {int(rows[i]): failure for i, failure in scores.failures.items()}

    def give_up(self, row: int, failure: Failure) -> None:
        """Take `row` as invalid."""
        self._mark(np.array([row]))
        self._failures[row] = failure

    def scores(self) -> Scores:
        """All rows."""
        failures = dict(sorted(self._failures.items()))
        return Scores(self._names, self._components, self._total, self._valid, self._scorer, failures)

    def token(self, row: int) -> str:
        """Token of the scene that `row` was planned for."""
        return self.scenes[int(self.trajectories.scene_index[row])].token

    def _mark(self, rows: Rows) -> None:
        if self._back[rows].any():
            raise RewardError(f"Rows {rows[self._back[rows]][:5].tolist()} came back twice; this must not happen.")
        self._back[rows] = True


@dataclass(frozen=True)
class Shard:
    """Rows that one worker scores in one call."""

    job: Job
    """What they belong to."""
    rows: Rows
    """``[n]`` rows of the job."""
    losses: int = 0
    """How often exactly these rows were given to a worker that did not bring them back."""
    suspect: bool = False
    """Whether they are part of a shard that was cut because it did not come back."""


class Homes:
    """Which worker a scene goes to: the one that had it before, which keeps it prepared."""

    def __init__(self, workers: int, size: int) -> None:
        """Remember the `size` scenes used last."""
        self._workers, self._size = workers, size
        self._home: OrderedDict[str, int] = OrderedDict()
        self._load: Counter[int] = Counter()

    def of(self, tokens: Sequence[str]) -> list[int]:
        """Worker of each scene; one that is new goes to the worker with the fewest scenes."""
        found = []
        for token in tokens:
            if token not in self._home:
                self._home[token] = min(range(self._workers), key=lambda worker: (self._load[worker], worker))
                self._load[self._home[token]] += 1
            self._home.move_to_end(token)
            found.append(self._home[token])
        while len(self._home) > self._size:
            self._load[self._home.popitem(last=False)[1]] -= 1
        return found


def plan_shards(scene_index: Rows, homes: Sequence[int], *, workers: int, max_rows: int) -> list[tuple[int, Rows]]:
    """Cut a batch into shards.

    Args:
        scene_index: ``[N]`` scene of each row.
        homes: ``[S]`` worker of each scene.
        workers: Workers there are; each gets at least two shards where the rows suffice, so that one which is done
            early can take over.
        max_rows: Rows that a shard has at most.

    Returns:
        Worker and rows of each shard, scene by scene. A scene with more rows than a shard holds is spread from its
        home on over the workers that follow.
    """
    if len(scene_index) == 0:
        return []
    size = min(max_rows, max(_LEAST_ROWS, -(-len(scene_index) // (2 * workers))))
    order = np.argsort(scene_index, kind="stable")
    shards: list[tuple[int, Rows]] = []
    open_: list[list[Rows]] = [[] for _ in range(workers)]
    for group in np.split(order, np.flatnonzero(np.diff(scene_index[order])) + 1):
        for i, piece in enumerate(np.split(group, range(size, len(group), size))):
            worker = (homes[int(scene_index[group[0]])] + i) % workers
            if sum(map(len, open_[worker])) + len(piece) > size:
                shards.append((worker, np.concatenate(open_[worker])))
                open_[worker] = []
            open_[worker].append(piece)
    return shards + [(worker, np.concatenate(pieces)) for worker, pieces in enumerate(open_) if pieces]


def after_loss(shard: Shard, loss: ShardLoss, max_retries: int) -> list[Shard]:
    """What to hand out in place of a shard that did not come back; nothing where its row is given up.

    A worker may have died for a reason of its own, so the shard is first tried as it is once more. If that fails too,
    or if it held the worker up, it is cut into parts, down to single rows. A row that was alone with the workers it
    was lost with is the cause: it is tried `max_retries` more times if they died, once if they hung, not if it raised.

    Args:
        shard: Its rows.
        loss: What happened.
        max_retries: How often a row may be tried again; 0 gives nothing a second try.
    """
    losses = shard.losses + 1
    if len(shard.rows) == 1:
        tries = {"worker_died": max_retries, "timeout": min(max_retries, 1), "raised": 0}[loss]
        return [] if losses > tries else [replace(shard, losses=losses)]
    if loss == "worker_died" and not shard.suspect and losses <= min(max_retries, 1):
        return [replace(shard, losses=losses)]
    parts = np.array_split(shard.rows, min(_PARTS, len(shard.rows)))
    return [Shard(shard.job, part, suspect=True) for part in parts]
