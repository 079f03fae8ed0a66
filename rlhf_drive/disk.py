"""Writing files so that a crash, a full disk or a second writer never leaves half of one; and saying so when it fails.

What is written is forced to the disk (`fsync`) before a rename puts it in its place, and the rename itself after it.
On a local file system a rename is atomic. On NFS it is atomic on the server, but another client may see the old name
for as long as its attribute cache lives, and a rename that is sent twice after a lost answer can report a failure
though it was done: let one machine write a run folder. `fsync` on NFS waits for the server, and is as good as its disk.
"""

from __future__ import annotations

import errno
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from rlhf_drive.errors import StorageError

__all__ = [
    "LineFile",
    "check_writable",
    "free_space",
    "open_durably",
    "remove_folder",
    "replace_folder",
    "restore_folder",
    "resume_command",
    "write_text",
    "writing",
]

RUN_FILES = ("recipe.yaml", "stages.json")
"""What every run folder holds."""
FULL = {errno.ENOSPC, errno.EDQUOT}
LOCKED = {errno.EROFS, errno.EACCES, errno.EPERM}
GONE = {errno.ENOENT, errno.ENOTDIR, errno.ESTALE}


@contextmanager
def writing(what: str, path: Path) -> Iterator[None]:
    """Within the block, a failure to write becomes one error that says what, where, how much is free and what to do.

    Args:
        what: What is written, such as ``"The checkpoint of step 20"``.
        path: File or folder that is written.

    Raises:
        StorageError: Disk or quota full, folder read-only or gone, or any other error of the file system.
    """
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        number = _error_number(error)
        if number is None:
            raise
        raise StorageError(_message(what, path, number)) from error


def _error_number(error: Exception) -> int | None:
    """`errno` of a file system's refusal; None for another kind of error."""
    if isinstance(error, OSError):
        return error.errno or 0
    if type(error).__name__ == "SafetensorError" and (found := re.search(r"os error (\d+)", str(error))):
        return int(found[1])
    return None


def _message(what: str, path: Path, number: int) -> str:
    if number in FULL:
        reason, remedy = "the disk or its quota is full", "Free space there"
    elif number in LOCKED:
        reason, remedy = f"it may not be written ({os.strerror(number)})", "Make it writable"
    elif number in GONE:
        reason, remedy = "the folder has vanished", "Bring it back"
    else:
        reason, remedy = os.strerror(number) if number else "the file system refused", "Mend that"
    command = resume_command(path)
    return (
        f"{what} could not be written to {path}: {reason}; {free_space(path)}. "
        f"{remedy}, then {f'go on with: {command}' if command else 'start again'}"
    )


def free_space(path: Path) -> str:
    """What is free on the disk of `path`, for a message."""
    try:
        usage = shutil.disk_usage(_existing(path))
    except OSError as error:
        return f"free space unknown ({error.strerror})"
    return f"{usage.free / 1e6:,.1f} MB of {usage.total / 1e6:,.0f} MB are free"


def resume_command(path: Path) -> str | None:
    """The command that goes on with the run whose folder `path` lies in; None if it lies in none."""
    for folder in (path, *path.parents):
        if all((folder / name).is_file() for name in RUN_FILES):
            return f"rlhf-drive train --resume {shlex.quote(str(folder))}"
    return None


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def check_writable(what: str, folder: Path) -> None:
    """Make the folder if need be, and write a file to it and remove it again.

    Raises:
        StorageError: That does not work; `what` begins the message.
    """
    with writing(what, folder):
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        try:
            with open_durably(probe) as file:
                file.write(b"rlhf-drive")
        finally:
            probe.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a file by `text` in one step, on disk when this returns. After a failure the old one is there."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open_durably(temporary) as file:
            file.write(text.encode())
        temporary.replace(path)
    except OSError:
        with suppress(OSError):  # one error is on its way already
            temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


@contextmanager
def open_durably(path: Path) -> Iterator[BinaryIO]:
    """A file to write, on disk when the block ends.

    Raises:
        OSError: Of the write that failed, also where a library in between reported another error.
    """
    with path.open("wb", buffering=0) as raw:
        file = _Remembering(raw)
        try:
            yield file  # type: ignore[misc]  # as much of a file as writers need
        except Exception:
            if file.error is not None:
                raise file.error from None
            raise
        os.fsync(raw.fileno())


class _Remembering:
    """Writes all that it is given, and remembers the error that it failed with: torch hides it behind its own."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        """Write everything: a disk that fills up takes a part, and refuses the rest."""
        view = memoryview(data).cast("B")
        done = 0
        try:
            while done < len(view):
                done += self._raw.write(view[done:])
        except OSError as error:
            self.error = error
            raise
        return done

    def flush(self) -> None:
        """Nothing waits here."""


class LineFile:
    """A file that grows by whole lines: after a failure it ends with the line before."""

    def __init__(self, path: Path) -> None:
        """Open it at its end; it is made if need be."""
        self._file = path.open("ab", buffering=0)

    def write(self, line: str) -> None:
        """Append a line; the system has it when this returns, so that a kill of the process does not lose it.

        Raises:
            OSError: It could not be written whole, or somebody has removed the file.
        """
        descriptor, data = self._file.fileno(), memoryview(f"{line}\n".encode())
        status = os.fstat(descriptor)
        if status.st_nlink == 0:  # a removed file takes writes without complaint
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError:
            with suppress(OSError):
                os.ftruncate(descriptor, status.st_size)
            raise

    def close(self) -> None:
        """Close it; nothing waits to be written."""
        self._file.close()


def replace_folder(temporary: Path, final: Path) -> None:
    """Put a finished folder in its place, on disk when this returns. A crash never leaves half a folder; between the
    two renames it leaves the old one under another name, which :func:`restore_folder` undoes. After an error the old
    one is in its place."""
    for path in (*sorted(temporary.rglob("*")), temporary):
        if path.is_dir():
            _sync_folder(path)
        else:
            _sync(path)
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.replace(old)
    try:
        temporary.replace(final)
    except OSError:
        restore_folder(final)
        raise
    _sync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def restore_folder(final: Path) -> None:
    """Bring back a folder that a crash inside :func:`replace_folder` left under its other name."""
    old = final.with_name(f".{final.name}.old")
    if old.exists() and not final.exists():
        old.replace(final)


def remove_folder(folder: Path) -> None:
    """Remove a folder so that a crash on the way leaves no half of it under its own name."""
    going = folder.with_name(f".{folder.name}.drop")
    shutil.rmtree(going, ignore_errors=True)
    shutil.rmtree(folder.replace(going))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    """Force the folder's names to disk; some file systems do not offer that for folders."""
    try:
        _sync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
