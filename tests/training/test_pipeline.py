"""What holds of a whole run besides its stages: what it refuses at the start, and when a comparison stops."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import rlhf_drive.training.pipeline as pipeline
from rlhf_drive.config import Recipe
from rlhf_drive.errors import ConfigError, DataError, RewardError
from rlhf_drive.scenes.store import SceneStore
from rlhf_drive.training.build import build_accelerator, build_policy
from rlhf_drive.training.checkpoint import publish_policy
from rlhf_drive.training.comparison import unseen
from rlhf_drive.training.pipeline import run

MakeRecipe = Callable[..., Recipe]
HALF = """
import numpy as np

def half(inputs):
    forward = inputs.trajectories.poses[:, -1, 0] > 0.5
    return np.where(forward, 1.0, np.nan)
"""
"""A reward that cannot judge a plan that stays where it is."""


def test_a_comparison_stops_when_too_many_plans_cannot_be_scored(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(HALF)
    changes = (
        f"reward.terms=[{{name: pdms, weight: 1.0}}, {{name: '{tmp_path}/mine.py:half', weight: 1.0}}]",
        "compare.baselines=[stand_still]", "compare.pictures=0",
    )  # fmt: skip
    with pytest.raises(RewardError, match=r"\(100\.0%\) could not be scored; 5\.0% are tolerated .*max_invalid_frac"):
        run(tiny_recipe("compare", *changes))
    folder = run(tiny_recipe("compare", *changes, "reward.max_invalid_fraction=1"))
    report = json.loads((folder / "report.json").read_text())
    assert report["policies"]["stand_still"]["valid"] == 0.0


def test_processes_wait_for_scenes_and_comparison_however_long_they_take(
    tiny_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[str] = []

    def on_main_for_long(ranks: object, function: Callable[[], object]) -> object:
        waited.append("begun")
        found = function()
        waited.append("done")
        return found

    monkeypatch.setattr(pipeline, "on_main_for_long", on_main_for_long)
    monkeypatch.setattr(pipeline._Run, "_compare", lambda *_: waited.append("compare"))
    run(tiny_recipe("compare"))
    assert waited == ["begun", "done", "begun", "compare", "done"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there_leaves_no_run_folder(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="torch sees no GPU; use device=auto or device=cpu"):
        run(tiny_recipe("quickstart", "device=cuda"))
    assert not (tmp_path / "runs").exists()


def test_the_environment_does_not_change_the_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert build_accelerator("cpu").mixed_precision == "no"


def test_an_rl_policy_alone_is_compared_without_a_gain_over_sft(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    checkpoint = tmp_path / "rl-seed0" / "policy"
    publish_policy(build_policy(tiny_recipe(), torch.device("cpu")), checkpoint, info={})
    folder = run(tiny_recipe("compare", f"compare.policies.rl-seed0={checkpoint}", "compare.pictures=0"))
    report = json.loads((folder / "report.json").read_text())
    asked = [(c["name"], c["reference"]) for c in report["comparisons"]]
    assert asked == [("rl", "constant_velocity"), ("rl", "pdm_closed"), ("rl", "human")]
    assert not (folder / "summary.json").exists()


def test_scenes_that_a_policy_has_trained_on_are_left_out(
    tiny_recipe: Callable[..., Recipe], tiny_store: SceneStore, capsys: pytest.CaptureFixture[str]
) -> None:
    scenes = tiny_store.split("train")[:5]
    clean, learned = (build_policy(tiny_recipe(), torch.device("cpu")) for _ in range(2))
    learned.remember_training(scenes[1:3])
    assert unseen(scenes, {"clean": clean}) == scenes
    assert unseen(scenes, {"clean": clean, "learned": learned}) == [scenes[0], *scenes[3:]]
    assert "leaving out 2 of 5 held-out scenes that learned has trained on" in capsys.readouterr().out
    learned.remember_training(scenes)
    with pytest.raises(DataError, match="All 5 held-out scenes"):
        unseen(scenes, {"learned": learned})


def test_a_finished_run_is_not_done_again(tiny_recipe: MakeRecipe, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tiny_recipe("compare", "compare.baselines=[stand_still]", "compare.pictures=0")
    folder = run(recipe)
    written = (folder / "report.json").stat().st_mtime_ns
    capsys.readouterr()
    assert run(recipe, resume=folder) == folder
    assert capsys.readouterr().out == f"{folder} is finished: no stage is left to do\n"
    assert (folder / "report.json").stat().st_mtime_ns == written
