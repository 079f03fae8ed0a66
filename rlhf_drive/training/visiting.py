"""Which scenes a step visits: all alike, or those whose groups still differ more often.

A group whose plans all earn the same teaches nothing (2503.14476, section 3.2). Whether a scene's group will differ
can be told from its last visits. Still every scene must come back: the policy changes, and with it what it can learn.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlhf_drive.errors import CheckpointError, ConfigError, did_you_mean
from rlhf_drive.training.draws import further, weighted
from rlhf_drive.training.schedule import epoch_order, scene_order

__all__ = ["FLOOR", "SCENE_VISITS", "SceneVisits", "VisitState", "choose_informative", "choose_uniform", "longest_wait"]

VisitMode = Literal["uniform", "informative"]
SCENE_VISITS: tuple[str, ...] = get_args(VisitMode)

FLOOR = 0.25
"""Share of visits that go round all scenes, whatever is known of them."""
RATE = 0.3
"""Weight of the newest visit in a scene's estimate: after two visits half of the old estimate is forgotten."""
BLOCK = 4096
"""Scenes that are looked at together for one that was never visited."""
TENSORS = "visits."
"""What the names of a checkpoint's tensors begin with."""


@dataclass(frozen=True)
class VisitState:
    """What is remembered of `count` scenes. ``VisitState.fresh(38)``."""

    estimate: NDArray[np.float64]
    """``[count]`` in 0..1: decayed share of visits whose group differed; 1 before the first."""
    visits: NDArray[np.int64]
    """``[count]`` visits so far."""
    last: NDArray[np.int64]
    """``[count]`` 0-based step of the last visit; -1 before the first."""

    @classmethod
    def fresh(cls, count: int) -> VisitState:
        """Nothing visited yet."""
        return cls(np.ones(count), np.zeros(count, np.int64), np.full(count, -1, np.int64))

    def recorded(self, step: int, scenes: Sequence[int], informative: Sequence[bool]) -> VisitState:
        """The state after a step.

        Args:
            step: 0-based.
            scenes: Scenes sampled in it, replaced ones included.
            informative: Whether each one's group differed, so that it taught something.
        """
        state = VisitState(self.estimate.copy(), self.visits.copy(), self.last.copy())
        state.record(step, scenes, informative)
        return state

    def record(self, step: int, scenes: Sequence[int], informative: Sequence[bool]) -> None:
        """:meth:`recorded` in place, in a time that does not grow with the number of scenes."""
        for scene, differed in zip(scenes, informative, strict=True):
            self.estimate[scene] += RATE * (float(differed) - self.estimate[scene])
            self.visits[scene] += 1
            self.last[scene] = step


def choose_uniform(seed: int, step: int, count: int, number: int, taken: Set[int] = frozenset()) -> list[int]:
    """Scenes of a step by :func:`~rlhf_drive.training.schedule.scene_order`; further ones at random from the rest.

    Args:
        seed: Seed of the run.
        step: 0-based.
        count: Scenes there are.
        number: Scenes wanted.
        taken: Scenes that the step has already; empty at its first call. Further scenes are not among them, and fewer
            than `number` if not so many are left.
    """
    if not taken:
        return scene_order(seed, step, count, number)
    return further(seed, step, count, number, taken)


def choose_informative(
    state: VisitState,
    seed: int,
    step: int,
    number: int,
    taken: Set[int] = frozenset(),
    *,
    away: Set[int] = frozenset(),
    seen: int = 0,
) -> list[int]:
    """Scenes of a step: unseen ones first, then a share `FLOOR` in turn, the others by their estimates.

    The turn goes through fresh permutations of all scenes, one after the other; the others are drawn one by one without
    replacement with probability proportional to `estimate` (Efraimidis and Spirakis 2006). A pure function of the
    arguments. No scene waits for more than :func:`longest_wait` steps.

    Args:
        state: What is remembered.
        seed: Seed of the run.
        step: 0-based.
        number: Scenes wanted; if more than there are, all come as often as they fit.
        taken: See :func:`choose_uniform`.
        away: Scenes of other steps whose outcome is not known yet; they come again only if too few others are left.
        seen: Scenes at the head of the first pass that are known to be visited, so that nobody looks at them again.
    """
    count = len(state.visits)
    if not taken and number > count:
        return [*range(count), *choose_informative(state, seed, step, number - count)]
    closed = taken | away if count - len(taken | away) >= number else taken
    chosen = _unseen(state, seed, number, closed, seen)
    free = number - len(chosen)
    if free and not taken:
        first, last = math.floor(step * number * FLOOR), math.floor((step + 1) * number * FLOOR)
        turn = dict.fromkeys(scene_order(seed, position, count, 1)[0] for position in range(first, last))
        chosen += [s for s in turn if s not in chosen and s not in closed][:free]
    return chosen + weighted(seed, step, state.estimate, number - len(chosen), closed | set(chosen))


