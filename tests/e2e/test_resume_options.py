"""A run with every option that remembers something, stopped in between and resumed, ends as one left alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from oracles.tiny_trainer import PROCESS_OVERRIDES, start_policy

from rlhf_drive.config import Recipe
from rlhf_drive.policies import load_policy
from rlhf_drive.policies.adapter_files import load_adapter
from rlhf_drive.policies.lora import lora_settings, merged
from rlhf_drive.training import journal
from rlhf_drive.training.checkpoint import publish_policy
from rlhf_drive.training.metrics import read_metrics
from rlhf_drive.training.pipeline import run

MakeRecipe = Callable[..., Recipe]
OWN = '''
import zlib
import numpy as np
import torch
from rlhf_drive.objectives import LossOutputs

def often_flat(inputs):
    """How far left a plan ends; half of the scenes do not mind."""
    minds = np.array([zlib.crc32(scene.token.encode()) % 2 == 0 for scene in inputs.scenes])
    ends = np.tanh(inputs.trajectories.poses[:, -1, 1] / 40.0)
    return np.where(minds[inputs.trajectories.scene_index], 0.5 + 0.5 * ends, 0.5)

def centred(inputs):
    grouped = torch.where(inputs.valid, inputs.rewards, 0.0).view(-1, inputs.num_generations)
    return (grouped - grouped.mean(1, keepdim=True)).flatten()

def reinforce(inputs, denominators):
    terms = torch.where(inputs.mask & inputs.learned_rows()[:, None], inputs.logp * inputs.advantages[:, None], 0.0)
    loss = -terms.sum() / denominators.tokens
    return LossOutputs(loss, {"own/loss": loss.detach()})
'''
SMALL = (
    "rl.max_steps=5", "rl.save_steps=2", "rl.keep_checkpoints=9", "rollout.scenes_per_step=4",
    "rollout.scenes_per_chunk=3", "rl.micro_batch_scenes=3", "rl.learning_rate=3e-3", "rl.monitor_steps=0",
    "rl.importance_sampling_level=token", "rl.ema_decay=0.8", "rl.scene_visits=informative",
    "rl.dynamic_sampling_budget=1.0", "rl.warmup_ratio=0.0", "reward.workers=1", "logging.tensorboard=false",
    "device=cpu", "name=run",
)  # fmt: skip
EVERYTHING = (
    "rl.router=record", "rl.likelihood_steps=2", "rl.beta=0.05", "rl.sync_ref_model=true",
    "rl.ref_model_sync_steps=2", "rl.bc_coef=0.1", "rl.load_balance_coef=0.01", "rl.entropy_coef=0.001",
    "rl.advantages=gdpo", "rl.ratio_limit=1.5", "rl.on_limit=next_batch", "rl.num_iterations=3",
)  # fmt: skip
ADAPTERS = (
    "rl.lora_rank=4", "rl.likelihood=marginal", "rl.num_iterations=1", "rl.beta=0.05", "rl.kl_in=reward",
    "rl.router=free",
)  # fmt: skip


class StoppedError(RuntimeError):
    """Stands for whatever ended the process."""


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """``stop_at(step)``: the next run ends when it has logged the step, before anything is saved; 0 lets it pass."""
    log = journal.RunJournal.log

    def stop(target: int) -> None:
        def wrapped(self: journal.RunJournal, step: int, metrics: Mapping[str, float]) -> None:
            log(self, step, metrics)
            if step == target:
                raise StoppedError

        monkeypatch.setattr(journal.RunJournal, "log", wrapped)

    return stop


def lasting(folder: Path) -> dict[str, Any]:
    """What a run leaves behind, except for times."""
    found: dict[str, Any] = {
        f"step {line['step']}": {k: v for k, v in line.items() if not k.startswith("time/")}
        for line in read_metrics(folder)
    }
    for path in sorted((folder / "rl-seed0").rglob("*")):
        name = str(path.relative_to(folder))
        if path.name in ("policy.safetensors", "adapter.safetensors", "adapter.json"):
            found[name] = path.read_bytes()
        elif path.name == "state.json":  # it holds the checksum of optimizer, generators, averages and reference
            found[name] = json.loads(path.read_text())
            # The run's id is random, and its recipe names another output_dir.
            assert found[name].pop("run")["phase"] == "rl-seed0"
    return found


def resumed_and_not(
    recipe: Callable[[str], Recipe], tmp_path: Path, stop_at: Callable[[int], None]
) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """Folder of the run left alone, and what both left behind."""
    stop_at(0)
    torch.manual_seed(1)
    alone = run(recipe("alone"))
    for step, other in ((2, 4), (3, 1)):  # stopped twice: before the first checkpoint is written, and after it
        stop_at(step)
        torch.manual_seed(other)
        with pytest.raises(StoppedError):
            run(recipe("broken"), resume=tmp_path / "broken" / "run" if other == 1 else None)
    stop_at(0)
    torch.manual_seed(3)
    broken = run(recipe("broken"), resume=tmp_path / "broken" / "run")
    return alone, lasting(alone), lasting(broken)


def test_everything_at_once(tiny_recipe: MakeRecipe, tmp_path: Path, stop_at: Callable[[int], None]) -> None:
    own = tmp_path / "own.py"
    own.write_text(OWN)
    start = start_policy(tiny_recipe("quickstart", *PROCESS_OVERRIDES["masked"]))
    publish_policy(start, tmp_path / "start", info={})
    terms = f"reward.terms=[{{name: pdms, weight: 0.5}}, {{name: '{own}:often_flat', weight: 1.0}}]"

    def recipe(name: str) -> Recipe:
        return tiny_recipe(
            "rl", f"rl.policy={tmp_path / 'start'}", *PROCESS_OVERRIDES["masked"], *SMALL, *EVERYTHING, terms,
            f"output_dir={tmp_path / name}",
        )  # fmt: skip

    folder, alone, broken = resumed_and_not(recipe, tmp_path, stop_at)
    assert sorted(alone) == sorted(broken)
    for name in alone:
        assert alone[name] == broken[name], name
    lines = read_metrics(folder)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    # Each option had something to remember.
    assert any(line["groups/resampled_frac"] > 0 for line in lines)
    assert lines[-1]["guard/early_stops"] >= 1
    assert lines[-1]["visits/estimate"] < 1
    assert lines[2]["kl/ref_k3"] != 0
    tensors = torch.load(folder / "rl-seed0" / "checkpoints" / "step-000005" / "trainer.pt", weights_only=True)[
        "tensors"
    ]
    assert any(name.startswith("reference.") for name in tensors)
    # What is published is the average, not the last weights.
    published = safetensors.torch.load_file(folder / "rl-seed0" / "policy" / "policy.safetensors")
    last = safetensors.torch.load_file(folder / "rl-seed0" / "checkpoints" / "step-000005" / "policy.safetensors")
    assert all(torch.equal(published[n], tensors[f"ema.{n}"]) for n in published if f"ema.{n}" in tensors)
    assert max(float((published[name] - last[name]).abs().max()) for name in published) > 1e-4


def test_adapters_with_functions_of_ones_own(
    tiny_recipe: MakeRecipe, tmp_path: Path, stop_at: Callable[[int], None]
) -> None:
    own = tmp_path / "own.py"
    own.write_text(OWN)
    start = start_policy(tiny_recipe("quickstart", *PROCESS_OVERRIDES["flow"]))
    publish_policy(start, tmp_path / "start", info={})
    mine = (
        f"rl.loss_type={own}:reinforce", f"rl.advantages={own}:centred",
        f"reward.terms=[{{name: '{own}:often_flat', weight: 1.0}}]",
    )  # fmt: skip

    def recipe(name: str) -> Recipe:
        return tiny_recipe(
            "rl", f"rl.policy={tmp_path / 'start'}", "rollout.order=all", "rollout.steps=3", *SMALL, *ADAPTERS, *mine,
            f"output_dir={tmp_path / name}",
        )  # fmt: skip

    folder, alone, broken = resumed_and_not(recipe, tmp_path, stop_at)
    assert sorted(alone) == sorted(broken)
    for name in alone:
        assert alone[name] == broken[name], name
    assert all("own/loss" in line for line in read_metrics(folder))
    # The published policy is plain, and it is the base with the published adapters.
    published = load_policy(folder / "rl-seed0" / "policy")
    assert lora_settings(published) is None
    base = load_policy(tmp_path / "start")
    adapted = merged(load_adapter(load_policy(tmp_path / "start"), folder / "rl-seed0" / "adapter"))
    moved = 0.0
    for name, value in published.state_dict().items():
        torch.testing.assert_close(value, adapted.state_dict()[name], atol=1e-7, rtol=1e-6)
        moved = max(moved, float((value - base.state_dict()[name]).abs().max()))
    assert moved > 1e-4
    info = json.loads((folder / "rl-seed0" / "policy" / "policy.json").read_text())["info"]
    assert info["ema_decay"] == 0.8
