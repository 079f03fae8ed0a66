"""A folder with another run's checkpoints is refused before anything in it is changed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from oracles.tiny_policy import ARCHITECTURE

from rlhf_drive.errors import CheckpointError
from rlhf_drive.policies import Policy, TrajectoryTokenizer
from rlhf_drive.training.build import build_accelerator
from rlhf_drive.training.checkpoint import CheckpointStore
from rlhf_drive.training.engine import TrainingEngine
from rlhf_drive.training.run_folder import RunIdentity

MINE, OTHER = RunIdentity("mine", "recipe-a"), RunIdentity("other", "recipe-a")


@pytest.fixture
def engine() -> TrainingEngine:
    """An engine with a small policy."""
    policy = Policy(ARCHITECTURE, TrajectoryTokenizer("displacements", -5.0, 15.0, 0.5))
    return TrainingEngine(policy, learning_rate=0.1, weight_decay=0.0, accelerator=build_accelerator("cpu"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("unfinished", [False, True])
@pytest.mark.parametrize(
    ("run", "phase", "says"),
    [
        (OTHER, "rl-seed0", "run other, phase rl-seed0; this is run mine, phase rl-seed0"),
        (MINE, "rl-seed1", "run mine, phase rl-seed1; this is run mine, phase rl-seed0"),
    ],
)
def test_somebody_elses_checkpoints(
    engine: TrainingEngine, tmp_path: Path, run: RunIdentity, phase: str, says: str, unfinished: bool
) -> None:
    source = CheckpointStore(tmp_path / phase / "checkpoints", 2, run=run)
    source.save(3, engine)
    here = tmp_path / "here" / "rl-seed0" / "checkpoints"
    own = CheckpointStore(here, 1, run=MINE)
    own.save(1, engine)
    name = ".step-000003.tmp" if unfinished else "step-000003"  # another run is writing, or has written
    shutil.copytree(source.folder / "step-000003", here / name)
    (here / ".step-000009.tmp").mkdir()
    before, weights = contents(here), [p.clone() for p in engine.parameters]
    for attempt in (lambda: own.load(engine), lambda: own.save(9, engine)):
        with pytest.raises(CheckpointError) as raised:
            attempt()
        assert f"{here / name} is another run's: {says}. Nothing was changed." in str(raised.value)
        assert contents(here) == before
        assert (here / ".step-000009.tmp").is_dir()
    assert all(torch.equal(a, b) for a, b in zip(weights, engine.parameters, strict=True))
    shutil.rmtree(here / name)
    state = own.load(engine)
    assert state is not None
    assert state.step == 1
    assert not (here / ".step-000009.tmp").exists()


def test_a_store_without_a_run_does_not_take_a_runs_checkpoints(engine: TrainingEngine, tmp_path: Path) -> None:
    folder = tmp_path / "rl-seed0" / "checkpoints"
    CheckpointStore(folder, 1, run=MINE).save(3, engine)
    with pytest.raises(CheckpointError, match="this is run without an id"):
        CheckpointStore(folder, 1).load(engine)


def test_checkpoints_that_do_not_say_whose_they_are_are_taken(engine: TrainingEngine, tmp_path: Path) -> None:
    folder = tmp_path / "rl-seed0" / "checkpoints"
    CheckpointStore(folder, 1).save(3, engine)
    state = json.loads((folder / "step-000003" / "state.json").read_text())
    del state["run"], state["processes"]  # as an older version wrote it
    (folder / "step-000003" / "state.json").write_text(json.dumps(state))
    blob = torch.load(folder / "step-000003" / "trainer.pt", weights_only=True)
    assert set(blob) == {"optimizer", "generators", "tensors"}
    found = CheckpointStore(folder, 1, run=MINE).load(engine)
    assert found is not None
    assert (found.step, found.notices) == (3, ())


def test_a_changed_recipe_is_said(engine: TrainingEngine, tmp_path: Path) -> None:
    folder = tmp_path / "rl-seed0" / "checkpoints"
    CheckpointStore(folder, 1, run=MINE).save(3, engine)
    found = CheckpointStore(folder, 1, run=replace(MINE, recipe="recipe-b")).load(engine)
    assert found is not None
    assert [notice[:64] for notice in found.notices] == [
        "The recipe has been changed since the checkpoint of step 3 was w"
    ]


def test_other_peoples_files_stay(engine: TrainingEngine, tmp_path: Path) -> None:
    folder = tmp_path / "rl-seed0" / "checkpoints"
    store = CheckpointStore(folder, 1, run=MINE)
    store.save(3, engine)
    names = [".step-mine", ".step-000003.tmp.bak", "step-000001.copy", ".hidden", "step-7"]
    for name in names:
        (folder / name).mkdir()
    (folder / ".step-000004.tmp").mkdir()
    (folder / ".step-000002.drop").mkdir()
    store.load(engine)
    store.save(4, engine)
    assert sorted(path.name for path in folder.iterdir()) == sorted([*names, "step-000004"])


def test_a_checkpoint_lost_between_two_renames_comes_back(engine: TrainingEngine, tmp_path: Path) -> None:
    folder = tmp_path / "rl-seed0" / "checkpoints"
    store = CheckpointStore(folder, 1, run=MINE)
    store.save(3, engine)
    (folder / "step-000003").rename(folder / ".step-000003.old")  # a crash while step 3 was written again
    shutil.copytree(folder / ".step-000003.old", folder / ".step-000003.tmp")
    state = store.load(engine)
    assert state is not None
    assert state.step == 3
    assert [path.name for path in folder.iterdir()] == ["step-000003"]
