"""Files of candidate plans: what is read as meant, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf_drive.compare.candidates import candidates_of, read_candidates
from rlhf_drive.errors import DataError
from rlhf_drive.scenes.importers.vectors import read_vectors

POSES = np.arange(48.0).reshape(2, 8, 3)


def write(path: Path, **columns: Any) -> Path:
    if path.suffix == ".npz":
        np.savez(path, **columns)
    else:
        pq.write_table(pa.table({name: np.asarray(column).tolist() for name, column in columns.items()}), path)
    return path


@pytest.mark.parametrize("kind", ["npz", "parquet"])
@pytest.mark.parametrize("flat", [True, False])
def test_plans_are_read_in_their_order(tmp_path: Path, kind: str, flat: bool) -> None:
    poses = POSES.reshape(2, 24) if flat else POSES
    found = read_candidates(write(tmp_path / f"p.{kind}", scene=["b", "a"], poses=poses, candidate=[7, 3]))
    assert list(found) == ["b", "a"]
    assert (found["a"].number.tolist(), found["b"].number.tolist()) == ([3], [7])
    assert np.array_equal(found["a"].poses, POSES[1:])


@pytest.mark.parametrize("kind", ["npz", "parquet"])
@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"poses": POSES.reshape(2, 3, 8)}, r"poses must be \[N, 8, 3\] with N = 2 rows; got \[2, 3, 8\]"),
        ({"poses": POSES.reshape(2, 4, 6)}, r"poses must be \[N, 8, 3\]"),
        ({"previous": POSES.reshape(2, 3, 8)}, r"previous must be \[N, 8, 3\]"),
        ({"scene": [1, 2]}, "scene must be text in every row"),
        ({"candidate": [1, 1]}, "candidate must number the plans of scene 'a', each once"),
    ],
)
def test_columns_that_cannot_be_meant(tmp_path: Path, kind: str, columns: dict[str, Any], reason: str) -> None:
    path = write(tmp_path / f"p.{kind}", **({"scene": ["a", "a"], "poses": POSES} | columns))
    with pytest.raises(DataError, match=reason) as caught:
        read_candidates(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"scene": "a"}, "scene must be text in every row"),
        ({"scene": np.array([b"a", b"a"])}, "scene must be text in every row"),
        ({"candidate": [1]}, r"one number for each of 2 plans; got shape \[1\]"),
        ({"candidate": [[1], [2]]}, r"one number for each of 2 plans; got shape \[2, 1\]"),
    ],
)
def test_arrays_of_another_size(tmp_path: Path, columns: dict[str, Any], reason: str) -> None:
    path = write(tmp_path / "p.npz", **({"scene": ["a", "a"], "poses": POSES} | columns))
    with pytest.raises(DataError, match=reason):
        read_candidates(path)


def test_a_file_without_rows_holds_no_plans(tmp_path: Path) -> None:
    assert read_candidates(write(tmp_path / "p.npz", scene=np.zeros(0, "U1"), poses=np.zeros((0, 8, 3)))) == {}


def test_a_scene_needs_a_plan_of_the_frame_before_for_each_or_for_none(navsim_golden: Path) -> None:
    scene = next(iter(read_vectors(navsim_golden / "golden")))
    assert candidates_of(replace(scene, prev_candidates=scene.prev_candidates[:0])).previous is None
    with pytest.raises(DataError, match=rf"'{scene.name}' holds 64 plans but 5 of the frame before"):
        candidates_of(replace(scene, prev_candidates=scene.prev_candidates[:5]))
