"""The cache of prepared scenes: what is kept, what is dropped, and how much memory that is."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from rewards.pdm_closed import attach_references
from rewards.prepare import prepare_scene
from rewards.prepared_scenes import PreparedScenes, memory_of
from rlhf_drive.scenes import Scene
from rlhf_drive.scenes.generator import generate_scenes

MB = 1_000_000


def make_scene(token: str, size: int = 4) -> Scene:
    """As much of a scene as the cache looks at."""
    return SimpleNamespace(token=token, reference=SimpleNamespace(values=np.arange(float(size))))  # type: ignore[return-value]


class Counting:
    """Prepares arrays of so many bytes, and counts."""

    def __init__(self, nbytes: int = 8, meet: threading.Barrier | None = None) -> None:
        self.nbytes = nbytes
        self.meet = meet
        self.tokens: list[str] = []

    def __call__(self, token: str, reference: Any) -> NDArray[np.float64]:
        self.tokens.append(token)
        if self.meet is not None:
            self.meet.wait()
            time.sleep(0.05)
        return np.full(self.nbytes // 8, reference.values.sum())


def test_least_recently_used_scene_is_dropped() -> None:
    cache, prepare = PreparedScenes(2, 100 * MB), Counting()
    for token in "abacab":  # c drops b, used before a, so b is prepared again
        cache.get(make_scene(token), prepare)
    assert prepare.tokens == ["a", "b", "c", "b"]
    assert (len(cache), cache.prepared) == (2, 4)


def test_memory_is_limited_and_flat() -> None:
    cache, prepare = PreparedScenes(1000, 10 * MB), Counting(nbytes=3 * MB)
    sizes = []
    for i in range(20):
        cache.get(make_scene(str(i)), prepare)
        sizes.append((len(cache), round(cache.nbytes / MB, 1)))
    assert sizes[:4] == [(1, 3.0), (2, 6.0), (3, 9.0), (3, 9.0)]
    assert set(sizes[3:]) == {(3, 9.0)}
    assert cache.get(make_scene("19"), prepare)[0] == 6.0
    assert cache.prepared == 20


@pytest.mark.parametrize("limits", [(0, 100 * MB), (10, 0), (10, 2 * MB)])
def test_scene_beyond_the_limits_is_prepared_but_not_kept(limits: tuple[int, int]) -> None:
    cache, prepare = PreparedScenes(*limits), Counting(nbytes=3 * MB)
    for _ in range(2):
        assert cache.get(make_scene("a"), prepare)[0] == 6.0
    assert (cache.prepared, len(cache), cache.nbytes) == (2, 0, 0)


def test_scene_of_the_same_token_takes_the_place_of_the_other() -> None:
    cache, prepare = PreparedScenes(10, 100 * MB), Counting(nbytes=3 * MB)
    assert cache.get(make_scene("a", 4), prepare)[0] == 6.0
    assert cache.get(make_scene("a", 5), prepare)[0] == 10.0
    assert (len(cache), round(cache.nbytes / MB, 1)) == (1, 3.0)


def test_equal_references_are_one_scene_whatever_object_they_are() -> None:
    cache, prepare = PreparedScenes(10, 100 * MB), Counting()
    assert cache.get(make_scene("a"), prepare) is cache.get(make_scene("a"), prepare)
    assert prepare.tokens == ["a"]


def test_threads_that_want_the_same_scene_wait_for_the_first() -> None:
    cache, prepare = PreparedScenes(10, 100 * MB), Counting(meet=threading.Barrier(2, timeout=10.0))  # a beside b
    found: list[Any] = []
    threads = [
        threading.Thread(target=lambda token=token: found.append(cache.get(make_scene(token), prepare)))  # type: ignore[misc]
        for token in "aaaab"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(prepare.tokens) == ["a", "b"]
    assert len({id(item) for item in found}) == 2
    assert cache._making == {}


def test_scene_that_cannot_be_prepared_is_not_kept_and_blocks_nobody() -> None:
    cache = PreparedScenes(10, 100 * MB)

    def failing(token: str, reference: Any) -> Any:
        raise ValueError(token)

    for _ in range(2):
        with pytest.raises(ValueError, match="a"):
            cache.get(make_scene("a"), failing)
    assert cache.get(make_scene("a"), Counting())[0] == 6.0
    assert (cache.prepared, cache._making) == (1, {})


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclass
class Record:
    array: Any


def test_memory_of_counts_each_array_once_wherever_it_lies() -> None:
    array = np.zeros(MB // 8)
    for holder in ([array], Pair(array, array[::2]), {"x": {"y": array}}, Record(array), Record(Pair([array], None))):
        assert 0 <= memory_of(holder) - MB < 2000, holder
    assert 0 <= memory_of(array, Record(array)) - MB < 2000
    assert memory_of(np.zeros(MB // 8)[:1]) >= MB  # a view keeps all of its base alive
    assert memory_of(np.array([array, None], dtype=object)) >= MB


def test_memory_of_what_holds_itself_ends() -> None:
    ring: list[Any] = [np.zeros(1000)]
    ring.append(ring)
    assert 8000 <= memory_of(ring) < 9000
    assert memory_of(np, len, Record) == 0


def test_prepared_scene_weighs_what_its_arrays_do() -> None:
    scene = attach_references(next(iter(generate_scenes(1, seed=3))))
    prepared = prepare_scene(scene.reference)
    arrays: dict[int, int] = {}
    for part in (*prepared.road, *prepared.road.polygons, *prepared.agents, prepared.ego_init, prepared.origin):
        if isinstance(part, np.ndarray):
            root = part.base if isinstance(part.base, np.ndarray) else part
            arrays[id(root)] = root.nbytes
    assert sum(arrays.values()) <= memory_of(prepared) < sum(arrays.values()) + 20_000
    assert memory_of(prepared) < 2 * MB
