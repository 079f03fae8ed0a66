"""Scoring a folder of candidate plans: equal to the official values, whole or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from rlhf_drive.compare.score import COMPONENTS, score_folder
from rlhf_drive.errors import ConfigError, DataError

COLUMNS = {"nc": "v1_nc", "dac": "v1_dac", "ttc": "v1_ttc", "c": "v1_c", "ddc": "v1_ddc"}
"""Discrete components, in the order of `v1_fragile_1e3`, and the golden array of each."""


@pytest.fixture(scope="module")
def golden(navsim_golden: Path) -> Path:
    """The folder of scene files."""
    return navsim_golden / "golden"


def _copy(golden: Path, names: list[str], target: Path) -> Path:
    target.mkdir()
    for name in names:
        for suffix in (".scene.json", ".scene.npz"):
            shutil.copy(golden / f"{name}{suffix}", target)
    return target


def _names(golden: Path) -> list[str]:
    return sorted(path.name.removesuffix(".scene.json") for path in golden.glob("*.scene.json"))


def test_every_row_equals_the_official_value(golden: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.parquet"
    summary = score_folder(golden, out)
    table = pq.read_table(out)
    assert table.column_names == ["scene", "candidate", *COMPONENTS]
    names = _names(golden)
    assert (summary.scenes, summary.rows, summary.invalid) == (len(names), 64 * len(names), 0)
    columns = {name: table.column(name).to_numpy() for name in table.column_names}
    assert columns["scene"].tolist() == [name for name in names for _ in range(64)]
    for i, name in enumerate(names):
        rows = slice(64 * i, 64 * (i + 1))
        assert columns["candidate"][rows].tolist() == list(range(64))
        tags = np.array(json.loads((golden / f"{name}.scene.json").read_text())["cand_tags"])
        with np.load(golden / f"{name}.golden.npz") as official:
            for k, (column, key) in enumerate(COLUMNS.items()):
                firm = ~official["v1_fragile_1e3"][:, k]
                assert np.array_equal(columns[column][rows][firm], official[key][firm]), (name, column)
            tolerance = np.where(tags == "stand_still", 1e-3, 1e-6)
            firm = ~official["v1_fragile_1e3"].any(axis=1)
            assert (np.abs(columns["pdms"][rows] - official["v1_pdms"]) <= tolerance)[firm].all(), name
    assert summary.mean_pdms == pytest.approx(float(columns["pdms"].mean()), abs=1e-12)


def test_progress_counts_scenes_and_plans(golden: Path, tmp_path: Path) -> None:
    folder = _copy(golden, _names(golden)[:2], tmp_path / "two")
    seen: list[tuple[int, int, int]] = []
    score_folder(folder, tmp_path / "o.parquet", on_progress=lambda *counts: seen.append(counts))
    assert seen == [(1, 2, 64), (2, 2, 128)]


def test_a_plan_without_a_score_is_null_and_counted(golden: Path, tmp_path: Path) -> None:
    name = _names(golden)[0]
    folder = _copy(golden, [name], tmp_path / "one")
    with np.load(folder / f"{name}.scene.npz") as archive:
        arrays = {key: archive[key] for key in archive.files}
    arrays["cand"][5, 3, 0] = np.nan
    np.savez(folder / f"{name}.scene.npz", **arrays)
    summary = score_folder(folder, tmp_path / "o.parquet")
    table = pq.read_table(tmp_path / "o.parquet")
    assert summary.invalid == 1
    for column in COMPONENTS:
        assert [i for i, value in enumerate(table.column(column).to_pylist()) if value is None] == [5]


def test_a_scene_without_reference_gets_the_planner_s(golden: Path, tmp_path: Path) -> None:
    name = _names(golden)[0]
    folder = _copy(golden, [name], tmp_path / "one")
    score_folder(folder, tmp_path / "given.parquet")
    with np.load(folder / f"{name}.scene.npz") as archive:
        arrays = {key: archive[key] for key in archive.files}
    arrays["pdm_ref_v1"] = np.zeros((0, 3))
    np.savez(folder / f"{name}.scene.npz", **arrays)
    score_folder(folder, tmp_path / "planned.parquet")
    given, planned = (pq.read_table(tmp_path / f"{n}.parquet").column("pdms") for n in ("given", "planned"))
    assert np.abs(given.to_numpy() - planned.to_numpy()).max() < 1e-3


def test_a_damaged_scene_is_named_and_nothing_is_written(golden: Path, tmp_path: Path) -> None:
    names = _names(golden)[:2]
    folder, out = _copy(golden, names, tmp_path / "two"), tmp_path / "o.parquet"
    out.write_text("before")
    damaged = folder / f"{names[1]}.scene.npz"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    with pytest.raises(DataError, match=names[1]):
        score_folder(folder, out)
    assert out.read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o.parquet", "two"]


def test_wrong_input_is_refused_first(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Unknown metric 'pdm'\. Did you mean 'pdms'"):
        score_folder(tmp_path, tmp_path / "o.parquet", metric="pdm")
    with pytest.raises(ConfigError, match="does not exist"):
        score_folder(tmp_path, tmp_path / "absent" / "o.parquet")
    with pytest.raises(DataError, match=r"no \*\.scene\.json file found"):
        score_folder(tmp_path, tmp_path / "o.parquet")


def test_a_write_that_fails_leaves_no_partial_file(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(table: object, path: Path) -> None:
        path.write_text("half")
        raise OSError("No space left on device")

    folder = _copy(golden, _names(golden)[:1], tmp_path / "one")
    monkeypatch.setattr(pq, "write_table", half)
    with pytest.raises(OSError, match="No space left"):
        score_folder(folder, tmp_path / "o.parquet")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one"]
