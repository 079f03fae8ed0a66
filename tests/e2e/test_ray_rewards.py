"""A run whose rewards are scored on Ray is the run whose rewards are scored on threads."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from rlhf_drive.config import Recipe
from rlhf_drive.policies import load_policy
from rlhf_drive.training.metrics import read_metrics
from rlhf_drive.training.pipeline import run

pytestmark = pytest.mark.ray


def test_engines_give_the_same_run(tiny_recipe: Callable[..., Recipe]) -> None:
    pytest.importorskip("ray")
    small = ("sft.max_epochs=1", "rl.max_steps=2", "rl.learning_rate=3e-3", "compare.metrics=[pdms]")
    local = run(tiny_recipe("quickstart", *small, "reward.workers=1"))
    ray = run(tiny_recipe("quickstart", *small, "reward.engine=ray", "reward.workers=2"))
    weights = [load_policy(folder / "rl-seed0" / "policy").state_dict() for folder in (local, ray)]
    assert all(bool((value == weights[1][name]).all()) for name, value in weights[0].items())
    lines = [
        [{k: v for k, v in line.items() if not k.startswith("time/")} for line in read_metrics(folder)]
        for folder in (local, ray)
    ]
    assert lines[0] == lines[1]
    reports = [json.loads((folder / "report.json").read_text())["policies"] for folder in (local, ray)]
    assert reports[0] == reports[1]
