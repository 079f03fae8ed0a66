"""Which scenes a step visits: all alike, or those whose groups still differ more often.

A group whose plans all earn the same teaches nothing (2503.14476, section 3.2). Whether a scene's group will differ
can be told from its last visits. Still every scene must come back: the policy changes, and with it what it can learn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from rlhf_drive.errors import CheckpointError, ConfigError, did_you_mean
from rlhf_drive.training.schedule import scene_order

__all__ = ["FLOOR", "SCENE_VISITS", "SceneVisits", "VisitState", "choose_informative", "choose_uniform", "longest_wait"]

VisitMode = Literal["uniform", "informative"]
SCENE_VISITS: tuple[str, ...] = get_args(VisitMode)

FLOOR = 0.25
"""Share of visits that go round all scenes, whatever is known of them."""
RATE = 0.3
"""Weight of the newest visit in a scene's estimate: after two visits half of the old estimate is forgotten."""
LEAST = 1e-6
"""Smallest weight: scenes that never differ still have an order among them."""
EXTRA, WEIGHTED = 1, 2
"""Purposes that random numbers are keyed by, beside seed and step. All calls of a step share them: further scenes are
those that a longer draw would have given."""


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
        estimate, visits, last = self.estimate.copy(), self.visits.copy(), self.last.copy()
        for scene, differed in zip(scenes, informative, strict=True):
            estimate[scene] += RATE * (float(differed) - estimate[scene])
            visits[scene] += 1
            last[scene] = step
        return VisitState(estimate, visits, last)


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
    order = _generator(seed, step, EXTRA).permutation(count).tolist()
    return [scene for scene in order if scene not in taken][:number]


def choose_informative(
    state: VisitState, seed: int, step: int, number: int, taken: Set[int] = frozenset()
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
    """
    count = len(state.visits)
    if not taken and number > count:
        return [*range(count), *choose_informative(state, seed, step, number - count)]
    open_ = np.ones(count, dtype=np.bool_)
    open_[list(taken)] = False
    order = np.array(scene_order(seed, 0, count, count)) if (state.visits == 0).any() else np.zeros(0, np.int64)
    chosen: list[int] = order[(open_ & (state.visits == 0))[order]][:number].tolist()
    free = number - len(chosen)
    if free and not taken:
        first, last = math.floor(step * number * FLOOR), math.floor((step + 1) * number * FLOOR)
        turn = dict.fromkeys(scene_order(seed, position, count, 1)[0] for position in range(first, last))
        chosen += [s for s in turn if s not in chosen][:free]
    open_[chosen] = False
    rest = np.flatnonzero(open_)
    weight = np.maximum(state.estimate[rest], LEAST)
    keys = np.log1p(-_generator(seed, step, WEIGHTED).random(count)[rest]) / weight
    drawn: list[int] = rest[np.argsort(-keys, kind="stable")][: number - len(chosen)].tolist()
    return chosen + drawn


def longest_wait(count: int, number: int) -> int:
    """Steps within which :func:`choose_informative` surely visits each of `count` scenes again, `number` a step.

    A first pass over all scenes, then at most two rounds of the turn, of which a scene can be the first of one and the
    last of the next.
    """
    return math.ceil(count / number) + math.ceil((2 * count - 1) / (number * FLOOR)) + 1


def _generator(seed: int, step: int, purpose: int) -> np.random.Generator:
    """Keyed as `scene_order` is, but far away in the counter, so that no number serves twice."""
    return np.random.Generator(np.random.Philox(key=[seed, step], counter=[0, 0, 0, purpose]))


class SceneVisits:
    """Chooses the scenes of each step and remembers what came of them.

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

    def choose(self, step: int, number: int, taken: Set[int] = frozenset()) -> list[int]:
        """See :func:`choose_uniform` and :func:`choose_informative`."""
        if self.mode == "uniform":
            return choose_uniform(self.seed, step, self.count, number, taken)
        return choose_informative(self._memory, self.seed, step, number, taken)

    def saw(self, step: int, scenes: Sequence[int], informative: Sequence[bool]) -> None:
        """See :meth:`VisitState.recorded`."""
        self._memory = self._memory.recorded(step, scenes, informative)

    def metrics(self, step: int) -> dict[str, float]:
        """After step `step`: scenes never visited, the estimate over the others, and the longest wait among them."""
        memory = self._memory
        seen = memory.visits > 0
        values = {"visits/unseen_frac": float(1.0 - seen.mean())}
        if seen.any():
            values["visits/estimate"] = float(memory.estimate[seen].mean())
            values["visits/longest_wait"] = float(step - memory.last[seen].min())
        return values

    def state(self) -> dict[str, list[float] | list[int]]:
        """What a checkpoint keeps, as plain JSON data; floats survive JSON to the bit."""
        memory = self._memory
        return {
            "estimate": memory.estimate.tolist(),
            "visits": memory.visits.tolist(),
            "last": memory.last.tolist(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state` gave; an empty mapping is a fresh start.

        Raises:
            CheckpointError: It belongs to another number of scenes.
        """
        if not state:
            return
        if len(state["visits"]) != self.count:
            raise CheckpointError(
                f"The checkpoint remembers visits of {len(state['visits'])} scenes, but {self.count} are trained on. "
                "Resume with the scenes that the run started with."
            )
        self._memory = VisitState(
            np.array(state["estimate"], np.float64), np.array(state["visits"], np.int64),
            np.array(state["last"], np.int64),
        )  # fmt: skip
