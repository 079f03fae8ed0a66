"""The manifest of a scene store: which shards there are, how long they are and what their bytes hash to."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlhf_drive.errors import DataError

__all__ = ["MANIFEST_NAME", "REMAKE", "Manifest", "Shard", "check_bytes", "check_size", "file_sha256"]

MANIFEST_NAME = "scenes.json"
"""The file that makes a folder a scene store."""
REMAKE = "Make the scenes again or restore the folder from a copy."
"""What to do about a damaged store, for messages."""
_FORMAT = "rlhf-drive scenes"
_VERSION = 2
_READABLE = (1, 2)
"""Version 1 has no cameras."""


@dataclass(frozen=True)
class Shard:
    """One Arrow file as the manifest describes it."""

    file: str
    """Name inside the folder."""
    count: int
    """Scenes in it."""
    bytes: int
    """Its size."""
    sha256: str
    """SHA-256 of its bytes, hexadecimal."""

    def __post_init__(self) -> None:
        typed = isinstance(self.file, str) and isinstance(self.sha256, str)
        if not typed or type(self.count) is not int or type(self.bytes) is not int or Path(self.file).name != self.file:
            raise ValueError(f"shard {self.file!r} is described wrongly")


@dataclass(frozen=True)
class Manifest:
    """What `scenes.json` holds."""

    splits: Mapping[str, int]
    """Number of scenes by split."""
    shards: tuple[Shard, ...]
    """The Arrow files in order."""
    info: Mapping[str, Any]
    """What the writer noted about the scenes' origin."""
    version: int = _VERSION
    """Format version, which says what columns the shards have."""

    def write(self, folder: Path) -> None:
        """Write `scenes.json` into `folder` and wait until it is on disk."""
        content = {
            "format": _FORMAT,
            "version": self.version,
            "count": sum(self.splits.values()),
            "splits": dict(self.splits),
            "shards": [asdict(shard) for shard in self.shards],
            "info": dict(self.info),
        }
        with (folder / MANIFEST_NAME).open("w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of `folder`.

        Raises:
            DataError: It is missing, cut off, contradicts itself or has a version that this code does not read.
        """
        path = folder / MANIFEST_NAME
        if not path.is_file():
            raise DataError(f"{folder} is not a scene store: {MANIFEST_NAME} is missing. Check the path.")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise DataError(f"{path} cannot be read: {error}. {REMAKE}") from error
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise DataError(f"{path} does not describe a scene store. Check the path.")
        version = content.get("version")
        if type(version) is not int or version not in _READABLE:
            raise DataError(
                f"{path} has format version {version!r}; this installation reads {' and '.join(map(str, _READABLE))}. "
                "Make the scenes again, or use the version that wrote them."
            )
        try:
            shards = tuple(Shard(**entry) for entry in content["shards"])
            splits = {str(name): int(count) for name, count in content["splits"].items()}
            total, info = content["count"], dict(content["info"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{path} is incomplete: {type(error).__name__}: {error}. {REMAKE}") from error
        if not sum(splits.values()) == sum(shard.count for shard in shards) == total > 0:
            raise DataError(f"{path} contradicts itself: count {total}, splits {splits}. {REMAKE}")
        return cls(splits, shards, info, version)


def file_sha256(path: Path) -> str:
    """SHA-256 of the file at `path`, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_size(folder: Path, shard: Shard) -> None:
    """Compare a shard with what the manifest says, without reading it.

    Raises:
        DataError: The file is missing or has another length.
    """
    path = folder / shard.file
    if not path.is_file():
        raise DataError(f"{path} is missing. {REMAKE}")
    if (size := path.stat().st_size) != shard.bytes:
        raise DataError(f"{path} has {size} bytes where {shard.bytes} were written: truncated or altered. {REMAKE}")


def check_bytes(folder: Path, shard: Shard) -> None:
    """Read a shard and compare its SHA-256.

    Raises:
        DataError: It is not what was written.
    """
    path = folder / shard.file
    if (found := file_sha256(path)) != shard.sha256:
        raise DataError(f"{path} is altered: SHA-256 {found[:12]}… where {shard.sha256[:12]}… was written. {REMAKE}")