def _unseen(state: VisitState, seed: int, number: int, closed: Set[int], seen: int) -> list[int]:
    """The first `number` scenes of the first pass that were never visited and are not closed."""
    order = epoch_order(seed, 0, len(state.visits))
    found: list[int] = []
    for start in range(seen, len(order), BLOCK):
        block = order[start : start + BLOCK]
        found += [scene for scene in block[state.visits[block] == 0].tolist() if scene not in closed]
        if len(found) >= number:
            break
    return found[:number]


def longest_wait(count: int, number: int) -> int:
    """Steps within which :func:`choose_informative` surely visits each of `count` scenes again, `number` a step.

    A first pass over all scenes, then at most two rounds of the turn, of which a scene can be the first of one and the
    last of the next.
    """
    return math.ceil(count / number) + math.ceil((2 * count - 1) / (number * FLOOR)) + 1


class SceneVisits:
    """Chooses the scenes of each step and remembers what came of them. Steps may be chosen ahead, in other threads.

    Example::

        batch = visits.choose(step, 16)
        more = visits.choose(step, 4, taken=set(batch))
        visits.saw(step, batch + more, informative)

    Args:
        mode: One of `SCENE_VISITS`.
        count: Scenes there are, at least 1.
        seed: Seed of the run.

    Raises:
        ConfigError: `mode` does not exist.
    """

    def __init__(self, mode: str, count: int, seed: int) -> None:
        if mode not in SCENE_VISITS:
            raise ConfigError(f"rl.scene_visits = {mode!r} does not exist. {did_you_mean(mode, SCENE_VISITS)}")
        self.mode, self.count, self.seed = mode, count, seed
        self._memory = VisitState.fresh(count)
        self._seen = 0
        self._chosen: dict[int, list[int]] = {}
        self._lock = threading.Lock()

    def choose(self, step: int, number: int, taken: Set[int] = frozenset()) -> list[int]:
        """See :func:`choose_uniform` and :func:`choose_informative`."""
        if self.mode == "uniform":
            return choose_uniform(self.seed, step, self.count, number, taken)
        with self._lock:
            self._note_seen()
            away = {scene for other, scenes in self._chosen.items() if other != step for scene in scenes}
            chosen = choose_informative(self._memory, self.seed, step, number, taken, away=away, seen=self._seen)
            self._chosen[step] = [*taken, *chosen]
        return chosen

    def _note_seen(self) -> None:
        """Move on to the first scene of the first pass that was never visited; visits are never taken back."""
        order = epoch_order(self.seed, 0, self.count)
        while self._seen < self.count:
            unseen = np.flatnonzero(self._memory.visits[order[self._seen : self._seen + BLOCK]] == 0)
            self._seen = min(self._seen + (int(unseen[0]) if len(unseen) else BLOCK), self.count)
            if len(unseen):
                return

    def saw(self, step: int, scenes: Sequence[int], informative: Sequence[bool]) -> None:
        """See :meth:`VisitState.record`."""
        with self._lock:
            self._chosen.pop(step, None)
            self._memory.record(step, scenes, informative)

    def _copy(self) -> VisitState:
        """What is remembered now, whatever other threads note later."""
        with self._lock:
            return self._memory.recorded(0, [], [])

    def metrics(self, step: int) -> dict[str, float]:
        """After step `step`: scenes never visited, the estimate over the others, and the longest wait among them."""
        with self._lock:
            memory = self._memory
            seen = memory.visits > 0
            values = {"visits/unseen_frac": float(1.0 - seen.mean())}
            if seen.any():
                values["visits/estimate"] = float(memory.estimate[seen].mean())
                values["visits/longest_wait"] = float(step - memory.last[seen].min())
        return values

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, tensors by name, 24 bytes a scene."""
        memory = self._copy()
        arrays = {"estimate": memory.estimate, "visits": memory.visits, "last": memory.last}
        return {f"{TENSORS}{name}": torch.from_numpy(array) for name, array in arrays.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from what :meth:`state` gave, among other tensors; without it nothing changes.

        Raises:
            CheckpointError: It belongs to another number of scenes.
        """
        if f"{TENSORS}visits" in tensors:
            estimate, visits, last = (tensors[f"{TENSORS}{name}"].numpy() for name in ("estimate", "visits", "last"))
            self._restore(estimate.astype(np.float64), visits.astype(np.int64), last.astype(np.int64))

    def _restore(self, estimate: NDArray[np.float64], visits: NDArray[np.int64], last: NDArray[np.int64]) -> None:
        if len(visits) != self.count:
            raise CheckpointError(
                f"The checkpoint remembers visits of {len(visits)} scenes, but {self.count} are trained on. "
                "Resume with the scenes that the run started with."
            )
        self._memory, self._seen, self._chosen = VisitState(estimate, visits, last), 0, {}
