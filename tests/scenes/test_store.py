"""The scene store: bit-exact round trips, and every way in which a folder can be unusable."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from oracles.random_scene import bits, make_scene

from rlhf_drive.errors import DataError
from rlhf_drive.scenes import Observation, Scene, SceneReference
from rlhf_drive.scenes.columns import arrow_schema
from rlhf_drive.scenes.manifest import file_sha256
from rlhf_drive.scenes.store import SceneStore, write_scenes


def write(path: Path, count: int = 7, **options: object) -> list[Scene]:
    """Write `count` scenes, every third one held out, three to a shard."""
    scenes = [make_scene(seed) for seed in range(count)]
    split_of = {s.token: "heldout" if i % 3 == 2 else "train" for i, s in enumerate(scenes)}
    write_scenes(path, scenes, split_of=split_of, info={"seed": 5}, **{"shard_size": 3, **options})
    return scenes


def edit_manifest(path: Path, **changes: object) -> None:
    manifest = json.loads((path / "scenes.json").read_text())
    (path / "scenes.json").write_text(json.dumps(manifest | changes))


def tree(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_round_trip_keeps_every_bit(tmp_path: Path) -> None:
    scenes = write(tmp_path / "store")
    store = SceneStore.open(tmp_path / "store")
    assert [bits(scene) for scene in store] == [bits(scene) for scene in scenes]
    assert store.tokens == tuple(scene.token for scene in scenes)
    assert store.kinds == tuple(scene.kind for scene in scenes)
    assert store.challenging == tuple(scene.challenging for scene in scenes)
    assert store.info == {"seed": 5}
    assert len(list((tmp_path / "store").glob("*.arrow"))) == 3  # 7 scenes, three to a shard


def test_shards_larger_than_a_record_batch_keep_their_order(tmp_path: Path) -> None:
    scenes = write(tmp_path / "store", 70, shard_size=40)  # record batches of 32 + 8 and 30
    store = SceneStore.open(tmp_path / "store")
    assert [bits(store[i]) for i in (0, 31, 32, 39, 40, 69)] == [bits(scenes[i]) for i in (0, 31, 32, 39, 40, 69)]
    assert [entry["count"] for entry in json.loads((tmp_path / "store/scenes.json").read_text())["shards"]] == [40, 30]


def test_split_indices_and_scenes(tmp_path: Path) -> None:
    scenes = write(tmp_path / "store")
    store = SceneStore.open(tmp_path / "store")
    assert store.indices("train") == [0, 1, 3, 4, 6]
    assert store.indices("heldout") == [2, 5]
    assert [bits(scene) for scene in store.split("heldout")] == [bits(scenes[2]), bits(scenes[5])]
    with pytest.raises(DataError, match="Did you mean 'heldout'"):
        store.indices("held_out")


def test_reading_is_lazy_read_only_and_fast(tmp_path: Path) -> None:
    write(tmp_path / "store", 64, shard_size=64)
    store = SceneStore.open(tmp_path / "store")
    with pytest.raises(ValueError, match="read-only"):
        store[3].reference.map_xy[0, 0] = 1.0
    times = []
    for i in range(64):
        start = time.thread_time()
        store[i]
        times.append(time.thread_time() - start)
    assert np.median(times) < 1e-3  # seconds of this thread


def test_store_columns_cover_the_data_model() -> None:
    expected = {f"obs_{f.name}" for f in fields(Observation)} | {f"ref_{f.name}" for f in fields(SceneReference)}
    expected |= {"token", "kind", "cluster", "challenging", "split"}
    assert set(arrow_schema().names) == expected


@pytest.mark.parametrize("absent", ["human_poses", "past", "prev_ego_init", "all"])
def test_what_a_source_lacks_stays_explicitly_empty(tmp_path: Path, absent: str) -> None:
    empty = {
        "human_poses": {"human_poses": np.zeros((0, 3))},
        "past": {"past_states": np.zeros((0, 11)), "past_times_us": np.zeros(0, dtype=np.int64)},
        "prev_ego_init": {"prev_ego_init": np.zeros(0), "prev_t0_us": 0},
    }
    changes = {k: v for name, group in empty.items() if absent in (name, "all") for k, v in group.items()}
    scenes = [make_scene(1).with_reference(**changes), make_scene(2)]
    split_of = {"scene-1": "train", "scene-2": "heldout"}
    write_scenes(tmp_path / "store", scenes, split_of=split_of, info={})
    assert [bits(scene) for scene in SceneStore.open(tmp_path / "store")] == [bits(scene) for scene in scenes]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"human_poses": np.zeros((7, 3))},
            r"human_poses must have shape \[8, 3\], or \[0, 3\] if unknown; got \[7, 3\]",
        ),
        ({"prev_ego_init": np.zeros(10)}, r"prev_ego_init must have shape \[11\], or \[0\] if unknown; got \[10\]"),
        ({"past_states": np.zeros((0, 11))}, "4 past_times_us for 0 past_states"),
        ({"past_times_us": np.zeros(0, dtype=np.int64)}, "0 past_times_us for 4 past_states"),
    ],
)
def test_half_of_something_is_refused(changes: dict[str, object], match: str) -> None:
    with pytest.raises(DataError, match=match):
        make_scene(1).with_reference(**changes)


@pytest.mark.parametrize("cameras", [{"CAM_F0": Path("a.jpg")}, {1: "a.jpg"}, ["a.jpg"], "a.jpg"])
def test_cameras_that_are_no_text_are_refused(cameras: object) -> None:
    with pytest.raises(DataError, match=r"Observation\.cameras must map camera names to image paths"):
        replace(make_scene(1).observation, cameras=cameras)


def test_store_of_format_version_1_still_opens(tmp_path: Path) -> None:
    import pyarrow as pa

    scenes = write(tmp_path / "store")
    for path in sorted((tmp_path / "store").glob("*.arrow")):
        with path.open("rb") as file:
            table = pa.ipc.open_stream(file).read_all().drop_columns(["obs_cameras"])
        assert table.schema.names == arrow_schema(1).names
        with path.open("wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    vouch(tmp_path / "store", version=1)
    read = list(SceneStore.open(tmp_path / "store"))
    bare = [replace(s, observation=replace(s.observation, cameras={})) for s in scenes]
    assert [bits(scene) for scene in read] == [bits(scene) for scene in bare]


def vouch(store: Path, **changes: object) -> None:
    """Describe the shards as they are now in the manifest."""
    shards = json.loads((store / "scenes.json").read_text())["shards"]
    for shard in shards:
        path = store / shard["file"]
        shard |= {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    edit_manifest(store, shards=shards, **changes)


def test_same_scenes_make_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b")
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_scenes_are_consumed_as_a_stream(tmp_path: Path) -> None:
    shards_on_disk: list[int] = []

    def stream() -> Iterator[Scene]:
        for seed in range(40):
            (folder,) = tmp_path.glob(".store.*.partial")
            shards_on_disk.append(len(list(folder.glob("*.arrow"))))
            yield make_scene(seed)

    split_of = {f"scene-{seed}": "train" for seed in range(40)}
    write_scenes(tmp_path / "store", stream(), split_of=split_of, info={}, shard_size=8)
    assert shards_on_disk[::8] == [0, 1, 2, 3, 4]  # a shard is written before the next one's first scene is asked for


def test_info_and_splits_may_be_filled_while_scenes_are_made(tmp_path: Path) -> None:
    info: dict[str, object] = {"seed": 1}
    split_of: dict[str, str] = {}

    def stream() -> Iterator[Scene]:
        for seed in range(3):
            split_of[f"scene-{seed}"] = "heldout" if seed == 1 else "train"
            yield make_scene(seed)
        info["refused"] = {"scene-9": "no road"}

    write_scenes(tmp_path / "store", stream(), split_of=split_of, info=info)
    store = SceneStore.open(tmp_path / "store")
    assert (store.info, store.indices("heldout")) == ({"seed": 1, "refused": {"scene-9": "no road"}}, [1])


def test_interrupted_writing_leaves_the_old_store(tmp_path: Path) -> None:
    write(tmp_path / "store", 4)
    before = tree(tmp_path)

    def broken() -> Iterator[Scene]:
        yield make_scene(8)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_scenes(tmp_path / "store", broken(), split_of={"scene-8": "train"}, info={}, overwrite=True)
    assert tree(tmp_path) == before


def test_overwriting_must_be_asked_for(tmp_path: Path) -> None:
    write(tmp_path / "store", 4)
    before = tree(tmp_path)
    with pytest.raises(DataError, match="overwrite=True"):
        write(tmp_path / "store", 5)
    assert tree(tmp_path) == before
    write(tmp_path / "store", 5, overwrite=True)
    assert len(SceneStore.open(tmp_path / "store")) == 5
    assert [p.name for p in tmp_path.iterdir()] == ["store"]  # nothing left beside it


@pytest.mark.parametrize("with_manifest", [False, True])
def test_folder_of_somebody_else_is_left_alone(tmp_path: Path, with_manifest: bool) -> None:
    folder = tmp_path / "store"
    if with_manifest:
        write(folder, 4)
    folder.mkdir(exist_ok=True)
    (folder / "thesis.txt").write_text("years of work")
    before = tree(tmp_path)
    with pytest.raises(DataError, match=r"thesis\.txt|not a scene store"):
        write(folder, 5, overwrite=True)
    assert tree(tmp_path) == before


def test_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    assert len(write(tmp_path / "store", 4)) == len(SceneStore.open(tmp_path / "store"))


def refused(tmp_path: Path, scenes: list[Scene], split_of: dict[str, str], info: dict[str, object], match: str) -> None:
    with pytest.raises(DataError, match=match):
        write_scenes(tmp_path / "store", scenes, split_of=split_of, info=info)
    assert list(tmp_path.iterdir()) == []


def test_unusable_input_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    one, two = make_scene(1), make_scene(2)
    refused(tmp_path, [], {}, {}, "no scene to write")
    refused(tmp_path, [one, one], {"scene-1": "train"}, {}, "'scene-1' occurs twice")
    refused(tmp_path, [one, two], {"scene-1": "train"}, {}, "'scene-2' has split None")
    refused(tmp_path, [one], {"scene-1": "test"}, {}, "'scene-1' has split 'test'")
    refused(tmp_path, [one], {"scene-1": "train"}, {"folder": tmp_path}, "JSON")


def test_cluster_is_never_divided(tmp_path: Path) -> None:
    scenes = [make_scene(1, cluster="road"), make_scene(2, cluster="road")]
    refused(tmp_path, scenes, {"scene-1": "train", "scene-2": "heldout"}, {}, "Cluster 'road' would be divided")


def damage(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_altered_shard_is_named(tmp_path: Path) -> None:
    write(tmp_path / "store")
    damage(tmp_path / "store/scenes-00001.arrow", -3000)
    before = tree(tmp_path)
    with pytest.raises(DataError, match=r"scenes-00001\.arrow is altered: SHA-256"):
        SceneStore.open(tmp_path / "store")
    assert tree(tmp_path) == before
    assert len(SceneStore.open(tmp_path / "store", verify=False)) == 7  # asked not to look


def test_truncated_shard_is_named_even_unverified(tmp_path: Path) -> None:
    write(tmp_path / "store")
    path = tmp_path / "store/scenes-00002.arrow"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"scenes-00002\.arrow has \d+ bytes where \d+ were written"):
        SceneStore.open(tmp_path / "store", verify=False)


def test_missing_shard_is_named(tmp_path: Path) -> None:
    write(tmp_path / "store")
    (tmp_path / "store/scenes-00000.arrow").unlink()
    with pytest.raises(DataError, match=r"scenes-00000\.arrow is missing"):
        SceneStore.open(tmp_path / "store")


def test_shard_that_is_not_arrow_is_named(tmp_path: Path) -> None:
    write(tmp_path / "store")
    path = tmp_path / "store/scenes-00000.arrow"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(DataError, match=r"scenes-00000\.arrow cannot be read as Arrow|does not hold"):
        SceneStore.open(tmp_path / "store", verify=False)


def test_shards_that_changed_places_are_noticed(tmp_path: Path) -> None:
    write(tmp_path / "store")
    write(tmp_path / "other", 3)
    entry = json.loads((tmp_path / "other/scenes.json").read_text())["shards"][0] | {"file": "scenes-00002.arrow"}
    shutil.copy(tmp_path / "other/scenes-00000.arrow", tmp_path / "store/scenes-00002.arrow")
    shards = json.loads((tmp_path / "store/scenes.json").read_text())["shards"]
    edit_manifest(tmp_path / "store", shards=[*shards[:2], entry | {"count": 1}])
    with pytest.raises(DataError, match=r"scenes-00002\.arrow does not hold the 1 scenes"):
        SceneStore.open(tmp_path / "store")


def test_manifest_that_is_missing_cut_off_or_foreign(tmp_path: Path) -> None:
    write(tmp_path / "store")
    manifest = tmp_path / "store/scenes.json"
    content = manifest.read_text()
    manifest.write_text(content[:-40])
    with pytest.raises(DataError, match=r"scenes\.json cannot be read"):
        SceneStore.open(tmp_path / "store")
    manifest.write_text("[1]")
    with pytest.raises(DataError, match="does not describe a scene store"):
        SceneStore.open(tmp_path / "store")
    manifest.unlink()
    with pytest.raises(DataError, match=r"scenes\.json is missing"):
        SceneStore.open(tmp_path / "store")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"format": "somebody's scenes"}, "does not describe a scene store"),
        ({"version": 3}, "format version 3; this installation reads 1 and 2"),
        ({"version": True}, "format version True; this installation reads 1 and 2"),
        ({"version": 1}, "does not hold the 3 scenes"),
        ({"count": 8}, "contradicts itself"),
        ({"splits": {"train": 4, "heldout": 3}}, "its shards hold"),
        ({"splits": 7}, "is incomplete"),
        ({"shards": [{"file": "a.arrow"}]}, "is incomplete"),
        ({"shards": [{"file": "../a.arrow", "count": 7, "bytes": 1, "sha256": ""}]}, "is incomplete"),
    ],
)
def test_manifest_that_is_wrong(tmp_path: Path, changes: dict[str, object], match: str) -> None:
    write(tmp_path / "store")
    edit_manifest(tmp_path / "store", **changes)
    with pytest.raises(DataError, match=match):
        SceneStore.open(tmp_path / "store")


def test_index_out_of_range(tmp_path: Path) -> None:
    write(tmp_path / "store", 4)
    store = SceneStore.open(tmp_path / "store")
    with pytest.raises(IndexError, match="Scene 4 of 4"):
        store[4]
    with pytest.raises(IndexError, match="Scene -1 of 4"):
        store[-1]


def test_stored_scene_can_be_changed_into_a_new_one(tmp_path: Path) -> None:
    write(tmp_path / "store", 4)
    scene = SceneStore.open(tmp_path / "store")[1]
    changed = replace(scene.with_reference(speed_limit=5.0), token="other")
    assert (changed.reference.speed_limit, scene.token) == (5.0, "scene-1")
