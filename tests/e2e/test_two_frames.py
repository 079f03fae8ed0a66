"""The recipe that trains on EPDMS with two frames, from end to end: shrunk, and left with what it promises."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from rlhf_drive.config import Recipe
from rlhf_drive.training.metrics import read_metrics
from rlhf_drive.training.pipeline import run

SFT = ("sft.max_epochs=4", "sft.batch_size=8", "sft.learning_rate=3e-3")
RL = ("rl.learning_rate=3e-3", "rollout.num_generations=8", "rollout.scenes_per_step=12", "rl.seeds=[0]")


def test_training_on_two_frames_reports_epdms_with_ec(tiny_recipe: Callable[..., Recipe]) -> None:
    watched = ("rl.monitor_steps=2", "rl.monitor_scenes=8", "rollout.scenes_per_chunk=5")
    folder = run(tiny_recipe("real_scenes_epdms", *SFT, *RL, *watched))
    lines = [line for line in read_metrics(folder) if line["phase"] == "rl-seed0"]
    assert ["heldout/epdms" in line for line in lines] == [False, True, False, True]
    for line in lines:
        assert line["reward/total"] == pytest.approx(line["reward/epdms_two_frame"], abs=1e-12)
        assert line["reward/total"] == pytest.approx(line["reward/epdms"], abs=1e-12)
        assert 0.0 <= line["reward/ec"] <= 1.0
        assert line["reward/invalid_frac"] == 0.0
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary["gain"]) == {"epdms", "ci95"}
    assert summary["gain"]["epdms"] == pytest.approx(summary["rl"]["epdms"] - summary["sft"]["epdms"], abs=2e-4)
    assert "pdms" in summary["metrics"]
    report = json.loads((folder / "report.json").read_text())
    ec = {name: policy["all"]["ec"]["mean"] for name, policy in report["policies"].items()}
    assert {name for name, value in ec.items() if value is None} == {"pdm_closed"}  # it plans one frame only
    assert ec["human"] > 80.0
    assert report["secondary"][0]["headline"] == "pdms"
