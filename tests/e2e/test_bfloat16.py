"""A recipe in bfloat16: the updates' ratios start at 1, and the sampler's rounding is weighed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rlhf_drive.config import Recipe
from rlhf_drive.policies import load_policy
from rlhf_drive.training.build import build_policy
from rlhf_drive.training.checkpoint import publish_policy
from rlhf_drive.training.metrics import read_metrics
from rlhf_drive.training.pipeline import run


def test_a_run_in_bfloat16_is_close_to_one_in_float32(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    start = tmp_path / "start"
    publish_policy(build_policy(tiny_recipe("quickstart"), torch.device("cpu")), start, info={})
    learn = (f"rl.policy={start}", "rl.max_steps=2", "rl.learning_rate=1e-4", "rl.importance_sampling_level=token")
    coarse, fine = (
        run(tiny_recipe("rl", *learn, f"name={name}", f"parallel.precision={name}")) for name in ("bfloat16", "float32")
    )
    lines, expected = read_metrics(coarse), read_metrics(fine)
    taught = [line for line in lines if "correction/mean" in line]
    assert taught
    assert not any(name.startswith("correction/") for line in expected for name in line)
    for line in taught:
        assert line["ratio/first_mean"] == pytest.approx(1.0, abs=1e-6)  # old log-probabilities are the trainer's own
        assert line["correction/mean"] == pytest.approx(1.0, abs=0.02)
        assert 1e-6 < line["correction/max"] - line["correction/min"] < 0.5  # and the sampler's are not quite
    weights = [load_policy(folder / "rl-seed0" / "policy").state_dict() for folder in (coarse, fine)]
    assert all(value.dtype == torch.float32 for value in weights[0].values() if value.is_floating_point())
    assert any(not torch.equal(value, weights[1][name]) for name, value in weights[0].items())
