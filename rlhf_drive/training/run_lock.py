"""One process at a time works in a run folder."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf_drive.errors import ConfigError

__all__ = ["LOCK_FILE", "run_lock"]

LOCK_FILE = ".lock"
"""In the run folder. It stays there: who removes a lock file lets two in."""
_held: set[int] = set()


def _close_in_child() -> None:
    """A forked child would keep its parent's lock for as long as it lives."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


@contextmanager
def run_lock(folder: Path) -> Iterator[bool]:
    """Hold the folder's lock within the block; the kernel releases it when the process ends, however it ends.

    `flock` on a file. Linux's NFS client turns it into a lock on the server, which holds between machines where the
    server's lock service runs; where it does not, or on a file system without locks, nothing is locked.

    Returns:
        Whether the folder is locked: False where its file system knows no locks.

    Raises:
        ConfigError: Another process holds it; the message names it.
    """
    descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    _held.add(descriptor)
    try:
        locked = _take(descriptor, folder)
        if locked:
            holder = json.dumps({"pid": os.getpid(), "host": socket.gethostname()})
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, holder.encode() + b"\n", 0)
        yield locked
    finally:
        _held.discard(descriptor)
        os.close(descriptor)


def _take(descriptor: int, folder: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(
            f"Another process works in {folder}: {_holder(descriptor)}. Wait for it or stop it; two of them would "
            "overwrite each other's checkpoints."
        ) from None
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
            return False
        raise
    return True


def _holder(descriptor: int) -> str:
    try:
        found = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {found['pid']} on {found['host']}"
    except (OSError, ValueError, KeyError, TypeError):  # it has the lock and has not written its name yet
        return "it has not said which"
