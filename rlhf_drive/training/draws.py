"""Keyed draws of a few scenes out of many: all alike, or by weight, without replacement.

Up to `LARGE` scenes every scene gets a random number and the first ones by it are drawn. For more, scenes are drawn one
by one, and those that are there already are passed over: the same law, in a time that does not grow with their number.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Set

import numpy as np
from numpy.typing import NDArray

__all__ = ["LARGE", "LEAST", "further", "weighted"]

LARGE = 2**18
"""Scenes above which they are drawn one by one; both ways take about as long there."""
LEAST = 1e-6
"""Smallest weight: scenes that never differ still have an order among them."""
EXTRA, WEIGHTED = 1, 2
"""Purposes that random numbers are keyed by, beside seed and step. All calls of a step share them: further scenes are
those that a longer draw would have given."""
BLOCK, BLOCKS = 512, 512
"""Draws at once, and how often before every scene gets its number after all, because hardly one has any weight."""


def further(seed: int, step: int, count: int, number: int, taken: Set[int]) -> list[int]:
    """At most `number` of `count` scenes, all alike, that are not among those taken.

    The same (seed, step) continues the same draw: what a longer one would have given comes next.
    """
    generator = _generator(seed, step, EXTRA)
    if count <= LARGE or 2 * (number + len(taken)) > count:
        order = generator.permutation(count)[: number + len(taken)].tolist()
        return [scene for scene in order if scene not in taken][:number]
    return _first((generator.integers(count, size=BLOCK) for _ in itertools.count()), number, taken)


def weighted(seed: int, step: int, estimate: NDArray[np.float64], number: int, taken: Set[int]) -> list[int]:
    """At most `number` scenes that are not taken, one after the other with probability in proportion to `estimate`.

    Exponential keys ``log(u) / estimate``, the largest of which win (Efraimidis and Spirakis 2006), or for many scenes
    rejection: one drawn from all is kept with probability `estimate`, which must lie in 0..1.
    """
    if number <= 0:
        return []
    count, chosen = len(estimate), list[int]()
    if count > LARGE:
        generator = _generator(seed, step, WEIGHTED)
        chosen = _first((_accepted(generator, estimate) for _ in range(BLOCKS)), number, taken)
    if len(chosen) == number:
        return chosen
    open_ = np.ones(count, dtype=np.bool_)
    open_[[*taken, *chosen]] = False
    rest, wanted = np.flatnonzero(open_), number - len(chosen)
    keys = -np.log1p(-_generator(seed, step, WEIGHTED).random(count)[rest]) / np.maximum(estimate[rest], LEAST)
    if wanted < len(rest):  # sort only those that can win; ties at the end stay in the order of the scenes
        smallest = np.flatnonzero(keys <= np.partition(keys, wanted - 1)[wanted - 1])
        rest, keys = rest[smallest], keys[smallest]
    drawn: list[int] = rest[np.argsort(keys, kind="stable")][:wanted].tolist()
    return chosen + drawn


def _accepted(generator: np.random.Generator, estimate: NDArray[np.float64]) -> NDArray[np.int64]:
    index = generator.integers(len(estimate), size=BLOCK)
    return index[generator.random(BLOCK) < np.maximum(estimate[index], LEAST)]


def _first(blocks: Iterator[NDArray[np.int64]], number: int, taken: Set[int]) -> list[int]:
    """The first `number` different scenes of a stream that are not taken, or fewer where it ends."""
    found: dict[int, None] = {}
    for block in blocks:
        found |= dict.fromkeys(scene for scene in block.tolist() if scene not in taken)
        if len(found) >= number:
            break
    return list(found)[:number]


def _generator(seed: int, step: int, purpose: int) -> np.random.Generator:
    """Keyed as `scene_order` is, but far away in the counter, so that no number serves twice."""
    return np.random.Generator(np.random.Philox(key=[seed, step], counter=[0, 0, 0, purpose]))
