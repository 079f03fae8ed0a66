"""What was used last, within a bound: the one cache of scenes and of what is made from them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

__all__ = ["RecentlyUsed"]

V = TypeVar("V")


class RecentlyUsed(Generic[V]):
    """The values that were used last, by key, of `capacity` together; threads may share it.

    Picklable where `size_of` is; the copy is empty, since another process fills its own.

    Example::

        recent = RecentlyUsed(1024)
        scene = recent.get(row, lambda: store[row])

    Args:
        capacity: Sum of the sizes that are kept; 0 keeps nothing.
        size_of: Size of a value, at least 1; without it each counts as one.
    """

    def __init__(self, capacity: int, size_of: Callable[[V], int] | None = None) -> None:
        self.capacity = capacity
        self.size = 0
        """Sum of the sizes of what is there."""
        self._size_of = size_of
        self._values: OrderedDict[Hashable, tuple[V, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Hashable, make: Callable[[], V]) -> V:
        """The value of `key`, made if it is not there. Threads may make it at once; all get the same object.

        Raises:
            Exception: Whatever `make` raises; nothing is kept then.
        """
        with self._lock:
            if (found := self._values.get(key)) is not None:
                self._values.move_to_end(key)
                return found[0]
        made = make()
        size = self._size_of(made) if self._size_of else 1
        with self._lock:
            if (found := self._values.get(key)) is not None:
                return found[0]
            if size <= self.capacity:
                self._values[key] = (made, size)
                self.size += size
            while self.size > self.capacity:
                self.size -= self._values.popitem(last=False)[1][1]
        return made

    def __getstate__(self) -> dict[str, Any]:
        return {"capacity": self.capacity, "size_of": self._size_of}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]
