"""The scenes that were scored last, prepared: a policy meets a training scene again and again."""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf_drive.scenes import Scene, SceneReference

__all__ = ["PreparedScenes", "memory_of"]


@dataclass(frozen=True)
class _Entry:
    """One prepared scene and what it was prepared from."""

    reference: SceneReference
    prepared: Any
    nbytes: int


class PreparedScenes:
    """Least-recently-used cache of prepared scenes by token; threads may share it."""

    def __init__(self, size: int, max_bytes: int) -> None:
        """Keep at most `size` scenes of `max_bytes` together, measured by :func:`memory_of`; 0 keeps none."""
        self._size = size
        self._max_bytes = max_bytes
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._making: dict[str, tuple[threading.Lock, int]] = {}
        self._lock = threading.Lock()
        self.prepared = 0
        """How often a scene had to be prepared."""
        self.nbytes = 0
        """Memory of the scenes that are kept, with the references they were made from."""

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, scene: Scene, prepare: Callable[[str, SceneReference], Any]) -> Any:
        """`scene` prepared, from the cache where its token is there with the same reference, number by number.

        Threads that ask for the same token at once wait for the first of them.

        Raises:
            Exception: Whatever `prepare` raises; nothing is kept then.
        """
        found = self._find(scene)
        if found is not None:
            return found.prepared
        with self._lock:
            lock, waiting = self._making.get(scene.token, (threading.Lock(), 0))
            self._making[scene.token] = (lock, waiting + 1)
        try:
            with lock:
                found = self._find(scene)
                return found.prepared if found is not None else self._make(scene, prepare)
        finally:
            with self._lock:
                lock, waiting = self._making.pop(scene.token)
                if waiting > 1:
                    self._making[scene.token] = (lock, waiting - 1)

    def _find(self, scene: Scene) -> _Entry | None:
        with self._lock:
            entry = self._entries.get(scene.token)
            if entry is not None:
                self._entries.move_to_end(scene.token)
        return entry if entry is not None and _same_reference(entry.reference, scene.reference) else None

    def _make(self, scene: Scene, prepare: Callable[[str, SceneReference], Any]) -> Any:
        prepared = prepare(scene.token, scene.reference)
        entry = _Entry(scene.reference, prepared, memory_of(prepared, scene.reference))
        with self._lock:
            self.prepared += 1
            self._drop(scene.token)
            self._entries[scene.token] = entry
            self.nbytes += entry.nbytes
            while self._entries and (len(self._entries) > self._size or self.nbytes > self._max_bytes):
                self._drop(next(iter(self._entries)))
        return prepared

    def _drop(self, token: str) -> None:
        entry = self._entries.pop(token, None)
        self.nbytes -= entry.nbytes if entry is not None else 0


def memory_of(*objects: Any) -> int:
    """Bytes that `objects` hold together: the arrays in them, views counted as what they keep alive, each once.

    Looks into mappings, sequences, sets and the attributes of other objects, but not into modules, classes and
    functions.
    """
    total, seen, todo = 0, set[int](), list(objects)
    while todo:
        item = todo.pop()
        while isinstance(item, np.ndarray) and isinstance(item.base, np.ndarray):
            item = item.base
        if id(item) in seen or isinstance(item, type(sys)) or callable(item):
            continue
        seen.add(id(item))
        total += item.nbytes if isinstance(item, np.ndarray) else sys.getsizeof(item, 0)
        if isinstance(item, Mapping):
            todo += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple, Set)) or (isinstance(item, np.ndarray) and item.dtype == object):
            todo += list(item.flat) if isinstance(item, np.ndarray) else list(item)
        elif hasattr(item, "__dict__"):
            todo += vars(item).values()
    return total


def _same_reference(old: SceneReference, new: SceneReference) -> bool:
    """Whether two references hold the same numbers."""
    return old is new or all(
        np.array_equal(value, getattr(new, name), equal_nan=name == "speed_limit") for name, value in vars(old).items()
    )
