"""Scenes in Ray's object store: each is sent there once and fetched by the workers that need it."""

from __future__ import annotations

import hashlib
import itertools
import pickle
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rlhf_drive.scenes import Scene

__all__ = ["SceneReferences"]


@dataclass(frozen=True)
class _Kept:
    """A scene in the object store."""

    scene: weakref.ref[Scene]
    digest: bytes
    number: int
    reference: Any
    nbytes: int


class SceneReferences:
    """Scenes in Ray's object store, each put there once; the least recently used ones are let go."""

    def __init__(self, size: int, max_bytes: int, put: Callable[[bytes], Any]) -> None:
        """Keep at most `size` scenes and `max_bytes`; `put` stores bytes and returns a reference to them."""
        self._size, self._max_bytes, self._put = size, max_bytes, put
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._numbers = itertools.count()
        self.nbytes = 0
        """What is kept."""

    def get(self, scene: Scene) -> tuple[int, list[Any]]:
        """Number and reference of `scene`: those it had before if its token is known with the same content."""
        kept = self._kept.get(scene.token)
        if kept is None or kept.scene() is not scene:
            data = pickle.dumps(scene, protocol=pickle.HIGHEST_PROTOCOL)
            digest = hashlib.blake2b(data).digest()
            if kept is None or kept.digest != digest:
                self._drop(scene.token)
                kept = _Kept(weakref.ref(scene), digest, next(self._numbers), self._put(data), len(data))
                self._kept[scene.token] = kept
                self.nbytes += kept.nbytes
        self._kept.move_to_end(scene.token)
        while self._kept and (len(self._kept) > self._size or self.nbytes > self._max_bytes):
            self._drop(next(iter(self._kept)))
        return kept.number, [kept.reference]

    def _drop(self, token: str) -> None:
        kept = self._kept.pop(token, None)
        self.nbytes -= kept.nbytes if kept is not None else 0
