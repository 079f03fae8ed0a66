"""Record batches of a store's Arrow files, found once and mapped when they are read: memory does not grow with use.

A shard is an Arrow stream. Opening walks over its messages and notes where each record batch begins; reading a scene
later maps the file, decodes that one batch, which copies nothing, and forgets it when others were used since.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf_drive.errors import DataError
from rlhf_drive.scenes.columns import RecordBatchReader, arrow_schema
from rlhf_drive.scenes.manifest import REMAKE, Shard
from rlhf_drive.scenes.recently_used import RecentlyUsed

__all__ = ["BatchTable", "ShardBatches", "read_batch_table"]

OPEN_FILES = 64
"""Files that stay mapped; a mapping costs addresses and no memory of its own."""
OPEN_BATCHES = 64
"""Record batches that stay decoded, about 25 kB each."""


@dataclass(frozen=True)
class BatchTable:
    """Where the B record batches of a store lie; about 20 bytes for each."""

    shard: NDArray[np.int32]
    """``[B]`` number of the file."""
    offset: NDArray[np.int64]
    """``[B]`` byte at which the batch's message begins."""
    first: NDArray[np.int64]
    """``[B + 1]`` index of the batch's first scene; the last entry is the number of scenes."""

    @classmethod
    def concatenate(cls, parts: Sequence[BatchTable]) -> BatchTable:
        """Tables of shards, one after the other."""
        before = np.cumsum([0, *(part.first[-1] for part in parts)])
        first = [part.first[:-1] + start for part, start in zip(parts, before, strict=False)]
        return cls(
            np.concatenate([part.shard for part in parts]),
            np.concatenate([part.offset for part in parts]),
            np.concatenate([*first, before[-1:]]),
        )


def read_batch_table(
    folder: Path, number: int, shard: Shard, version: int, column: str
) -> tuple[BatchTable, list[str | None]]:
    """Walk over the messages of shard `number`.

    Args:
        folder: The store.
        number: Of the shard, from 0.
        shard: What the manifest says of it.
        version: Format version of the store.
        column: A text column to read on the way.

    Returns:
        Its table, and the column's values.

    Raises:
        DataError: The file is no Arrow stream, or does not hold the scenes that were written.
    """
    import pyarrow as pa

    path = folder / shard.file
    wanted = arrow_schema(version)
    offsets, counts, values = list[int](), list[int](), list[str | None]()
    try:
        buffer = _mapped(path)
        source = pa.BufferReader(buffer)
        schema = pa.ipc.read_schema(source)
        fits = schema.equals(wanted)
        while fits:
            offset = source.tell()
            try:
                message = pa.ipc.read_message(source)
            except EOFError:  # the stream's regular end
                break
            batch = pa.ipc.read_record_batch(message, schema)
            offsets.append(offset)
            counts.append(len(batch))
            values += batch.column(column).to_pylist()
    except (pa.ArrowException, OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read as Arrow: {type(error).__name__}: {error}. {REMAKE}") from error
    if not fits or sum(counts) != shard.count:
        raise DataError(f"{path} does not hold the {shard.count} scenes that were written. {REMAKE}")
    first = np.cumsum([0, *counts], dtype=np.int64)
    return BatchTable(np.full(len(offsets), number, np.int32), np.array(offsets, np.int64), first), values


class ShardBatches:
    """The record batches of a store, read when asked for. Picklable; threads may share it.

    Args:
        folder: The store.
        shards: Its files.
        table: Where the batches lie.
        version: Format version of the store.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard], table: BatchTable, version: int) -> None:
        self.folder, self.shards, self.table, self.version = folder, tuple(shards), table, version
        self._schema = arrow_schema(version)
        self._files: RecentlyUsed[Any] = RecentlyUsed(OPEN_FILES)
        self._readers: RecentlyUsed[RecordBatchReader] = RecentlyUsed(OPEN_BATCHES)

    def __len__(self) -> int:
        return len(self.table.shard)

    def reader(self, index: int) -> tuple[RecordBatchReader, int]:
        """Reader of the batch that holds scene `index`, and the scene's row in it.

        Raises:
            DataError: The file is no longer there, or no longer as long.
        """
        batch = int(np.searchsorted(self.table.first, index, side="right")) - 1
        reader = self._readers.get(batch, lambda: RecordBatchReader(self._batch(batch)))
        return reader, index - int(self.table.first[batch])

    def columns(self, names: Sequence[str]) -> Iterator[list[Any]]:
        """Arrow arrays of the columns, one list for each batch; no other column is touched."""
        for number in range(len(self)):
            batch = self._batch(number)
            yield [batch.column(name) for name in names]

    def _batch(self, number: int) -> Any:
        """The decoded batch; its arrays are views of the mapped file."""
        import pyarrow as pa

        shard = int(self.table.shard[number])
        source = pa.BufferReader(self._files.get(shard, lambda: self._open(shard)))
        source.seek(int(self.table.offset[number]))
        return pa.ipc.read_record_batch(pa.ipc.read_message(source), self._schema)

    def _open(self, number: int) -> Any:
        shard = self.shards[number]
        path = self.folder / shard.file
        if not path.is_file():
            raise DataError(f"{path} is missing. {REMAKE}")
        buffer = _mapped(path)
        if len(buffer) != shard.bytes:
            raise DataError(
                f"{path} has {len(buffer)} bytes where {shard.bytes} were written: truncated or altered while it was "
                f"in use. {REMAKE}"
            )
        return buffer


def _mapped(path: Path) -> Any:
    """The file's bytes where they lie. No descriptor stays open; the mapping lives as long as something looks at it."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        return source.read_buffer()
