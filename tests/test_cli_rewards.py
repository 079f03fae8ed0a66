"""`rlhf-drive rewards` and `rlhf-drive score` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from rewards.pdm_closed import attach_references
from rlhf_drive.cli import main
from rlhf_drive.scenes import Scene
from rlhf_drive.scenes.generator import generate_scenes
from rlhf_drive.scenes.store import write_scenes


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[Scene]]:
    """A scene store, the human's plans for it in a file, and the scenes."""
    folder = tmp_path_factory.mktemp("score")
    scenes = [attach_references(scene) for scene in generate_scenes(4, seed=4)]
    write_scenes(folder / "store", scenes, split_of={scene.token: "train" for scene in scenes}, info={})
    plans = np.stack([scene.reference.human_poses for scene in scenes])
    np.savez(folder / "plans.npz", scene=np.array([scene.token for scene in scenes]), poses=plans)
    return folder / "store", folder / "plans.npz", scenes


def _run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return int(stopped.value.code or 0), *capsys.readouterr()


def test_rewards_and_scorers_are_listed_once(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = _run(capsys, "rewards", "list")
    lines = [line.split() for line in out.splitlines() if line.startswith("  ")]
    assert ["no_collision", "=", "nc"] in lines
    assert [words[0] for words in lines].count("epdms") == 2  # the scorer, and its aggregate as a reward
    assert "[human_filter: str]" in out


def test_a_reward_is_shown_with_options_and_needs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    _, out, _ = _run(capsys, "rewards", "show", "epdms_two_frame")
    assert "needs components: epdms, ec" in out
    assert "needs the plan of the previous frame" in out
    _, out, _ = _run(capsys, "rewards", "show", "epdms")
    assert "scorer: EPDMS (NAVSIM v2.2, human filter on, log replay)" in out
    assert "option human_filter: 'str' = 'on'" in out
    (tmp_path / "mine.py").write_text('def gentle(inputs, *, limit: float = 2.5):\n    """Gentle driving."""\n')
    _, out, _ = _run(capsys, "rewards", "show", tmp_path / "mine.py:gentle")
    assert "Gentle driving." in out
    assert "option limit: float = 2.5" in out
    code, _, err = _run(capsys, "rewards", "show", "gentel")
    assert (code, err.startswith("Error: Unknown reward 'gentel'")) == (2, True)


def test_score_a_store_by_metric_and_by_recipe(
    capsys: pytest.CaptureFixture[str], scored: tuple[Path, Path, list[Scene]], tmp_path: Path
) -> None:
    store, plans, scenes = scored
    code, out, _ = _run(
        capsys, "score", store, "--candidates", plans, "--metric", "epdms", "--human-filter", "off",
        "--out", tmp_path / "e.parquet",
    )  # fmt: skip
    assert code == 0
    assert "4 plans of 4 scenes" in out
    assert "Scorer: EPDMS (NAVSIM v2.2, human filter off, log replay)" in out
    # A recipe's reward counts; what the recipe asks for besides, such as a folder of recordings, does not.
    code, out, _ = _run(
        capsys, "score", store, "--candidates", plans, "--metric", "real_scenes", "--out", tmp_path / "p.parquet"
    )
    assert code == 0
    table = pq.read_table(tmp_path / "p.parquet")
    assert table.column("scene").to_pylist() == [scene.token for scene in scenes]
    mean = 100 * float(np.mean(table.column("pdms").to_numpy()))
    assert f"0 invalid, mean {mean:.2f}" in out
    metadata = json.loads(table.schema.metadata[b"rlhf_drive.scorer"])
    assert (metadata["name"], metadata["version"]) == ("pdms", "NAVSIM v1.1")


def test_wrong_metric_and_missing_plans(
    capsys: pytest.CaptureFixture[str], scored: tuple[Path, Path, list[Scene]], tmp_path: Path
) -> None:
    store, plans, _ = scored
    out = tmp_path / "o.parquet"
    for arguments, message in (
        (("--metric", "epdm"), "Unknown metric 'epdm'. Did you mean 'epdms'"),
        (("--metric", "sft", "--candidates", plans), "The recipe 'sft' has no reward section"),
        ((), "is a scene store, which holds no plans"),
        (("--human-filter", "off", "--candidates", plans), "--human-filter has no effect with --metric pdms"),
        (("--metric", "real_scenes_epdms", "--human-filter", "off"), "has no effect with --metric real_scenes_epdms"),
        (("--metric", "epdms", "--human-filter", "of", "--candidates", plans), "Unknown human_filter 'of'"),
    ):
        code, _, err = _run(capsys, "score", store, "--out", out, *arguments)
        assert (code, message in err) == (2, True), err
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a",), "Write `scenes import FOLDER STORE`"),
        (("navsim", "a", "b"), "with one of recorded, navsim-cache, navsim-logs before FOLDER"),
        (("navsim-logs", "a", "b"), "Logs alone hold no map and cannot be scored"),
        (("navsim-cache", "a", "b", "--starts", "all"), "--starts has no effect for this kind of import"),
        (("navsim-cache", "a", "b", "--cache", "c"), "--cache has no effect"),
        (("a", "b", "--logs", "c"), "--logs has no effect"),
        (("navsim-cache", "nowhere", "b"), "scenes.path: there is no folder 'nowhere'"),
    ],
)
def test_wrong_imports(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str) -> None:
    code, _, err = _run(capsys, "scenes", "import", *arguments)
    assert (code, message in err) == (2, True), err
