"""Reading vector folders: what is read, and what is refused with which file named."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_drive.errors import DataError
from rlhf_drive.scenes import AgentType, MapLayer
from rlhf_drive.scenes.importers.vectors import read_vector, read_vectors


def content() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A lane, a road block, a cone and a pedestrian; two plans."""
    info = {
        "id": "tiny",
        "kind": "by_hand",
        "t0_us": 10_000_000,
        "prev_t0_us": 9_500_000,
        "past_times_us": [8_500_000, 9_000_000, 9_500_000, 10_000_000],
        "speed_limit_mps": 13.4,
        "map": [{"token": "7", "layer": "LANE"}, {"token": "8", "layer": "ROADBLOCK"}, {"token": "9", "layer": "LANE"}],
        "route_lane_ids": ["7", "8"],
        "red_lights": [{"token": "7", "on_route": True}],
        "agents": [
            {"token": "a", "type": "TRAFFIC_CONE", "length": 0.4, "width": 0.3, "is_agent_type": False},
            {"token": "b", "type": "PEDESTRIAN", "length": 0.6, "width": 0.7, "is_agent_type": True},
        ],
        "cand_tags": ["human", "stand_still"],
        "prev_tags": ["consistent", "noisy"],
    }
    square = np.array([[0.0, 0.0], [9.0, 0.0], [9.0, 9.0], [0.0, 9.0]])
    arrays = {
        "map_vertices": np.concatenate([square, square + 1, square + 2]),
        "map_offsets": np.array([0, 4, 8, 12]),
        "red_vertices": square,
        "red_offsets": np.array([0, 4]),
        "red_active": np.ones((1, 51), dtype=bool),
        "agent_pose": np.full((2, 51, 3), 5.0),
        "agent_vel": np.full((2, 51, 2), 0.25),
        "agent_valid": np.ones((2, 51), dtype=bool),
        "ego_init": np.arange(11.0),
        "prev_ego_init": np.arange(11.0),
        "past_states": np.zeros((4, 11)),
        "human_poses": np.zeros((8, 3), dtype=np.float32),
        "centerline": np.array([[0.0, 0.0, 0.0], [400.0, 0.0, 0.0]]),
        "cand": np.ones((2, 8, 3), dtype=np.float32),
        "prev_cand": np.zeros((2, 8, 3), dtype=np.float32),
        "pdm_ref_v1": np.zeros((41, 3)),
        "pdm_ref_v2": np.zeros((41, 3)),
    }
    return info, arrays


def write(folder: Path, name: str, info: dict[str, Any], arrays: dict[str, np.ndarray]) -> Path:
    (folder / f"{name}.scene.json").write_text(json.dumps(info), encoding="utf-8")
    np.savez(folder / f"{name}.scene.npz", **arrays)  # type: ignore[arg-type]
    return folder / f"{name}.scene.json"


def test_a_scene_is_read_field_by_field(tmp_path: Path) -> None:
    info, arrays = content()
    write(tmp_path, "b", info, arrays)
    write(tmp_path, "a", info, arrays)
    scenes = list(read_vectors(tmp_path))
    assert [scene.name for scene in scenes] == ["a", "b"]
    scene = scenes[0]
    reference = scene.reference
    assert reference.map_layer.tolist() == [MapLayer.LANE, MapLayer.ROADBLOCK, MapLayer.LANE]
    assert reference.map_on_route.tolist() == [True, False, False]
    assert reference.agent_type.tolist() == [AgentType.STATIC, AgentType.PEDESTRIAN]
    assert reference.agent_size.tolist() == [[0.4, 0.3], [0.6, 0.7]]
    assert reference.ego_init.tolist() == list(range(11))
    assert (reference.t0_us, reference.speed_limit, scene.kind) == (10_000_000, 13.4, "by_hand")
    assert scene.tags == ("human", "stand_still")
    assert scene.prev_tags == ("consistent", "noisy")
    assert scene.candidates.tolist() == np.ones((2, 8, 3)).tolist()


def test_optional_content_may_be_missing(tmp_path: Path) -> None:
    info, arrays = content()
    for key in ("prev_cand", "pdm_ref_v1", "pdm_ref_v2"):
        del arrays[key]
    for key in ("cand_tags", "prev_tags", "kind", "speed_limit_mps"):
        del info[key]
    scene = read_vector(write(tmp_path, "a", info, arrays))
    assert scene.tags == ("", "")
    assert scene.prev_candidates.shape == (0, 8, 3)
    assert scene.reference.pdm_reference_v1.shape == (0, 3)
    assert np.isnan(scene.reference.speed_limit)


