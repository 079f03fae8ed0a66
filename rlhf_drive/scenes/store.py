"""Scenes on disk: a folder of Arrow shards and the manifest `scenes.json` that vouches for them.

Nothing but a table of where the scenes lie is kept in memory: a scene is read from the mapped shard when asked for, so
a store may be far larger than memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf_drive.errors import DataError, did_you_mean
from rlhf_drive.scenes.manifest import MANIFEST_NAME, REMAKE, Manifest, check_size
from rlhf_drive.scenes.model import Scene
from rlhf_drive.scenes.shards import BatchTable, ShardBatches, read_batch_table
from rlhf_drive.scenes.split import SceneSplit
from rlhf_drive.scenes.verified import Progress, verify_shards
from rlhf_drive.scenes.writing import SPLITS, write_scenes

__all__ = ["MANIFEST_NAME", "SPLITS", "SceneStore", "write_scenes"]


class SceneStore:
    """Scenes of a folder that :func:`write_scenes` wrote, read on demand. Their arrays are read-only.

    Picklable, as the path and the table of scenes; threads may share it.
    """

    def __init__(
        self, path: Path, info: Mapping[str, Any], batches: ShardBatches, split_codes: NDArray[np.int8]
    ) -> None:
        self.path = path
        """The folder."""
        self.info: dict[str, Any] = dict(info)
        """What the writer noted about the scenes' origin."""
        self._batches = batches
        self._split_codes = split_codes

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True, on_progress: Progress | None = None) -> SceneStore:
        """The store at `path`, checked as a whole before the first scene is read.

        Args:
            path: A folder with `scenes.json`.
            verify: Whether the SHA-256 of every shard must have been compared: by this call, or by an earlier one if
                the file was not touched since (see :mod:`rlhf_drive.scenes.verified`). Sizes and counts are always
                compared.
            on_progress: Called as ``on_progress(done, total, text)`` while shards are read.

        Raises:
            DataError: A file is missing, truncated, altered or of an unknown version; the message names it and why.

        Example:
            >>> store = SceneStore.open("runs/scenes")
            >>> heldout = store.split("heldout")
        """
        folder = Path(path).absolute()
        manifest = Manifest.read(Path(path))
        for shard in manifest.shards:
            check_size(folder, shard)
        if verify:
            verify_shards(folder, manifest.shards, on_progress)
        tables: list[BatchTable] = []
        codes: list[NDArray[np.int8]] = []
        sizes: Counter[str | None] = Counter()
        for number, shard in enumerate(manifest.shards):
            table, names = read_batch_table(folder, number, shard, manifest.version, "split")
            tables.append(table)
            sizes.update(names)
            codes.append(np.array([SPLITS.index(name) if name in SPLITS else -1 for name in names], np.int8))
        if sizes != Counter(manifest.splits):
            raise DataError(
                f"{folder / MANIFEST_NAME} claims {dict(manifest.splits)}; its shards hold {dict(sizes)}. {REMAKE}"
            )
        batches = ShardBatches(folder, manifest.shards, BatchTable.concatenate(tables), manifest.version)
        return cls(Path(path), manifest.info, batches, np.concatenate(codes))

    def __len__(self) -> int:
        return len(self._split_codes)

    def __getitem__(self, index: int) -> Scene:
        """Scene at `index`, 0 ≤ index < len, read from its shard.

        Raises:
            IndexError: There is no such scene.
            DataError: What is stored breaks a rule of the data model (cannot happen to a verified store), or the file
                changed while it was in use.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"Scene {index} of {len(self)} in {self.path}.")
        reader, row = self._batches.reader(index)
        return reader.scene(row)

    def __iter__(self) -> Iterator[Scene]:
        return (self[i] for i in range(len(self)))

    @property
    def tokens(self) -> tuple[str, ...]:
        """Token of every scene, in order; read at each call."""
        return self.texts("token")

    @property
    def kinds(self) -> tuple[str, ...]:
        """Situation kind of every scene, in order; read at each call."""
        return self.texts("kind")

    @property
    def clusters(self) -> tuple[str, ...]:
        """Cluster of every scene, in order; read at each call."""
        return self.texts("cluster")

    @property
    def challenging(self) -> tuple[bool, ...]:
        """Whether each scene is challenging, in order; read at each call."""
        return tuple(bool(value) for part in self._batches.columns(["challenging"]) for value in part[0].to_pylist())

    def texts(self, name: str) -> tuple[str, ...]:
        """A text column, in order; equal values are one object."""
        known: dict[str, str] = {}
        parts = (part[0].to_pylist() for part in self._batches.columns([name]))
        return tuple(known.setdefault(value, value) for values in parts for value in values)

    def numbers(self, name: str) -> NDArray[np.int64]:
        """``[S]`` a column with one integer a scene, such as `ref_t0_us`."""
        parts = [part[0].to_numpy(zero_copy_only=False) for part in self._batches.columns([name])]
        return np.concatenate(parts).astype(np.int64)

    def lengths(self, name: str) -> NDArray[np.int64]:
        """``[S]`` how many numbers an array column holds of each scene; 0 where the source did not know them."""
        return np.concatenate([np.diff(part[0].offsets.to_numpy()) for part in self._batches.columns([name])]).astype(
            np.int64
        )

    def rows(self, split: str) -> NDArray[np.int64]:
        """Positions of the scenes of `split` (``"train"`` or ``"heldout"``), rising.

        Raises:
            DataError: There is no such split.
        """
        if split not in SPLITS:
            raise DataError(f"Unknown split {split!r}. {did_you_mean(split, SPLITS)}")
        return np.flatnonzero(self._split_codes == SPLITS.index(split))

    def indices(self, split: str) -> list[int]:
        """:meth:`rows` as a list."""
        rows: list[int] = self.rows(split).tolist()
        return rows

    def split(self, split: str) -> SceneSplit:
        """The scenes of `split`, in order, each read when asked for."""
        return SceneSplit(self, self.rows(split))
