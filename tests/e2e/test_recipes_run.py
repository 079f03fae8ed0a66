"""Every shipped recipe runs from end to end, shrunk, and leaves what it promises."""

from __future__ import annotations

import base64
import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rewards.pdms import score_pdms
from rewards.prepare import prepare_scene
from rlhf_drive.config import Recipe, dump_recipe, load_recipe
from rlhf_drive.policies import load_policy
from rlhf_drive.scenes.store import SceneStore
from rlhf_drive.training.build import build_policy
from rlhf_drive.training.checkpoint import publish_policy
from rlhf_drive.training.metrics import read_metrics
from rlhf_drive.training.pipeline import run

MakeRecipe = Callable[..., Recipe]
SFT = ("sft.max_epochs=4", "sft.batch_size=8", "sft.learning_rate=3e-3")
RL = ("rl.learning_rate=3e-3", "rollout.num_generations=8", "rollout.scenes_per_step=12", "rollout.temperature=1.0")
"""Enough for groups with spread and a policy that RL moves, so that the report has something to draw."""
RECORDINGS = (
    "womd_1c365f15b70ebdbf", "womd_2691cceed9fa2d25", "womd_74e81d8eb826f7da", "womd_74e892ddfe3b9b8",
    "womd_965472cb24cb397b", "womd_a0d7dc6be757",
)  # fmt: skip
"""Small ones; the human of the second scores less than the recipe asks for, the third and the last are held out."""


def human_pdms(store: SceneStore) -> float:
    """Mean PDMS of the held-out humans in points of 100, from the scorer itself."""
    scenes = store.split("heldout")
    scores = [score_pdms(prepare_scene(s.reference), s.reference.human_poses[None]).pdms[0] for s in scenes]
    return 100.0 * float(np.mean(scores))


def sft_steps(store: SceneStore) -> int:
    """Steps of `SFT`: four epochs in batches of eight."""
    return 4 * math.ceil(len(store.indices("train")) / 8)


def pictures(page: Path) -> list[bytes]:
    """PNG pictures inside an HTML page."""
    found = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page.read_text("utf-8"))
    return [base64.b64decode(text) for text in found]


def check_metrics(folder: Path, steps: Mapping[str, int]) -> None:
    """Each phase logged each of its steps, RL began each update at ratio 1, and TensorBoard holds the same numbers."""
    lines = read_metrics(folder)
    found = [(line["phase"], line["step"]) for line in lines]
    assert found == [(phase, step) for phase, last in steps.items() for step in range(1, last + 1)]
    rl = [line for line in lines if line["phase"].startswith("rl")]
    assert all(line["groups/degenerate_frac"] < 1 for line in rl)
    for line in rl:
        values = [line[f"ratio/first_{name}"] for name in ("mean", "min", "max")]
        assert values == pytest.approx([1.0, 1.0, 1.0], abs=1e-5)
        assert line["logprob_mismatch/max"] < 1e-5
    for phase in steps:
        events = EventAccumulator(str(folder / "tensorboard" / phase)).Reload()
        shown = [event.value for event in events.Scalars("optim/learning_rate")]
        written = [line["optim/learning_rate"] for line in lines if line["phase"] == phase]
        assert shown == pytest.approx(written, rel=1e-6)


def check_policy(folder: Path, recipe: Recipe) -> None:
    """A stage left its policy and the newest checkpoints, which hold the recipe's policy."""
    saved = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert len(saved) == 2
    for path in (folder / "policy", folder / "checkpoints" / saved[-1]):
        assert load_policy(path).architecture.d_model == recipe.policy.d_model == 32


