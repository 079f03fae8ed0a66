"""An RL run of two processes is the run of one: what is sampled, scored, chosen, learned, kept and published."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from oracles.pipeline_runs import train
from oracles.process_runs import launch

from rlhf_drive.config import Recipe
from rlhf_drive.policies import load_policy
from rlhf_drive.training.build import build_policy
from rlhf_drive.training.checkpoint import publish_policy
from rlhf_drive.training.metrics import read_metrics
from rlhf_drive.training.pipeline import run

MEASURED = ("time/", "rollout/", "service/", "async/")
"""Areas of metrics that tell how long things took and how often they had to be done."""
STEP = (
    "rollout.scenes_per_step=6", "rollout.scenes_per_chunk=2", "rl.micro_batch_scenes=2", "rl.max_steps=3",
    "rl.learning_rate=3e-3", "rl.dynamic_sampling_budget=0.5", "rl.scene_visits=informative", "rl.ema_decay=0.5",
    "rl.save_steps=2", "rl.monitor_steps=2", "rl.monitor_scenes=4", "logging.picture_steps=3",
)  # fmt: skip
"""Three chunks and, where groups are flat, further ones: two processes have unequal shares."""


def learned(folder: Path) -> dict[str, torch.Tensor]:
    """A policy's weights without the keys' biases, which cancel in the softmax: their gradients are rounding alone, and
    AdamW scales it up."""
    weights = load_policy(folder).state_dict()
    for name, value in weights.items():
        if name.endswith("attention.qkv.bias"):
            value[len(value) // 3 : 2 * len(value) // 3] = 0.0
    return weights


def compare(found: Path, alone: Path) -> None:
    """Metrics, weights and checkpoints agree to 1e-5; the discrete choices behind them are the same."""
    lines, expected = read_metrics(found), read_metrics(alone)
    assert [line["step"] for line in lines] == [line["step"] for line in expected] == [1, 2, 3]
    for line, other in zip(lines, expected, strict=True):
        numbers = {name: value for name, value in line.items() if not name.startswith(MEASURED) and name != "phase"}
        assert numbers == pytest.approx({name: other[name] for name in numbers}, rel=1e-4, abs=1e-5)
        assert set(numbers) == {name for name in other if not name.startswith(MEASURED) and name != "phase"}
    weights = [learned(folder / "rl-seed0" / "policy") for folder in (found, alone)]
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=0, atol=1e-5, msg=name)
    files = [
        sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if "tensorboard" not in path.parts)
        for folder in (found, alone)
    ]
    assert files[0] == files[1]


def test_two_processes_run_as_one_does(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    start = tmp_path / "start"
    publish_policy(build_policy(tiny_recipe("quickstart"), torch.device("cpu")), start, info={})
    recipes = {
        strategy: tiny_recipe("rl", f"rl.policy={start}", *STEP, f"name={strategy}", f"parallel.strategy={strategy}")
        for strategy in ("ddp", "fsdp2")
    }
    alone = run(tiny_recipe("rl", f"rl.policy={start}", *STEP, "name=alone"))
    assert sum(line["groups/resampled_frac"] for line in read_metrics(alone)) > 0
    found = launch(functools.partial(train, list(recipes.values())), tmp_path)
    assert found[0] == found[1]  # both were told the same folders
    for folder in found[0]:
        compare(folder, alone)


@pytest.mark.ray
def test_two_processes_hear_of_what_the_main_one_has_sampled_on_ray(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    start = tmp_path / "start"
    publish_policy(build_policy(tiny_recipe("quickstart"), torch.device("cpu")), start, info={})
    on_ray = ("rollout.engine=ray", "rollout.workers=1", "name=ray", "parallel.strategy=fsdp2")
    alone = run(tiny_recipe("rl", f"rl.policy={start}", *STEP, "name=alone"))
    recipe = tiny_recipe("rl", f"rl.policy={start}", *STEP, *on_ray)
    ((folder,), _) = launch(functools.partial(train, [recipe]), tmp_path)
    compare(folder, alone)
