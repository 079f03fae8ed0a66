"""From a source to a store: what is refused, what is challenging, who is held out, and when a store is reused."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rewards.pdms import score_pdms
from rewards.prepare import prepare_scene
from rlhf_drive.config import ScenesSection
from rlhf_drive.errors import ConfigError, DataError
from rlhf_drive.scenes import Scene
from rlhf_drive.scenes.generator import generate_scenes
from rlhf_drive.scenes.importers.navsim import import_navsim
from rlhf_drive.scenes.importers.recorded import Refused
from rlhf_drive.scenes.store import SceneStore
from rlhf_drive.training import judge as judging
from rlhf_drive.training import scenes as module
from rlhf_drive.training.judge import Judged, judge, judge_imported
from rlhf_drive.training.scenes import build_scenes, check_store, open_scenes, split_of_cluster

GENERATED = ScenesSection(source="generate", path=None, store=None, count=10, seed=3, heldout_fraction=0.3)
SMALL = ("womd_1c365f15b70ebdbf", "womd_74e892ddfe3b9b8", "womd_a0d7dc6be757", "womd_965472cb24cb397b")
"""Small recordings; with seed 7 and a quarter held out, the third is held out."""


@pytest.fixture(scope="module")
def raw() -> list[Scene]:
    """A generated scene of every kind, as the generator leaves it."""
    return list(generate_scenes(12, seed=3))


@pytest.fixture
def recordings(recorded_scenes: Path, tmp_path: Path) -> Path:
    """Own copy of a few small recordings."""
    folder = tmp_path / "recordings"
    folder.mkdir()
    for name in SMALL:
        for end in (".json", ".npz"):
            if not (recorded_scenes / f"{name}{end}").is_file():
                pytest.skip(f"{recorded_scenes} lacks {name}{end}")
            shutil.copyfile(recorded_scenes / f"{name}{end}", folder / f"{name}{end}")
    return folder


def recorded(folder: Path, **changes: Any) -> ScenesSection:
    """Section of a recipe for a folder of recordings."""
    section = ScenesSection(source="recorded", path=str(folder), store=None, seed=7, heldout_fraction=0.25)
    return replace(section, **changes)


def names_of(tokens: Sequence[str]) -> list[str]:
    """Recording of each token, sorted, once."""
    return sorted({token.partition("__")[0] for token in tokens})


def test_judging_adds_references_scores_and_the_flag(raw: list[Scene]) -> None:
    judged = [judge(scene, min_human_pdms=0.0) for scene in raw]
    flags = []
    for scene, item in zip(raw, judged, strict=True):
        assert isinstance(item, Judged)
        assert item.scene.reference.pdm_reference_v1.shape == (41, 3)
        assert item.scene.observation is scene.observation
        prepared = prepare_scene(item.scene.reference)
        straight = np.zeros((8, 3))
        straight[:, 0] = scene.reference.ego_init[3] * np.arange(0.5, 4.1, 0.5)
        plans = np.stack([scene.reference.human_poses, straight, np.zeros((8, 3))])
        human, constant, still = score_pdms(prepared, plans).pdms
        assert item.scores["human"] == human
        assert item.scores["constant_velocity"] == constant
        assert item.scores["stand_still"] == still
        assert item.scene.challenging == (constant < 0.8 <= human)
        flags.append(item.scene.challenging)
    assert 2 <= sum(flags) <= 10


def test_a_scene_in_which_the_human_does_badly_is_not_challenging(raw: list[Scene]) -> None:
    """A human who drives the same path at a third of the speed scores below 0.8 for lack of progress."""
    times = np.arange(0.0, 4.1, 0.5)
    hard = 0
    for scene in raw:
        path = np.concatenate([np.zeros((1, 3)), scene.reference.human_poses])
        slow = np.stack([np.interp(times[1:] / 3.0, times, path[:, i]) for i in range(3)], axis=1)
        item = judge(scene.with_reference(human_poses=slow), min_human_pdms=0.0)
        if isinstance(item, Judged) and item.scores["human"] < 0.8:
            hard += item.scores["constant_velocity"] < 0.8
            assert not item.scene.challenging
    assert hard >= 2


def test_a_human_who_fails_is_refused_with_the_reason(raw: list[Scene]) -> None:
    scene = raw[0]
    good = judge(scene, min_human_pdms=0.0)
    assert isinstance(good, Judged)
    off_road = scene.with_reference(human_poses=scene.reference.human_poses + np.array([0.0, 40.0, 0.0]))
    assert judge(off_road, min_human_pdms=0.0) == Refused(
        scene.token, "the human collides, leaves the road or makes no progress"
    )
    human = good.scores["human"]
    assert isinstance(judge(scene, min_human_pdms=human), Judged)
    refused = judge(scene, min_human_pdms=human + 1e-6)
    assert isinstance(refused, Refused)
    assert f"the human scores {human:.2f} PDMS, less than" in refused.reason


def test_a_scene_that_cannot_be_scored_is_refused_not_raised(raw: list[Scene], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(scene: Scene) -> Scene:
        raise DataError("no lane below the ego")

    monkeypatch.setattr(judging, "attach_references", fail)
    assert judge(raw[0], min_human_pdms=0.0) == Refused(raw[0].token, "no lane below the ego")


def test_a_split_is_a_function_of_the_cluster() -> None:
    clusters = [f"recorded-{i}" for i in range(4000)]
    few = {c for c in clusters if split_of_cluster(c, 7, 0.1) == "heldout"}
    many = {c for c in clusters if split_of_cluster(c, 7, 0.3) == "heldout"}
    other = {c for c in clusters if split_of_cluster(c, 8, 0.3) == "heldout"}
    assert few < many
    # Binomial: 400 +- 19 and 1200 +- 29; four deviations are allowed.
    assert abs(len(few) - 400) < 76
    assert abs(len(many) - 1200) < 116
    assert 0.2 < len(many & other) / len(many) < 0.4
    assert {split_of_cluster(c, 7, 0.0) for c in clusters} == {"train"}
    assert {split_of_cluster(c, 7, 1.0) for c in clusters} == {"heldout"}


def test_more_scenes_move_no_scene_across(tmp_path: Path) -> None:
    small = build_scenes(GENERATED, tmp_path / "small", workers=1)
    large = build_scenes(replace(GENERATED, count=16), tmp_path / "large", workers=1)
    assert large.tokens[: len(small)] == small.tokens
    heldout = {scene.token for scene in large.split("heldout")}
    assert {scene.token for scene in small.split("heldout")} == heldout & set(small.tokens)
    assert 0 < len(heldout) < 16


def test_the_number_of_workers_does_not_show(tmp_path: Path) -> None:
    section = replace(GENERATED, count=27)  # two pieces of work
    stores = [build_scenes(section, tmp_path / f"store{n}", workers=n).path for n in (1, 2)]
    files = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in stores]
    assert sorted(files[0]) == ["scenes-00000.arrow", "scenes.json"]
    assert files[0] == files[1]


def test_finished_work_does_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs are handed out in order, and no more than two for each worker before the first result is taken."""
    submitted: list[int] = []

    class Pool:
        def __init__(self, *_: object, **__: object) -> None:
            self.cancelled = False

        def __enter__(self) -> Pool:
            return self

        def __exit__(self, *_: object) -> None:
            assert self.cancelled

        def submit(self, _: object, job: int) -> Future[int]:
            submitted.append(job)
            future: Future[int] = Future()
            future.set_result(job)
            return future

        def shutdown(self, *, cancel_futures: bool) -> None:
            self.cancelled = cancel_futures

    monkeypatch.setattr(module, "ProcessPoolExecutor", Pool)
    results = module._run_jobs(range(100), 3)  # type: ignore[arg-type]
    taken = []
    for result in results:
        taken.append(result)
        assert len(submitted) <= len(taken) + 2 * 3
        if len(taken) == 50:
            break
    results.close()  # type: ignore[attr-defined]
    assert taken == list(range(50))
    submitted.clear()
    assert list(module._run_jobs(range(20), 3)) == list(range(20))  # type: ignore[arg-type]


