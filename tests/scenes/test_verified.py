"""What was verified once is not read again, and whatever was touched since is."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from oracles.random_scene import make_scene

from rlhf_drive.errors import DataError
from rlhf_drive.scenes import manifest, verified
from rlhf_drive.scenes.store import SceneStore, write_scenes

FILES = ["scenes-00000.arrow", "scenes-00001.arrow", "scenes-00002.arrow"]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three shards of two scenes; files count as settled at once, and the user's cache folder is the test's."""
    monkeypatch.setattr(verified, "SETTLED_S", -1.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    scenes = [make_scene(seed) for seed in range(6)]
    write_scenes(tmp_path / "store", scenes, split_of={s.token: "train" for s in scenes}, info={}, shard_size=2)
    return tmp_path / "store"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], list[str]]:
    """``read(folder)`` opens the store and says which files were read to the end for it."""
    files: list[str] = []
    original = manifest.file_sha256

    def counted(path: Path) -> str:
        files.append(path.name)
        return original(path)

    monkeypatch.setattr(manifest, "file_sha256", counted)

    def opened(folder: Path) -> list[str]:
        files.clear()
        SceneStore.open(folder)
        return sorted(files)

    return opened


def flip(path: Path, at: int) -> None:
    """Change one bit in place and set the time of the last change back, as a tool that keeps times does."""
    stat = path.stat()
    with path.open("r+b") as file:
        file.seek(at, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(at, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_every_byte_is_read_once(store: Path, read: Callable[[Path], list[str]]) -> None:
    assert read(store) == FILES
    assert read(store) == []
    assert (store / "verified.json").is_file()
    (store / "verified.json").unlink()
    assert read(store) == FILES


def test_a_file_that_was_touched_is_read_again(store: Path, read: Callable[[Path], list[str]]) -> None:
    read(store)
    os.utime(store / FILES[1])
    assert read(store) == [FILES[1]]
    assert read(store) == []


def test_an_altered_file_is_refused_although_it_was_verified(store: Path, read: Callable[[Path], list[str]]) -> None:
    read(store)
    flip(store / FILES[2], -3000)
    for _ in range(2):
        with pytest.raises(DataError, match=r"scenes-00002\.arrow is altered: SHA-256"):
            SceneStore.open(store)
    assert len(SceneStore.open(store, verify=False)) == 6


def test_a_copy_is_read_although_the_note_came_along(
    store: Path, tmp_path: Path, read: Callable[[Path], list[str]]
) -> None:
    read(store)
    shutil.copytree(store, tmp_path / "copy")  # with the times of the files
    assert (tmp_path / "copy" / "verified.json").is_file()
    assert read(tmp_path / "copy") == FILES
    moved = store.rename(tmp_path / "moved")
    assert read(moved) == []  # the same files


def test_another_manifest_is_not_vouched_for(store: Path, read: Callable[[Path], list[str]]) -> None:
    read(store)
    content = json.loads((store / "scenes.json").read_text())
    content["shards"][0]["sha256"] = "0" * 64
    (store / "scenes.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"scenes-00000\.arrow is altered"):
        SceneStore.open(store)


@pytest.mark.parametrize("text", ["", "[]", '{"shards": 3}', '{"shards": {"scenes-00000.arrow": ["", 1]}}', "\udcff"])
def test_a_note_that_makes_no_sense_vouches_for_nothing(
    store: Path, text: str, read: Callable[[Path], list[str]]
) -> None:
    (store / "verified.json").write_bytes(text.encode(errors="surrogateescape"))
    assert read(store) == FILES
    assert read(store) == []


def test_what_changed_just_now_is_not_noted(
    store: Path, read: Callable[[Path], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verified, "SETTLED_S", 60.0)
    assert read(store) == read(store) == FILES
    assert sorted(path.name for path in store.iterdir()) == [*FILES, "scenes.json"]
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 61.0)
    assert read(store) == FILES
    assert read(store) == []


def test_a_folder_that_cannot_be_written_to_is_noted_elsewhere(
    store: Path, tmp_path: Path, read: Callable[[Path], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = verified._replace

    def refuse(path: Path, text: str) -> None:
        if path.parent == store:
            raise PermissionError(13, "read-only", str(path))
        original(path, text)

    monkeypatch.setattr(verified, "_replace", refuse)
    assert read(store) == FILES
    assert not (store / "verified.json").exists()
    assert len(list((tmp_path / "cache").rglob("*.json"))) == 1
    assert read(store) == []


def test_without_a_place_for_the_note_it_is_said(
    store: Path, read: Callable[[Path], list[str]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(verified, "_replace", refuse)
    assert read(store) == read(store) == FILES
    assert "the next start reads all of it again" in caplog.text


def test_a_start_that_is_ended_goes_on_where_it_was(
    store: Path, read: Callable[[Path], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verified, "THREADS", 1)

    def stop(done: int, total: int, text: str) -> None:
        assert (total, text) == (3, f"verifying {FILES[done - 1]}")
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        SceneStore.open(store, on_progress=stop)
    left = read(store)
    assert FILES[0] not in left
    assert FILES[1] not in left
    assert read(store) == []


def test_a_damaged_file_keeps_nobody_from_the_others(store: Path, read: Callable[[Path], list[str]]) -> None:
    whole = (store / FILES[1]).read_bytes()
    flip(store / FILES[1], -3000)
    with pytest.raises(DataError, match="is altered"):
        SceneStore.open(store)
    (store / FILES[1]).write_bytes(whole)
    assert FILES[0] not in read(store)


def test_a_store_with_a_note_may_be_replaced(store: Path) -> None:
    SceneStore.open(store)
    (store / ".verified.json.abc").write_text("half")  # what a killed start leaves
    write_scenes(store, [make_scene(3)], split_of={"scene-3": "train"}, info={}, overwrite=True)
    assert sorted(path.name for path in store.iterdir()) == ["scenes-00000.arrow", "scenes.json"]
    assert SceneStore.open(store).tokens == ("scene-3",)
