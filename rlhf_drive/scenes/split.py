"""Scenes as a sequence that reads each one when asked for, and what can be said of all of them without reading any."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, SupportsIndex, overload

import numpy as np
from numpy.typing import NDArray

from rlhf_drive.scenes.model import Scene
from rlhf_drive.scenes.recently_used import RecentlyUsed

__all__ = ["SceneColumns", "SceneSplit", "clusters_of", "human_known", "previous_gaps_us"]

KEPT = 1024
"""Decoded scenes that a split remembers: all of a small store, and a step's of a large one. Most of a scene's arrays
are views of the mapped file, so that one costs about 15 kB of memory."""


class SceneColumns(Protocol):
    """What a split needs of the store it belongs to."""

    def __getitem__(self, index: int) -> Scene:
        """Scene at `index`."""
        ...

    def texts(self, name: str) -> tuple[str, ...]:
        """A text column of all scenes."""
        ...

    def numbers(self, name: str) -> NDArray[np.int64]:
        """A column of integers of all scenes."""
        ...

    def lengths(self, name: str) -> NDArray[np.int64]:
        """How many numbers an array column holds of each scene."""
        ...


class SceneSplit(Sequence[Scene]):
    """Some scenes of a store, in order. Memory does not grow with their number, nor with how often they are read.

    Indexed as a list is: ``split[3]``, ``split[-1]``; ``split[4:8]`` is a list of scenes. Going over all scenes keeps
    none of them. Picklable (8 bytes a scene, and the path of the store, which the other process reads itself); threads
    may share it.

    Args:
        store: Where the scenes are.
        rows: Their positions in it.
        kept: Decoded scenes that are remembered, those used last.
    """

    def __init__(self, store: SceneColumns, rows: NDArray[np.int64], *, kept: int = KEPT) -> None:
        self._store, self._rows = store, rows
        self._recent: RecentlyUsed[Scene] = RecentlyUsed(kept)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: SupportsIndex) -> Scene: ...
    @overload
    def __getitem__(self, index: slice) -> list[Scene]: ...
    def __getitem__(self, index: SupportsIndex | slice) -> Scene | list[Scene]:
        """One scene, or those of a slice.

        Raises:
            IndexError: There is no such scene.
        """
        if isinstance(index, slice):
            return [self._scene(row) for row in self._rows[index].tolist()]
        position = operator.index(index)
        if not -len(self) <= position < len(self):
            raise IndexError(f"Scene {position} of {len(self)}.")
        return self._scene(int(self._rows[position]))

    def __iter__(self) -> Iterator[Scene]:
        read = self._scene if len(self) <= self._recent.capacity else self._store.__getitem__
        return (read(int(row)) for row in self._rows)

    def __repr__(self) -> str:
        return f"SceneSplit({len(self)} scenes of {getattr(self._store, 'path', self._store)})"

    def _scene(self, row: int) -> Scene:
        return self._recent.get(row, lambda: self._store[row])

    def subset(self, chosen: NDArray[np.bool_] | NDArray[np.int64] | Sequence[int]) -> SceneSplit:
        """The scenes at these positions, or where a mask is true; none of them is read."""
        where = np.asarray(chosen) if len(chosen) else np.zeros(0, np.int64)
        return SceneSplit(self._store, self._rows[where], kept=self._recent.capacity)

    @property
    def tokens(self) -> tuple[str, ...]:
        """Token of every scene; read at each call."""
        return self._texts("token")

    @property
    def kinds(self) -> tuple[str, ...]:
        """Situation kind of every scene; read at each call."""
        return self._texts("kind")

    @property
    def clusters(self) -> tuple[str, ...]:
        """Cluster of every scene; read at each call."""
        return self._texts("cluster")

    @property
    def human_known(self) -> NDArray[np.bool_]:
        """``[S]`` whether the scene holds what the human drove."""
        return (self._store.lengths("ref_human_poses") > 0)[self._rows]

    @property
    def previous_gaps_us(self) -> NDArray[np.int64]:
        """``[S]`` time since the previous frame, microseconds; -1 where the ego's state in it is not known."""
        gaps = self._store.numbers("ref_t0_us") - self._store.numbers("ref_prev_t0_us")
        return np.where(self._store.lengths("ref_prev_ego_init") > 0, gaps, -1)[self._rows]

    def _texts(self, name: str) -> tuple[str, ...]:
        values = self._store.texts(name)
        return tuple(values[row] for row in self._rows)


def clusters_of(scenes: Iterable[Scene]) -> Iterable[str]:
    """Cluster of each scene; those of a :class:`SceneSplit` are not read for it."""
    return scenes.clusters if isinstance(scenes, SceneSplit) else (scene.cluster for scene in scenes)


def human_known(scenes: Sequence[Scene]) -> NDArray[np.bool_]:
    """``[S]`` whether each scene holds what the human drove; those of a :class:`SceneSplit` are not read for it."""
    if isinstance(scenes, SceneSplit):
        return scenes.human_known
    return np.array([len(scene.reference.human_poses) > 0 for scene in scenes], dtype=np.bool_)


def previous_gaps_us(scenes: Sequence[Scene]) -> NDArray[np.int64]:
    """``[S]`` time since each scene's previous frame, microseconds; -1 where the ego's state in it is not known.

    Those of a :class:`SceneSplit` are not read for it.
    """
    if isinstance(scenes, SceneSplit):
        return scenes.previous_gaps_us
    references = [scene.reference for scene in scenes]
    return np.array([r.t0_us - r.prev_t0_us if len(r.prev_ego_init) else -1 for r in references], dtype=np.int64)