def test_refusals_beyond_what_a_manifest_holds_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raw: list[Scene]
) -> None:
    judged = [item for item in (judge(scene, min_human_pdms=0.0) for scene in raw) if isinstance(item, Judged)]
    items = [[Refused(f"bad-{i}", "no road") for i in range(7)], judged, [Refused("bad-0", "twice")]]
    monkeypatch.setattr(module, "REFUSALS_KEPT", 5)
    monkeypatch.setattr(module, "_run_jobs", lambda jobs, workers: iter(items))
    lines: list[str] = []
    store = build_scenes(GENERATED, tmp_path / "store", workers=1, on_progress=lambda *a: lines.append(a[2]))
    assert store.info["refused"] == {"bad-0": "twice"} | {f"bad-{i}": "no road" for i in range(1, 5)}
    assert store.info["refused_more"] == 2
    assert lines[-1] == f"{len(judged)} scenes, 7 refused"
    mean = {name: round(float(np.mean([i.scores[name] for i in judged])), 4) for name in judged[0].scores}
    assert store.info["pdms"] == mean


def test_a_store_is_reused_only_for_what_it_was_made_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = replace(GENERATED, store=str(tmp_path / "store"), min_human_pdms=0.5)
    made = open_scenes(section, tmp_path / "run")
    assert made.info["count"] == 10
    monkeypatch.setattr(module, "build_scenes", None)  # from here on, a call would fail
    assert open_scenes(section, tmp_path / "elsewhere").tokens == made.tokens
    changes: list[tuple[dict[str, Any], str]] = [
        ({"count": 11}, "count: 10 there, 11 here"),
        ({"seed": 4}, "seed: 3 there, 4 here"),
        ({"heldout_fraction": 0.4}, "heldout_fraction: 0.3 there, 0.4 here"),
        ({"min_human_pdms": 0.8}, "min_human_pdms: 0.5 there, 0.8 here"),
        ({"kinds": ("curve",)}, r"wanted_kinds: \[\] there, \['curve'\] here"),
    ]
    for change, message in changes:
        with pytest.raises(ConfigError, match=f"was made otherwise.*{message}"):
            open_scenes(replace(section, **change), tmp_path / "run")
    taken = open_scenes(replace(section, source="store", seed=99), tmp_path / "run")
    assert taken.tokens == made.tokens
    with pytest.raises(ConfigError, match=r"scenes.store must name the folder"):
        open_scenes(replace(section, source="store", store=None), tmp_path / "run")


