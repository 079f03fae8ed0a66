"""Every byte of a store is compared with its checksum once; a note beside the shards spares later starts the reading.

The note holds, for each shard, its checksum and what the file system said of it when it was read: length, times of the
last change of content and of the entry, and number. Whatever writes to the file, or copies it, changes one of them, and
the shard is read again. What no file system reports, a bit that flips on the disk, is not noticed a second time: remove
the note to have everything read anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rlhf_drive.scenes.manifest import Shard, check_bytes

__all__ = ["NOTE_NAME", "Progress", "is_note", "note_paths", "verify_shards"]

Progress = Callable[[int, int, str], None]
"""``on_progress(done, total, text)``."""
NOTE_NAME = "verified.json"
"""The note beside the shards."""
SETTLED_S = 60.0
"""A file that changed less than this ago is not noted: a further change could fall into the same tick of the clock, or
the clocks of this machine and of the disk's may differ."""
NOTE_EVERY_S = 20.0
"""Time after which what was verified is noted on the way, so that a start that is ended goes on where it was."""
THREADS = 8

_Entry = tuple[str, int, int, int, int]


def verify_shards(folder: Path, shards: Sequence[Shard], on_progress: Progress | None = None) -> None:
    """Compare the SHA-256 of every shard that no note vouches for, several at once, and note those that are right.

    Args:
        folder: The store. Where it cannot be written to, the note goes to the user's cache folder.
        shards: Its files, of the right sizes.
        on_progress: Called after each file as ``on_progress(files_done, files, text)``.

    Raises:
        DataError: A shard is altered; the first one in the store's order is named.
    """
    known = _read_notes(folder)
    todo = [shard for shard in shards if known.get(shard.file) != _entry(folder, shard)]
    if not todo:
        return
    found = {shard.file: known[shard.file] for shard in shards if shard.file in known and shard not in todo}
    kept, noted = len(found), time.monotonic()
    pool = ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1))
    try:
        for done, entry in enumerate(pool.map(lambda shard: _checked(folder, shard), todo), start=1):
            if entry is not None:
                found[todo[done - 1].file] = entry
            if on_progress is not None:
                on_progress(done, len(todo), f"verifying {todo[done - 1].file}")
            if time.monotonic() - noted > NOTE_EVERY_S and len(found) > kept:
                _write_note(folder, found)
                kept, noted = len(found), time.monotonic()
    finally:
        pool.shutdown(cancel_futures=True)
        if len(found) > kept:
            _write_note(folder, found)


def is_note(name: str) -> bool:
    """Whether a file of this name in a store is a note, or one half written."""
    return name == NOTE_NAME or name.startswith(f".{NOTE_NAME}.")


def note_paths(folder: Path) -> tuple[Path, Path]:
    """Where a store's note may lie: beside its shards, or in the user's cache folder under the store's own name."""
    name = hashlib.blake2b(str(folder.resolve()).encode(), digest_size=16).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return folder / NOTE_NAME, cache / "rlhf-drive" / "verified" / f"{name}.json"


def _entry(folder: Path, shard: Shard) -> _Entry:
    """What tells this file from any other, and from itself after a change."""
    stat = (folder / shard.file).stat()
    return shard.sha256, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def _checked(folder: Path, shard: Shard) -> _Entry | None:
    """Read the shard and compare; its entry, or None where the file changed too shortly ago to be noted."""
    entry, now = _entry(folder, shard), time.time()
    check_bytes(folder, shard)
    return entry if now - max(entry[2:4]) / 1e9 > SETTLED_S else None


def _read_notes(folder: Path) -> dict[str, _Entry]:
    """Entries by file; a note that cannot be read vouches for nothing."""
    found: dict[str, _Entry] = {}
    for path in reversed(note_paths(folder)):
        try:
            shards = json.loads(path.read_text(encoding="utf-8"))["shards"]
            found |= {str(file): (str(e[0]), int(e[1]), int(e[2]), int(e[3]), int(e[4])) for file, e in shards.items()}
        except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
            continue
    return found


def _write_note(folder: Path, entries: dict[str, _Entry]) -> None:
    """Replace the note in one rename. Without a place for it the next start reads everything again, which is logged."""
    text = json.dumps({"about": "shards whose SHA-256 was compared", "shards": entries}, indent=0) + "\n"
    beside, cached = note_paths(folder)
    try:
        _replace(beside, text)
    except OSError:
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            _replace(cached, text)
        except OSError as error:
            logging.getLogger(__name__).warning(
                "%s was verified, but that can be noted neither there nor at %s (%s): the next start reads all of it "
                "again. Give one of them write permission, or set XDG_CACHE_HOME.", folder, cached, error,
            )  # fmt: skip


def _replace(path: Path, text: str) -> None:
    number, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(number, "w", encoding="utf-8") as file:
            file.write(text)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise
