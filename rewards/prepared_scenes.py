"""The scenes that were scored last, prepared: a policy meets a training scene again and again."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np

from rlhf_drive.scenes import Scene, SceneReference

__all__ = ["PreparedScenes"]


class PreparedScenes:
    """Least-recently-used cache of prepared scenes by token; threads may share it."""

    def __init__(self, size: int) -> None:
        """Keep at most `size` scenes."""
        self._size = size
        self._entries: OrderedDict[str, tuple[SceneReference, Any]] = OrderedDict()
        self._lock = threading.Lock()
        self.prepared = 0
        """How often a scene had to be prepared."""

    def get(self, scene: Scene, prepare: Callable[[str, SceneReference], Any]) -> Any:
        """`scene` prepared, from the cache where its token is there with the same reference, number by number.

        Raises:
            Exception: Whatever `prepare` raises; nothing is kept then.
        """
        with self._lock:
            entry = self._entries.get(scene.token)
            if entry is not None:
                self._entries.move_to_end(scene.token)
        if entry is not None and _same_reference(entry[0], scene.reference):
            return entry[1]
        prepared = prepare(scene.token, scene.reference)
        with self._lock:
            self.prepared += 1
            self._entries[scene.token] = (scene.reference, prepared)
            self._entries.move_to_end(scene.token)
            while len(self._entries) > self._size:
                self._entries.popitem(last=False)
        return prepared


def _same_reference(old: SceneReference, new: SceneReference) -> bool:
    """Whether two references hold the same numbers."""
    return old is new or all(
        np.array_equal(value, getattr(new, name), equal_nan=name == "speed_limit") for name, value in vars(old).items()
    )
