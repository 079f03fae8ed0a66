"""Scoring a folder of candidate plans: equal to the official values, whole or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rewards import EPDMS_COMPONENTS, RewardConfig, RewardSpec
from rewards import PDMS_COMPONENTS as COMPONENTS
from rewards.pdm_closed import attach_references
from rlhf_drive.compare.candidates import read_candidates
from rlhf_drive.compare.score import metric_reward, score_folder
from rlhf_drive.config import ScenesSection
from rlhf_drive.errors import ConfigError, DataError
from rlhf_drive.scenes import Scene
from rlhf_drive.scenes.generator import generate_scenes
from rlhf_drive.scenes.previous import human_previous
from rlhf_drive.scenes.store import write_scenes
from rlhf_drive.training.scenes import build_scenes

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
    assert summary.mean == pytest.approx(float(columns["pdms"].mean()), abs=1e-12)


def test_progress_counts_scenes_and_plans(golden: Path, tmp_path: Path) -> None:
    folder = _copy(golden, _names(golden)[:2], tmp_path / "two")
    seen: list[tuple[int, int, int]] = []
    score_folder(folder, tmp_path / "o.parquet", on_progress=lambda *counts: seen.append(counts))
    assert seen == [(2, 2, 128)]
    names = _names(golden)
    score_folder(golden, tmp_path / "o.parquet", on_progress=lambda *counts: seen.append(counts))
    assert seen[-1] == (len(names), len(names), 64 * len(names))


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
    reasons = [json.loads(line) for line in (tmp_path / "o.parquet.failures.jsonl").read_text().splitlines()]
    assert [(r["scene"], r["candidate"], r["source"], r["kind"]) for r in reasons] == [
        (name, 5, "plan", "invalid_plan")
    ]
    assert summary.reasons == (reasons[0]["reason"],)
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
        metric_reward("pdm")
    with pytest.raises(ConfigError, match="Unknown human_filter 'onn'"):
        score_folder(tmp_path, tmp_path / "o.parquet", reward=metric_reward("epdms", human_filter="onn"))
    with pytest.raises(ConfigError, match="does not exist"):
        score_folder(tmp_path, tmp_path / "absent" / "o.parquet")
    with pytest.raises(ConfigError, match=r"end the output's name in \.parquet; got 'o\.csv'"):
        score_folder(tmp_path, tmp_path / "o.csv")
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


V2_COLUMNS = ("nc", "dac", "tlc", "ddc", "ttc", "lk", "hc")
"""Discrete components of v2, in the order of `v2_fragile_1e3`."""


def test_every_epdms_row_equals_the_official_value(golden: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.parquet"
    summary = score_folder(golden, out, reward=metric_reward("epdms"))
    table = pq.read_table(out)
    assert table.column_names == ["scene", "candidate", *EPDMS_COMPONENTS]
    assert json.loads(table.schema.metadata[b"rlhf_drive.scorer"]) == {
        "name": "epdms", "version": "NAVSIM v2.2", "human_filter": "on", "traffic": "log replay",
    }  # fmt: skip
    assert summary.invalid == 0
    for i, name in enumerate(_names(golden)):
        rows = slice(64 * i, 64 * (i + 1))
        tags = np.array(json.loads((golden / f"{name}.scene.json").read_text())["cand_tags"])
        with np.load(golden / f"{name}.golden.npz") as official:
            for k, column in enumerate(V2_COLUMNS):
                firm = ~official["v2_fragile_1e3"][:, k]
                ours = table.column(column).to_numpy()[rows]
                assert np.array_equal(ours[firm], official[f"v2_{column}"][firm]), (name, column)
            assert np.array_equal(table.column("ec").to_numpy()[rows], official["v2_ec"]), name
            tolerance = np.where(tags == "stand_still", 1e-3, 1e-6)
            firm = ~official["v2_fragile_1e3"].any(axis=1)
            ours = table.column("epdms").to_numpy()[rows]
            assert (np.abs(ours - official["v2_epdms"]) <= tolerance)[firm].all(), name


def test_without_plans_of_the_frame_before_ec_is_left_out(golden: Path, tmp_path: Path) -> None:
    name = _names(golden)[0]
    folder = _copy(golden, [name], tmp_path / "one")
    poses = read_candidates(folder)[name].poses
    np.savez(tmp_path / "plans.npz", scene=np.array([name] * 64), poses=poses)
    score_folder(folder, tmp_path / "o.parquet", reward=metric_reward("epdms"), candidates=tmp_path / "plans.npz")
    table = pq.read_table(tmp_path / "o.parquet")
    assert table.column("ec").null_count == 64
    with np.load(golden / f"{name}.golden.npz") as official:
        np.testing.assert_allclose(table.column("epdms").to_numpy(), official["v2_score_without_ec"], atol=1e-6)


def test_a_composed_reward_has_its_own_column(golden: Path, tmp_path: Path) -> None:
    folder = _copy(golden, _names(golden)[:1], tmp_path / "one")
    reward = RewardConfig(
        (RewardSpec("ep", 5), RewardSpec("ttc", 5), RewardSpec("c", 2)), (RewardSpec("nc"), RewardSpec("dac"))
    )
    score_folder(folder, tmp_path / "o.parquet", reward=reward)
    table = pq.read_table(tmp_path / "o.parquet")
    assert table.column_names[-2:] == ["pdms", "reward"]
    pdms, composed = (table.column(column).to_numpy() for column in ("pdms", "reward"))
    np.testing.assert_allclose(composed, pdms, atol=1e-12)
    assert np.ptp(pdms) > 0.5


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Scene]]:
    scenes = [attach_references(scene) for scene in generate_scenes(3, seed=2)]
    folder = tmp_path_factory.mktemp("store") / "scenes"
    write_scenes(folder, scenes, split_of={scene.token: "train" for scene in scenes}, info={})
    return folder, scenes


def test_plans_for_a_scene_store(store: tuple[Path, list[Scene]], tmp_path: Path) -> None:
    """One scene has plans of the frame before, one has none, one has no plans at all."""
    folder, scenes = store
    first, _, third = (scene.token for scene in scenes)
    human = {scene.token: scene.reference.human_poses for scene in scenes}
    table = pa.table(
        {
            "scene": [third, first, third],
            "candidate": [7, 3, 5],
            "poses": [human[third].ravel().tolist(), human[first].ravel().tolist(), np.zeros(24).tolist()],
        }
    )
    pq.write_table(table, tmp_path / "plans.parquet")
    summary = score_folder(folder, tmp_path / "o.parquet", candidates=tmp_path / "plans.parquet")
    found = pq.read_table(tmp_path / "o.parquet").to_pylist()
    assert [(row["scene"], row["candidate"]) for row in found] == [(first, 3), (third, 7), (third, 5)]
    assert (summary.scenes, summary.rows) == (2, 3)
    assert found[1]["pdms"] > 0.8 > found[2]["pdms"]


def test_own_rewards_see_the_scenes_of_a_store(store: tuple[Path, list[Scene]], golden: Path, tmp_path: Path) -> None:
    folder, scenes = store
    source = tmp_path / "mine.py"
    source.write_text(
        "def speed(inputs):\n"
        "    seen = [scene.observation.speed_mps for scene in inputs.scenes]\n"
        "    return [seen[i] for i in inputs.trajectories.scene_index]\n"
    )
    reward = RewardConfig((RewardSpec("pdms"), RewardSpec(f"{source}:speed")))
    np.savez(tmp_path / "p.npz", scene=np.array([scene.token for scene in scenes]), poses=np.zeros((3, 8, 3)))
    score_folder(folder, tmp_path / "o.parquet", reward=reward, candidates=tmp_path / "p.npz")
    found = pq.read_table(tmp_path / "o.parquet").to_pylist()
    for row, scene in zip(found, scenes, strict=True):
        assert row["speed"] == scene.observation.speed_mps
        assert row["reward"] == pytest.approx((row["pdms"] + row["speed"]) / 2)
    with pytest.raises(ConfigError, match="scenes without observations"):
        score_folder(golden, tmp_path / "o.parquet", reward=reward)


def test_plans_that_do_not_fit_are_refused(store: tuple[Path, list[Scene]], tmp_path: Path) -> None:
    folder, scenes = store
    token, out = scenes[0].token, tmp_path / "o.parquet"

    def save(**arrays: object) -> Path:
        np.savez(tmp_path / "p.npz", **arrays)
        return tmp_path / "p.npz"

    with pytest.raises(ConfigError, match="holds no plans"):
        score_folder(folder, out)
    with pytest.raises(DataError, match="holds no scene 'nowhere'"):
        score_folder(folder, out, candidates=save(scene=["nowhere"], poses=np.zeros((1, 8, 3))))
    with pytest.raises(DataError, match=r"poses must be \[N, 8, 3\] with N = 1 rows; got \[1, 7, 3\]"):
        score_folder(folder, out, candidates=save(scene=[token], poses=np.zeros((1, 7, 3))))
    with pytest.raises(DataError, match="candidate must number the plans"):
        score_folder(folder, out, candidates=save(scene=[token] * 2, poses=np.zeros((2, 8, 3)), candidate=[1, 1]))
    with pytest.raises(DataError, match="lacks poses; it holds scene"):
        score_folder(folder, out, candidates=save(scene=[token]))
    with pytest.raises(ConfigError, match="does not exist"):
        score_folder(folder, out, candidates=tmp_path / "absent.npz")
    (tmp_path / "p.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match="cannot be read"):
        score_folder(folder, out, candidates=tmp_path / "p.parquet")
    with pytest.raises(DataError, match=r"No plan could be scored. The first reason: .*not finite"):
        score_folder(folder, out, candidates=save(scene=[token], poses=np.full((1, 8, 3), np.nan)))
    assert not out.exists()


@pytest.mark.parametrize(("version", "metric"), [("v1_1", "pdms"), ("v2_2", "epdms")])
def test_imported_metric_caches_give_the_same_numbers(
    navsim_golden: Path, tmp_path: Path, version: str, metric: str
) -> None:
    section = ScenesSection(
        source="navsim", path=str(navsim_golden / "metric_caches" / version), store=None, heldout_fraction=0.5
    )
    store = build_scenes(section, tmp_path / "store", workers=1)
    assert len(store) == 4
    folder = _copy(navsim_golden / "golden", sorted(store.tokens), tmp_path / "vectors")
    out = tmp_path / "o.parquet"
    assert score_folder(store.path, out, reward=metric_reward(metric), candidates=folder).invalid == 0
    direct = tmp_path / "d.parquet"
    score_folder(folder, direct, reward=metric_reward(metric))
    ours, expected = (
        pq.read_table(path).to_pandas().set_index(["scene", "candidate"]).sort_index() for path in (out, direct)
    )
    np.testing.assert_allclose(ours.to_numpy(), expected.to_numpy(), atol=1e-9)
    other = {"pdms": "epdms", "epdms": "pdms"}[metric]
    with pytest.raises(DataError, match="comes from a metric cache of NAVSIM"):
        score_folder(store.path, out, reward=metric_reward(other), candidates=folder)


def test_rows_without_a_plan_of_the_frame_before_are_scored_without_ec(
    store: tuple[Path, list[Scene]], tmp_path: Path
) -> None:
    folder, scenes = store
    first = scenes[0]
    plan, before = first.reference.human_poses.ravel().tolist(), human_previous(first).ravel().tolist()
    table = pa.table({"scene": [first.token] * 2, "poses": [plan] * 2, "previous": [before, None]})
    pq.write_table(table, tmp_path / "p.parquet")
    score_folder(folder, tmp_path / "o.parquet", reward=metric_reward("epdms"), candidates=tmp_path / "p.parquet")
    both = pq.read_table(tmp_path / "o.parquet").to_pylist()
    assert [row["ec"] is None for row in both] == [False, True]
    assert both[0]["nc"] == both[1]["nc"]
    two_frames = RewardConfig((RewardSpec("epdms_two_frame"),), scorer="epdms")
    summary = score_folder(folder, tmp_path / "t.parquet", reward=two_frames, candidates=tmp_path / "p.parquet")
    assert (summary.rows, summary.invalid) == (2, 1)