def test_a_store_of_other_recordings_is_refused(recordings: Path, tmp_path: Path) -> None:
    section = recorded(recordings, store=str(tmp_path / "store"))
    made = build_scenes(section, tmp_path / "store", workers=1)
    moved = recordings.rename(tmp_path / "moved")
    assert open_scenes(replace(section, path=str(moved)), tmp_path / "run").tokens == made.tokens
    for end in (".json", ".npz"):
        (moved / f"{SMALL[1]}{end}").unlink()
    with pytest.raises(ConfigError, match=r"was made otherwise.*recordings: 4 by the names .* there, 3 by the names"):
        open_scenes(replace(section, path=str(moved)), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"was made otherwise.*source: recorded there, generate here"):
        open_scenes(replace(GENERATED, store=section.store), tmp_path / "run")


def test_an_empty_split_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Split 'heldout' would be empty: 3 usable scenes in 3 clusters"):
        build_scenes(replace(GENERATED, count=3, heldout_fraction=1e-9), tmp_path / "store", workers=1)
    assert list(tmp_path.iterdir()) == []


def test_the_store_notes_what_became_of_the_scenes(tiny_store: SceneStore) -> None:
    info = tiny_store.info
    assert Counter(tiny_store.kinds) == info["kinds"]
    human = [score_pdms(prepare_scene(s.reference), s.reference.human_poses[None]).pdms[0] for s in tiny_store]
    assert info["pdms"]["human"] == round(float(np.mean(human)), 4)
    assert len(tiny_store) + len(info["refused"]) == info["count"] == 48


def test_a_broken_recording_among_good_ones(recordings: Path, tmp_path: Path) -> None:
    broken, lonely = SMALL[1], SMALL[3]
    path = recordings / f"{broken}.npz"
    path.write_bytes(path.read_bytes()[:1000])
    (recordings / f"{lonely}.npz").unlink()
    (recordings / "notes.json").write_text('{"about": "not a recording"}')
    store = build_scenes(recorded(recordings), tmp_path / "store", workers=1)
    assert names_of(store.tokens) == sorted([SMALL[0], SMALL[2]])
    assert sorted(store.info["refused"]) == sorted([broken, lonely])
    assert all(f"{name}.npz" in store.info["refused"][name] for name in (broken, lonely))
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in (SMALL[0], SMALL[2]):
        for end in (".json", ".npz"):
            shutil.copyfile(recordings / f"{name}{end}", alone / f"{name}{end}")
    other = build_scenes(recorded(alone), tmp_path / "other", workers=1)
    assert [p.read_bytes() for p in sorted(store.path.glob("*.arrow"))] == [
        p.read_bytes() for p in sorted(other.path.glob("*.arrow"))
    ]


