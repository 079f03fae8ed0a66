"""A run that samples on Ray is the run that samples itself, for any number of workers; ahead of time it is close."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_drive.config import Recipe
from rlhf_drive.policies import load_policy
from rlhf_drive.scenes.store import SceneStore
from rlhf_drive.training.build import build_policy
from rlhf_drive.training.checkpoint import publish_policy
from rlhf_drive.training.metrics import read_metrics
from rlhf_drive.training.pipeline import run

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.ray
CHUNKS = ("rollout.scenes_per_step=8", "rollout.scenes_per_chunk=2", "rl.max_steps=3", "rl.learning_rate=3e-3")
MEASURED = ("time/", "rollout/", "service/", "async/")
"""Areas of metrics that tell how long things took and how often they had to be done."""


@pytest.fixture(scope="module", autouse=True)
def one_ray() -> Iterator[None]:
    """All runs of this module share a Ray, which takes long to start."""
    ray.init(num_cpus=5, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture
def train(tiny_recipe: Callable[..., Recipe], tiny_store: SceneStore, tmp_path: Path) -> Callable[..., Path]:
    """``train(*overrides)``: RL from an untrained policy; the run folder."""
    start = tmp_path / "start"
    whole = tiny_recipe("quickstart")
    publish_policy(build_policy(whole, torch.device("cpu")), start, info={})

    def go(*overrides: str) -> Path:
        return run(tiny_recipe("rl", f"rl.policy={start}", *CHUNKS, *overrides))

    return go


def told(folder: Path) -> list[dict[str, Any]]:
    """Metrics but what was measured of services and time."""
    return [{k: v for k, v in line.items() if not k.startswith(MEASURED)} for line in read_metrics(folder)]


def test_local_one_worker_and_four_workers_give_the_same_run(train: Callable[..., Path]) -> None:
    on_ray = ("rollout.engine=ray", "reward.engine=ray", "reward.workers=1", "rollout.cpus_per_worker=0.5")
    runs = [train(), *(train(*on_ray, f"rollout.workers={workers}") for workers in (1, 4))]
    lines = [told(folder) for folder in runs]
    assert len(lines[0]) == 3
    assert lines[0] == lines[1] == lines[2]
    weights = [load_policy(folder / "rl-seed0" / "policy").state_dict() for folder in runs]
    for name, value in weights[0].items():
        assert all(bool((value == other[name]).all()) for other in weights[1:]), name
    assert all(line["rollout/restarts"] == line["rollout/retries"] == 0 for line in read_metrics(runs[2]))


def test_ahead_of_time_every_group_is_at_most_so_many_updates_old(train: Callable[..., Path]) -> None:
    folder = train(
        "rollout.engine=ray", "rollout.workers=1", "rollout.max_staleness=2", "rl.max_steps=6",
        "rl.importance_sampling_cap=1.5",
    )  # fmt: skip
    lines = read_metrics(folder)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[0]["async/staleness_mean"] == 0
    for line in lines:
        assert line["async/staleness_mean"] <= line["async/staleness_max"] <= min(line["step"] - 1, 2)
        assert 0 <= line["async/trainer_idle_frac"] <= 1
        assert 0 <= line["async/sampler_idle_frac"] <= 1
        if "correction/max" in line:
            assert line["correction/max"] <= 1.5 + 1e-6
        # Old log-probabilities are those of the weights that learn: the ratio starts at 1 however old the samples are.
        if "ratio/first_mean" in line:
            assert math.isclose(line["ratio/first_mean"], 1.0, abs_tol=1e-6)
    fresh = [line for line in lines if line["async/staleness_max"] == 0 and "correction/mean" in line]
    assert all(math.isclose(line["correction/mean"], 1.0, abs_tol=1e-4) for line in fresh)