def check_summary(folder: Path, store: SceneStore, seeds: int) -> dict[str, Any]:
    """The headline numbers, and baselines that are those of the scorer."""
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    assert {"sft", "rl", "gain", "minutes"} <= set(summary)
    assert set(summary["gain"]) == {"pdms", "ci95"}
    assert summary["gain"]["pdms"] == pytest.approx(summary["rl"]["pdms"] - summary["sft"]["pdms"], abs=2e-4)
    low, high = summary["gain"]["ci95"]
    assert low <= summary["gain"]["pdms"] <= high
    assert 0 < summary["minutes"] < 5
    assert [seed["name"] for seed in summary["seeds"]] == [f"rl-seed{i}" for i in range(seeds)]
    of_seeds = [seed["pdms"] for seed in summary["seeds"]]
    assert np.mean(of_seeds) == pytest.approx(summary["rl"]["pdms"], abs=2e-4)
    assert summary["baselines"]["human"]["all"] == pytest.approx(human_pdms(store), abs=1e-4)
    assert summary["scenes"] == len(store.indices("heldout"))
    assert set(summary["valid"].values()) == {1.0}
    return summary


def check_report(folder: Path, planners: list[str]) -> None:
    """A page with pictures, and all planners in the data."""
    drawn = pictures(folder / "report.html")
    assert len(drawn) == 1
    assert drawn[0].startswith(b"\x89PNG")
    assert list(json.loads((folder / "report.json").read_text())["policies"]) == planners


BASELINES = ["human", "pdm_closed", "constant_velocity", "stand_still"]


def test_quickstart(tiny_recipe: MakeRecipe) -> None:
    recipe = tiny_recipe("quickstart", "scenes.source=generate", "scenes.store=null", "scenes.count=24", *SFT, *RL)
    folder = run(recipe)
    assert (folder / "recipe.yaml").read_text() == dump_recipe(recipe)
    assert load_recipe(folder / "recipe.yaml") == recipe
    store = SceneStore.open(folder / "scenes")
    assert len(store) + len(store.info["refused"]) == 24
    check_metrics(folder, {"sft": sft_steps(store), "rl-seed0": 4})
    check_policy(folder / "sft", recipe)
    check_policy(folder / "rl-seed0", recipe)
    summary = check_summary(folder, store, seeds=1)
    assert summary["sft_training"]["epochs"] == 4
    check_report(folder, ["sft", "rl-seed0", *BASELINES])


def test_quickstart_grpo(tiny_recipe: MakeRecipe, tiny_store: SceneStore) -> None:
    recipe = tiny_recipe("quickstart_grpo", *SFT, *RL)
    folder = run(recipe)
    check_metrics(folder, {"sft": sft_steps(tiny_store), "rl-seed0": 4})
    check_summary(folder, tiny_store, seeds=1)
    check_report(folder, ["sft", "rl-seed0", *BASELINES])
    assert not (folder / "scenes").exists()


def test_real_scenes(tiny_recipe: MakeRecipe, recorded_scenes: Path, tmp_path: Path) -> None:
    files = [recorded_scenes / f"{name}{end}" for name in RECORDINGS for end in (".json", ".npz")]
    if missing := [path.name for path in files if not path.is_file()]:
        pytest.skip(f"{recorded_scenes} lacks {missing[0]}")
    own = tmp_path / "recordings"
    own.mkdir()
    for path in files:
        shutil.copyfile(path, own / path.name)
    given = ("scenes.source=recorded", "scenes.store=null", f"scenes.path={own}")
    split = ("scenes.min_human_pdms=0.8", "scenes.heldout_fraction=0.25", "scenes.seed=7")
    whole = ("rollout.steps=16", "compare.steps=16")  # an autoregressive policy decides one token a step
    recipe = tiny_recipe("real_scenes", *given, *split, *SFT, *RL, *whole)
    folder = run(recipe)
    store = SceneStore.open(folder / "scenes")
    assert {token.partition("__")[0] for token in store.tokens} == {*RECORDINGS} - {RECORDINGS[1]}
    assert {token.partition("__")[0] for token in store.info["refused"]} == {RECORDINGS[1]}
    assert sorted({scene.token.partition("__")[0] for scene in store.split("heldout")}) == [
        RECORDINGS[2],
        RECORDINGS[5],
    ]
    seeds = len(recipe.rl.seeds)
    assert recipe.rl.seeds == tuple(range(seeds))
    assert seeds > 1
    check_metrics(folder, {"sft": sft_steps(store)} | {f"rl-seed{i}": 4 for i in range(seeds)})
    check_summary(folder, store, seeds)
    check_report(folder, ["sft", *(f"rl-seed{i}" for i in range(seeds)), *BASELINES])