def test_a_scene_without_agents_or_lights_is_read(tmp_path: Path) -> None:
    info, arrays = content()
    info |= {"agents": [], "red_lights": []}
    arrays |= {"agent_pose": np.zeros((0, 51, 3)), "agent_vel": np.zeros((0, 51, 2))}
    arrays |= {"agent_valid": np.zeros((0, 51), dtype=bool), "red_active": np.zeros((0, 51), dtype=bool)}
    arrays |= {"red_vertices": np.zeros((0, 2)), "red_offsets": np.zeros(1, dtype=np.int64)}
    assert read_vector(write(tmp_path, "a", info, arrays)).reference.agent_size.shape == (0, 2)


def test_truncated_and_missing_files_are_named(tmp_path: Path) -> None:
    path = write(tmp_path, "a", *content())
    npz = tmp_path / "a.scene.npz"
    whole = npz.read_bytes()
    for length in (0, 100, len(whole) // 2, len(whole) - 10):
        npz.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"a\.scene\.npz: not a complete NPZ"):
            read_vector(path)
    npz.write_bytes(whole[:2000] + b"\xff" * 400 + whole[2400:])
    with pytest.raises(DataError, match=r"a\.scene\.npz: not a complete NPZ"):
        read_vector(path)
    npz.unlink()
    with pytest.raises(DataError, match=r"a\.scene\.npz: missing"):
        read_vector(path)
    path.write_text(path.read_text()[:200])
    with pytest.raises(DataError, match=r"a\.scene\.json: not readable as JSON"):
        read_vector(path)
    path.write_text("[]")
    with pytest.raises(DataError, match=r"a\.scene\.json: must hold a JSON object; got list"):
        read_vector(path)


def test_pickled_arrays_are_refused(tmp_path: Path) -> None:
    info, arrays = content()
    arrays["cand"] = np.array([{"code": 1}], dtype=object)
    with pytest.raises(DataError, match=r"a\.scene\.npz: .*pickle"):
        read_vector(write(tmp_path, "a", info, arrays))


def test_an_array_that_is_no_npz_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "a", *content())
    with (tmp_path / "a.scene.npz").open("wb") as stream:
        np.save(stream, np.zeros(3))
    with pytest.raises(DataError, match=r"a\.scene\.npz: not a complete NPZ"):
        read_vector(path)
    with zipfile.ZipFile(tmp_path / "a.scene.npz", "w") as archive:
        archive.writestr("cand.npy", b"nothing")
    with pytest.raises(DataError, match=r"a\.scene\.npz: not a complete NPZ"):
        read_vector(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"map": [{"token": "7", "layer": "MOAT"}] * 3}, r"a\.scene\.json.*unknown map layer 'MOAT'; known: LANE, "),
        ({"agents": [{"token": "a", "type": "VEHICLE"}]}, r"a\.scene\.json.*lacks the key 'length'"),
        ({"agents": []}, r"a\.scene\.json.*agent_pose must have shape \[0, 51, 3\]; got \[2, 51, 3\]"),
        ({"cand_tags": ["one"]}, r"a\.scene\.json: cand must be \[1, 8, 3\], one per tag; got \[2, 8, 3\]"),
        ({"t0_us": None}, r"a\.scene\.json"),
        ({"map": 3}, r"a\.scene\.json"),
    ],
)
def test_wrong_content_names_file_and_reason(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    info, arrays = content()
    path = write(tmp_path, "a", info | change, arrays)
    with pytest.raises(DataError, match=message):
        read_vector(path)


@pytest.mark.parametrize("key", ["cand", "ego_init", "map_vertices", "agent_vel"])
def test_a_missing_array_is_named(tmp_path: Path, key: str) -> None:
    info, arrays = content()
    del arrays[key]
    with pytest.raises(DataError, match=rf"a\.scene\.json.*lacks the key '{key}'"):
        read_vector(write(tmp_path, "a", info, arrays))


def test_a_world_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    info, arrays = content()
    arrays["map_vertices"][3, 1] = np.nan
    with pytest.raises(DataError, match=r"a\.scene\.json.*map_xy holds a value that is not finite at index \[3, 1\]"):
        read_vector(write(tmp_path, "a", info, arrays))


def test_an_empty_or_absent_folder_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match=r"no \*\.scene\.json file found"):
            next(read_vectors(folder))