def test_clusters_are_not_divided_and_heldout_starts_do_not_overlap(recordings: Path, tmp_path: Path) -> None:
    recommended = build_scenes(recorded(recordings), tmp_path / "recommended", workers=1)
    moving = build_scenes(recorded(recordings, starts="moving"), tmp_path / "moving", workers=1)
    for store in (recommended, moving):
        clusters = [{scene.cluster for scene in store.split(name)} for name in ("train", "heldout")]
        assert clusters[0] & clusters[1] == set()
        assert names_of([scene.token for scene in store.split("heldout")]) == [SMALL[2]]
    tokens = [{scene.token for scene in store.split("heldout")} for store in (recommended, moving)]
    assert tokens[0] == tokens[1]
    assert len(moving.indices("train")) > 2 * len(recommended.indices("train"))
    assert {scene.token for scene in recommended.split("train")} < {scene.token for scene in moving.split("train")}


def _cache_section(navsim_golden: Path, version: str, fraction: float = 0.5) -> ScenesSection:
    return ScenesSection(
        source="navsim", path=str(navsim_golden / "metric_caches" / version), store=None, heldout_fraction=fraction
    )


def test_metric_caches_become_a_store_with_their_own_reference(navsim_golden: Path, tmp_path: Path) -> None:
    """A cache keeps the reference it brings; a split may be empty, since caches may be there to be scored."""
    seen: list[tuple[int, int]] = []
    for version, metric, lacks in (("v1_1", "pdms", "pdm_reference_v2"), ("v2_2", "epdms", "pdm_reference_v1")):
        store = build_scenes(
            _cache_section(navsim_golden, version, 1e-9), tmp_path / version, workers=1,
            on_progress=lambda done, total, _: seen.append((done, total)),
        )  # fmt: skip
        assert (len(store.indices("train")), len(store.indices("heldout"))) == (4, 0)
        assert all(len(getattr(scene.reference, lacks)) == 0 for scene in store)
        assert store.info["source"] == "navsim"
        assert 0.5 < store.info[metric]["pdm_closed"] < 1.0
        assert store.info["refused"] == {}
    assert seen == [(i, 4) for i in (1, 2, 3, 4)] * 2


def test_what_the_human_scores_decides_about_a_cache(navsim_golden: Path) -> None:
    items = list(import_navsim(navsim_golden / "metric_caches" / "v2_2"))
    judged = [judge_imported(item, min_human_score=0.0) for item in items if isinstance(item, Scene)]
    assert len(judged) == 4
    for item in judged:
        assert isinstance(item, Judged)
        human = item.scores["human"]
        again = judge_imported(item.scene, min_human_score=human + 1e-6)
        assert isinstance(again, Refused)
        assert f"the human scores {human:.2f} EPDMS" in again.reason
        assert item.scene.challenging == (item.scores["constant_velocity"] < 0.8 <= human)
    assert {item.scene.challenging for item in judged if isinstance(item, Judged)} == {True, False}


def test_a_store_that_a_job_cannot_use_is_refused_before_it_starts(
    navsim_golden: Path, tmp_path: Path, tiny_store: SceneStore
) -> None:
    check_store(tiny_store, ["train", "heldout"], ["pdms", "epdms"])
    store = build_scenes(_cache_section(navsim_golden, "v2_2", 1e-9), tmp_path / "store", workers=1)
    check_store(store, ["train"], ["epdms", "a plug-in's own"])
    with pytest.raises(DataError, match="holds no scene in split 'heldout'"):
        check_store(store, ["train", "heldout"], ["epdms"])
    with pytest.raises(DataError, match="cannot be scored by pdms: its scenes hold a reference for epdms alone"):
        check_store(store, ["train"], ["epdms", "pdms"])
