"""A full disk while scenes are written: one clear error, and nothing left."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from oracles.small_disk import mounted_disk

from rlhf_drive.errors import StorageError
from rlhf_drive.scenes.store import SceneStore
from rlhf_drive.scenes.writing import write_scenes


def test_a_disk_that_is_too_small_for_the_scenes(tiny_store: SceneStore, tmp_path: Path) -> None:
    scenes = list(tiny_store)
    split = dict.fromkeys((scene.token for scene in scenes), "train")
    with mounted_disk(tmp_path / "small", 1) as small:
        with pytest.raises(StorageError, match=r"The scene store.*small"):
            write_scenes(small.path / "scenes", scenes, split_of=split, info={})
        assert list(small.path.iterdir()) == []


def test_errors_of_the_source_are_its_own(tmp_path: Path) -> None:
    def scenes() -> object:
        raise FileNotFoundError("recording.json")
        yield

    with pytest.raises(FileNotFoundError, match=r"recording\.json"):
        write_scenes(tmp_path / "scenes", scenes(), split_of={}, info={})  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_at_the_last_moment(
    tiny_store: SceneStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    scenes = list(tiny_store)[:2]
    split = dict.fromkeys((scene.token for scene in scenes), "train")
    with pytest.raises(StorageError, match=r"The scene store"):
        write_scenes(tmp_path / "scenes", scenes, split_of=split, info={})
    assert list(tmp_path.iterdir()) == []
