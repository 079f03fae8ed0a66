"""The processes that train together, as far as plain values go between them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from rlhf_drive.errors import TrainingError

__all__ = ["RankLostError", "Ranks"]

T = TypeVar("T")


class RankLostError(TrainingError):
    """A process waited for another in vain: what is wrong is that one's to say."""


class Ranks:
    """This process among those that were launched together; alone, all methods give back what they get.

    Values travel pickled, between processes of one run, over a CPU group of their own: gradients and weights do not go
    this way. Every method but the properties must be called by all processes, in the same order.

    Example:
        >>> Ranks().gather("here")
        ['here']
    """

    def __init__(self, timeout_s: float = 1800.0) -> None:
        """Join the group that `torch.distributed` knows, if it was started.

        Args:
            timeout_s: A call that waits for longer for the others ends with an error.

        Raises:
            RankLostError: In methods that wait for the others: they did not come.
        """
        launched = dist.is_available() and dist.is_initialized()
        self.index = dist.get_rank() if launched else 0
        """Number of this process, 0-based."""
        self.count = dist.get_world_size() if launched else 1
        """Processes."""
        self.timeout_s = timeout_s
        self._group: Any = None
        if self.count > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))

    @property
    def main(self) -> bool:
        """Whether this process writes files, talks to the terminal and owns services."""
        return self.index == 0

    def gather(self, value: T) -> list[T]:
        """Everybody's value, in the order of the processes, on every process."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        with self._waiting():
            dist.all_gather_object(found, value, group=self._group)
        return found

    def first(self, value: T) -> T:
        """The main process's value; what the others pass does not count."""
        if self.count == 1:
            return value
        box: list[Any] = [value if self.main else None]
        with self._waiting():
            dist.broadcast_object_list(box, src=0, group=self._group)
        found: T = box[0]
        return found

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """Says who waited for whom where the others do not come."""
        try:
            yield
        except RuntimeError as error:
            raise RankLostError(
                f"Rank {self.index} of {self.count} processes waited for the others, at most {self.timeout_s:g} s, and "
                f"not all of them came ({error}). One has ended or hangs: its own message says why. If it is only "
                "slow, raise parallel.timeout_s."
            ) from error

    def any(self, flag: bool) -> bool:
        """Whether it holds on any process."""
        return any(self.gather(flag))

    def wait(self) -> None:
        """Until all processes are here."""
        self.gather(None)
