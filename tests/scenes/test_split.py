"""Scenes of a store as a sequence: the old list scene for scene, and nothing kept that grows with their number."""

from __future__ import annotations

import hashlib
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from oracles.random_scene import bits, make_scene

from rlhf_drive.errors import DataError
from rlhf_drive.scenes import Scene
from rlhf_drive.scenes import shards as shard_module
from rlhf_drive.scenes.recently_used import RecentlyUsed
from rlhf_drive.scenes.split import SceneSplit, clusters_of, human_known, previous_gaps_us
from rlhf_drive.scenes.store import SceneStore, write_scenes

COUNT = 50


def varied(seed: int) -> Scene:
    """Some without what the human drove, some without a previous frame; pairs share a cluster."""
    scene = replace(make_scene(seed), cluster=f"road-{seed // 2}")
    changes: dict[str, object] = {"human_poses": np.zeros((0, 3))} if seed % 5 == 1 else {}
    changes |= {"prev_ego_init": np.zeros(0), "prev_t0_us": 0} if seed % 7 == 2 else {}
    return scene.with_reference(**changes)


@pytest.fixture(scope="module")
def written() -> list[Scene]:
    return [varied(seed) for seed in range(COUNT)]


@pytest.fixture
def store(tmp_path: Path, written: list[Scene]) -> SceneStore:
    """Record batches of 32 and 8, and of 10."""
    split_of = {s.token: "heldout" if i // 2 % 4 == 1 else "train" for i, s in enumerate(written)}
    write_scenes(tmp_path / "store", written, split_of=split_of, info={}, shard_size=40)
    return SceneStore.open(tmp_path / "store")


@pytest.fixture
def old(written: list[Scene]) -> list[Scene]:
    """What `split("train")` was: a list of all its scenes."""
    return [s for i, s in enumerate(written) if i // 2 % 4 != 1]


def same(found: list[Scene], wanted: list[Scene]) -> bool:
    return [bits(scene) for scene in found] == [bits(scene) for scene in wanted]


@pytest.mark.parametrize("kept", [0, 3, 1000])
def test_a_split_is_the_old_list_scene_for_scene(store: SceneStore, old: list[Scene], kept: int) -> None:
    split = SceneSplit(store, store.rows("train"), kept=kept)
    assert len(split) == len(old) == 38
    for _ in range(2):
        assert same(list(split), old)
    for index in (0, 5, 37, -1, -38, np.int64(7), np.int32(-2)):
        assert bits(split[index]) == bits(old[index])
    for cut in (slice(4), slice(3, 30, 7), slice(None, None, -1), slice(-3, None), slice(40, 50)):
        assert isinstance(split[cut], list)
        assert same(split[cut], old[cut])
    for index in (38, -39):
        with pytest.raises(IndexError, match="of 38"):
            split[index]
    assert same(list(reversed(split)), old[::-1])


def test_columns_say_what_the_scenes_say(store: SceneStore, old: list[Scene]) -> None:
    split = store.split("train")
    assert split.tokens == tuple(s.token for s in old)
    assert split.kinds == tuple(s.kind for s in old)
    assert split.clusters == tuple(s.cluster for s in old)
    assert tuple(clusters_of(split)) == tuple(clusters_of(old)) == split.clusters
    human = [len(s.reference.human_poses) > 0 for s in old]
    assert human_known(split).tolist() == human_known(old).tolist() == human
    assert 0 < sum(human) < len(old)
    gaps = [s.reference.t0_us - s.reference.prev_t0_us if len(s.reference.prev_ego_init) else -1 for s in old]
    assert previous_gaps_us(split).tolist() == previous_gaps_us(old).tolist() == gaps
    assert gaps.count(-1) == len([s for s in old if not len(s.reference.prev_ego_init)]) > 0


def test_columns_read_no_scene(store: SceneStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SceneStore, "__getitem__", None)
    split = store.split("train")
    assert len(split.subset(split.human_known).clusters) == int(split.human_known.sum())
    assert len(split.previous_gaps_us) == len(split)


def test_a_subset_is_a_split(store: SceneStore, old: list[Scene]) -> None:
    split = store.split("train")
    mask = np.array([i % 3 == 0 for i in range(38)])
    assert same(list(split.subset(mask)), old[::3])
    assert same(list(split.subset([5, 2, 2])), [old[5], old[2], old[2]])
    assert len(split.subset([])) == 0


def test_only_the_last_scenes_are_kept(store: SceneStore) -> None:
    """Reading 0, 1, 2 again with room for two reads 0 again; going over all keeps none."""
    reads: list[int] = []

    class Counting:
        path = store.path

        def __getitem__(self, index: int) -> Scene:
            reads.append(index)
            return store[index]

    split = SceneSplit(Counting(), store.rows("train")[:5], kept=2)  # type: ignore[arg-type]
    first = split[0]
    assert split[0] is first
    for index in (1, 0, 2, 1):
        split[index]
    assert reads == [0, 1, 4, 1]  # rows 2 and 3 are held out; 2 displaced 1, since 0 was used after it
    reads.clear()
    assert len(list(split)) == 5
    assert reads == [0, 1, 4, 5, 6]
    assert len(split._recent) == 2
    whole = SceneSplit(store, store.rows("train")[:5], kept=5)
    assert [a is b for a, b in zip(whole, whole, strict=True)] == [True] * 5


def test_it_travels_to_another_process(store: SceneStore, old: list[Scene]) -> None:
    split = store.split("train")
    list(split)
    data = pickle.dumps(split)
    assert len(data) < 8 * len(store) + 5000  # no scene, no cache
    script = (
        "import pickle, sys, hashlib\n"
        "split = pickle.load(sys.stdin.buffer)\n"
        "print(len(split), hashlib.sha256(split[9].reference.map_xy.tobytes()).hexdigest(), split[-1].token)"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", script], input=data, capture_output=True, cwd=root, check=True)
    digest = hashlib.sha256(old[9].reference.map_xy.tobytes()).hexdigest()
    assert done.stdout.decode().split() == ["38", digest, old[-1].token]


def test_threads_read_the_same_scenes(store: SceneStore, old: list[Scene], monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight threads read at random with room for three scenes, one batch and one file."""
    monkeypatch.setattr(shard_module, "OPEN_FILES", 1)
    monkeypatch.setattr(shard_module, "OPEN_BATCHES", 1)
    split = SceneSplit(SceneStore.open(store.path), store.rows("train"), kept=3)
    wanted, wrong = [bits(scene) for scene in old], list[int]()

    def read(seed: int) -> None:
        for index in np.random.default_rng(seed).integers(0, 38, 60).tolist():
            if bits(split[index]) != wanted[index]:
                wrong.append(index)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(split._recent) == 3


def test_no_file_stays_open_and_little_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """40 files of 2 scenes, read back and forth with room for 3 files and 2 batches."""
    monkeypatch.setattr(shard_module, "OPEN_FILES", 3)
    monkeypatch.setattr(shard_module, "OPEN_BATCHES", 2)
    scenes = [make_scene(seed) for seed in range(80)]
    write_scenes(tmp_path / "store", scenes, split_of={s.token: "train" for s in scenes}, info={}, shard_size=2)
    before = len(list(Path("/proc/self/fd").iterdir()))
    store = SceneStore.open(tmp_path / "store")
    split = SceneSplit(store, store.rows("train"), kept=4)
    for index in np.random.default_rng(0).integers(0, 80, 200):
        split[index]
    batches = store._batches
    assert (len(batches._files), len(batches._readers), len(split._recent)) == (3, 2, 4)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    mapped = Path("/proc/self/maps").read_text().count(str(tmp_path / "store"))
    assert mapped <= 3 + 2 + 4


def test_a_file_that_is_cut_off_or_taken_away_while_in_use(store: SceneStore) -> None:
    split = store.split("train")
    path = store.path / "scenes-00001.arrow"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(DataError, match=r"scenes-00001\.arrow has \d+ bytes where \d+ were written"):
        split[-1]
    path.unlink()
    with pytest.raises(DataError, match=r"scenes-00001\.arrow is missing"):
        split[-1]
    path.write_bytes(whole)
    assert split[-1].token == "scene-49"


def test_recently_used_by_size() -> None:
    made: list[str] = []

    def make(name: str) -> str:
        made.append(name)
        return name

    kept: RecentlyUsed[str] = RecentlyUsed(10, len)
    for name in ("four", "four", "sixsix", "four", "a", "sixsix", "elevenchars"):
        assert kept.get(name, lambda name=name: make(name)) == name
    # four + sixsix = 10; a displaces sixsix, since four was used after it; sixsix displaces four; eleven never fits
    assert made == ["four", "sixsix", "a", "sixsix", "elevenchars"]
    assert (len(kept), kept.size) == (2, 7)
    again = pickle.loads(pickle.dumps(kept))
    assert (again.capacity, again.size, again.get("x", lambda: "x")) == (10, 0, "x")


def test_what_cannot_be_made_is_not_kept() -> None:
    kept: RecentlyUsed[int] = RecentlyUsed(3)

    def fail() -> int:
        raise DataError("no")

    with pytest.raises(DataError):
        kept.get(1, fail)
    assert kept.get(1, lambda: 5) == 5


def test_scenes_are_written_from_a_split(store: SceneStore, old: list[Scene], tmp_path: Path) -> None:
    def stream() -> Iterator[Scene]:
        yield from store.split("train")

    write_scenes(tmp_path / "copy", stream(), split_of={s.token: "train" for s in old}, info={})
    assert same(list(SceneStore.open(tmp_path / "copy")), old)
