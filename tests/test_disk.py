"""Files are whole or absent, on disk before they have their name, and a failure says what to do."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from oracles.small_disk import mounted_disk

from rlhf_drive import disk
from rlhf_drive.disk import LineFile, check_writable, open_durably, replace_folder, resume_command, write_text, writing
from rlhf_drive.errors import StorageError


@pytest.mark.parametrize(
    ("number", "reason", "remedy"),
    [
        (errno.ENOSPC, "the disk or its quota is full", "Free space there, then start again"),
        (errno.EDQUOT, "the disk or its quota is full", "Free space there, then start again"),
        (errno.EROFS, "it may not be written (Read-only file system)", "Make it writable, then start again"),
        (errno.EACCES, "it may not be written (Permission denied)", "Make it writable, then start again"),
        (errno.ENOENT, "the folder has vanished", "Bring it back, then start again"),
        (errno.ESTALE, "the folder has vanished", "Bring it back, then start again"),
        (errno.EIO, "Input/output error", "Mend that, then start again"),
    ],
)
def test_one_error_says_what_where_why_and_what_to_do(tmp_path: Path, number: int, reason: str, remedy: str) -> None:
    path = tmp_path / "gone" / "file"
    with pytest.raises(StorageError) as raised, writing("The file", path):
        raise OSError(number, os.strerror(number))
    text = str(raised.value)
    assert text.startswith(f"The file could not be written to {path}: {reason}; ")
    assert text.endswith(f" are free. {remedy}")
    assert isinstance(raised.value, OSError)


def test_the_way_back_is_the_run_folder_above(tmp_path: Path) -> None:
    run = tmp_path / "my run"
    path = run / "rl-seed0" / "checkpoints"
    path.mkdir(parents=True)
    (run / "recipe.yaml").touch()
    assert resume_command(path) is None  # some folder that holds a recipe
    (run / "stages.json").touch()
    assert resume_command(path) == f"rlhf-drive train --resume '{run}'"
    assert resume_command(run) == resume_command(path)


def test_other_errors_pass(tmp_path: Path) -> None:
    with pytest.raises(KeyError), writing("The file", tmp_path):
        raise KeyError("name")
    first = StorageError("said already")
    with pytest.raises(StorageError) as raised, writing("The file", tmp_path):
        raise first
    assert raised.value is first


def test_a_file_is_synced_before_it_gets_its_name_and_its_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Order of what reaches the disk, for a text and for a folder of files."""
    order: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        order.append(f"sync {Path(f'/proc/self/fd/{descriptor}').readlink().name}")
        fsync(descriptor)

    def renamed(self: Path, target: Path) -> Path:
        order.append(f"{self.name} to {target.name}")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    place = tmp_path / "place"
    place.mkdir()
    write_text(place / "a.json", "{}")
    assert order == ["sync .a.json.tmp", ".a.json.tmp to a.json", "sync place"]
    order.clear()
    for name in ("final", ".new"):
        (place / name / "below").mkdir(parents=True)
        (place / name / "x").write_text(name)
        (place / name / "below" / "y").write_text(name)
    replace_folder(place / ".new", place / "final")
    assert sorted(order[:4]) == ["sync .new", "sync below", "sync x", "sync y"]
    assert order[4:] == ["final to .final.old", ".new to final", "sync place"]
    assert (place / "final" / "x").read_text() == ".new"


def test_a_library_that_hides_the_disks_error_does_not(tmp_path: Path) -> None:
    with mounted_disk(tmp_path / "small", 1) as small:
        small.fill(65536)
        path = small.path / "blob.pt"
        with pytest.raises(OSError, match="No space left") as raised, open_durably(path) as file:
            torch.save({"a": torch.rand(100_000)}, file)
        assert raised.value.errno == errno.ENOSPC
        path.unlink()
        with open_durably(path) as file:
            torch.save({"a": torch.arange(9)}, file)
        assert torch.equal(torch.load(path, weights_only=True)["a"], torch.arange(9))


def test_a_line_that_does_not_fit_is_taken_back(tmp_path: Path) -> None:
    with mounted_disk(tmp_path / "small", 1) as small:
        path = small.path / "lines"
        file = LineFile(path)
        file.write("first")
        small.fill(0)
        with pytest.raises(OSError, match="No space left"):
            file.write("x" * 10_000)  # the rest of the page takes a part of it
        assert path.read_text() == "first\n"
        small.empty()
        file.write("second")
        assert path.read_text() == "first\nsecond\n"
        path.unlink()
        with pytest.raises(FileNotFoundError):
            file.write("third")
        file.close()


def test_a_folder_is_tried_before_work_starts(tmp_path: Path) -> None:
    check_writable("Checkpoints", tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="Checkpoints could not be written to"):
        check_writable("Checkpoints", tmp_path / "file" / "folder")
    with mounted_disk(tmp_path / "small", 1) as small:
        small.make_read_only(True)
        with pytest.raises(StorageError, match=r"it may not be written \(Read-only file system\)"):
            check_writable("Checkpoints", small.path)
        small.make_read_only(False)


def test_a_folder_that_cannot_be_synced_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int) -> None:
        raise OSError(number, os.strerror(number))

    number = errno.EINVAL  # some file systems do not offer it for folders
    monkeypatch.setattr(os, "fsync", refuse)
    disk._sync_folder(tmp_path)
    number = errno.EIO
    with pytest.raises(OSError, match="Input/output error"):
        disk._sync_folder(tmp_path)