def test_scenes(tiny_recipe: MakeRecipe) -> None:
    recipe = tiny_recipe("scenes", "scenes.source=generate", "scenes.store=null", "scenes.count=12")
    folder = run(recipe)
    store = SceneStore.open(folder / "scenes")
    assert len(store) + len(store.info["refused"]) == 12
    found = sorted(path.name for path in folder.iterdir())
    assert found == [".lock", "metrics.jsonl", "recipe.yaml", "scenes", "stages.json"]
    again = run(recipe)
    assert (again.name, again.parent) == ("scenes-2", folder.parent)
    assert [path.read_bytes() for path in sorted((folder / "scenes").iterdir())] == [
        path.read_bytes() for path in sorted((again / "scenes").iterdir())
    ]


def test_single_jobs_follow_each_other(tiny_recipe: MakeRecipe, tiny_store: SceneStore) -> None:
    """`sft`, `rl` and `compare` by hand end where the pipeline ends that does all three."""
    sft = run(tiny_recipe("sft", "seed=3", *SFT))
    check_metrics(sft, {"sft": sft_steps(tiny_store)})
    rl = run(tiny_recipe("rl", f"rl.policy={sft / 'sft' / 'policy'}", *RL))
    check_metrics(rl, {"rl-seed0": 4})
    policies = [f"compare.policies.{name}={path}" for name, path in (("sft", sft / "sft"), ("rl", rl / "rl-seed0"))]
    compared = run(tiny_recipe("compare", *(f"{policy}/policy" for policy in policies)))
    check_report(compared, ["sft", "rl", *BASELINES])
    whole = run(tiny_recipe("quickstart", "seed=3", *SFT, *RL))
    for part, stage in ((sft, "sft"), (rl, "rl-seed0")):
        weights = Path(stage) / "policy" / "policy.safetensors"
        assert (part / weights).read_bytes() == (whole / weights).read_bytes()
    tables = [json.loads((folder / "report.json").read_text())["policies"] for folder in (compared, whole)]
    assert tables[0]["rl"]["all"] == tables[1]["rl-seed0"]["all"]
    assert tables[0]["sft"]["all"] == tables[1]["sft"]["all"]


def test_an_rl_policy_is_compared_without_the_policy_it_came_from(
    tiny_recipe: MakeRecipe, tiny_store: SceneStore, tmp_path: Path
) -> None:
    policy = build_policy(tiny_recipe(), torch.device("cpu"))
    publish_policy(policy, tmp_path / "policy", info={})
    folder = run(tiny_recipe("compare", f"compare.policies.rl-seed0={tmp_path / 'policy'}"))
    report = json.loads((folder / "report.json").read_text())
    assert report["policies"]["human"]["all"]["pdms"]["mean"] == pytest.approx(human_pdms(tiny_store), abs=1e-6)
    assert not (folder / "summary.json").exists()


def test_policies_of_other_sizes_and_tokenizers_do_not_disturb_each_other(
    tiny_recipe: MakeRecipe, tmp_path: Path
) -> None:
    changes: dict[str, tuple[str, ...]] = {
        "plain": (),
        "waypoints": ("tokenizer.encoding=waypoints", "tokenizer.low=-20", "tokenizer.high=100"),
        "fewer": ("policy.max_agents=2", "policy.max_polylines=3", "policy.points_per_polyline=3"),
    }
    for name, change in changes.items():
        publish_policy(build_policy(tiny_recipe("quickstart", *change), torch.device("cpu")), tmp_path / name, info={})
    named = {name: f"compare.policies.{name}={tmp_path / name}" for name in changes}
    together = run(tiny_recipe("compare", *named.values(), "compare.pictures=0"))
    alone = [run(tiny_recipe("compare", item, "compare.pictures=0")) for item in named.values()]
    tables = [json.loads((folder / "report.json").read_text())["policies"] for folder in (together, *alone)]
    for name, table in zip(named, tables[1:], strict=True):
        assert tables[0][name] == table[name]
