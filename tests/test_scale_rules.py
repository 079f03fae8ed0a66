"""Keys about workers, processes and logs that do not fit together are refused before any work."""

from __future__ import annotations

import sys
from importlib import util
from pathlib import Path

import pytest

from rlhf_drive.config import inspect_recipe

RAY = "rollout.engine=ray"


def _problems(*overrides: str, recipe: str = "quickstart") -> list[str]:
    return inspect_recipe(recipe, overrides)[1]


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (("rollout.max_staleness=1",), "rollout.max_staleness: above 0 sampling and training overlap"),
        (
            (RAY, "rollout.max_staleness=1", "rl.likelihood=coupled"),
            "rollout.max_staleness: what older weights have sampled is weighed by their log-probabilities",
        ),
        (
            (RAY, "rollout.max_staleness=1", "rl.loss_type=wll", "rl.num_iterations=1", "rl.beta=0"),
            "rl.importance_sampling_cap: with rollout.max_staleness 1: rl.loss_type = 'wll' compares the plans",
        ),
        (
            ("parallel.precision=bfloat16", "rl.loss_type=wll", "rl.num_iterations=1", "rl.beta=0"),
            "rl.importance_sampling_cap: with parallel.precision bfloat16: rl.loss_type = 'wll' compares the plans",
        ),
        ((RAY, "rollout.workers=9", "rollout.scenes_per_chunk=4"), "rollout.workers: a step is sampled in 8 chunks"),
        (("rollout.workers=4",), "rollout.workers: has no effect with engine 'local'"),
        (("rollout.gpus_per_worker=0.5",), "rollout.gpus_per_worker: has no effect with engine 'local'"),
        ((RAY, "rollout.gpus_per_worker=1.5"), "rollout.gpus_per_worker: a part of one GPU"),
        (("ray.address=auto",), "ray.address: nothing here runs on Ray"),
        ((RAY, "ray.address=ray://head:10001"), "ray.address: Ray Client cannot be used"),
        ((RAY, "ray.address=head"), "ray.address: must be host:port"),
        (("sft.batch_size=8", "sft.micro_batch_scenes=9"), "sft.micro_batch_scenes: at most sft.batch_size = 8"),
        (("logging.profile_steps=[41]", "rl.max_steps=40"), "logging.profile_steps: the run has rl.max_steps = 40"),
    ],
)
def test_what_does_not_fit_is_refused(overrides: tuple[str, ...], problem: str) -> None:
    found = _problems(*overrides)
    assert len(found) == 1, found
    assert found[0].startswith(problem)


@pytest.mark.parametrize(
    "overrides",
    [
        (RAY, "rollout.max_staleness=1"),
        (RAY, "rollout.workers=8", "rollout.scenes_per_chunk=4"),
        # Chunks of the next step keep further workers busy.
        (RAY, "rollout.workers=16", "rollout.scenes_per_chunk=4", "rollout.max_staleness=1"),
        (RAY, "rollout.max_staleness=1", "rl.loss_type=wll", "rl.num_iterations=1", "rl.importance_sampling_cap=0"),
        ("parallel.precision=bfloat16", "rl.likelihood=coupled", "rl.importance_sampling_level=sequence"),
        (RAY, "rollout.gpus_per_worker=0.25", "ray.address=10.0.0.1:6379"),
        (RAY, "ray.address='[fe80::1]:6379'"),
        ("reward.engine=ray", "ray.address=auto"),
        ("sft.batch_size=8", "sft.micro_batch_scenes=8", "logging.profile_steps=[1]"),
    ],
)
def test_what_fits_is_taken(overrides: tuple[str, ...]) -> None:
    assert _problems(*overrides) == []


@pytest.mark.parametrize(
    ("package", "overrides", "key"),
    [
        ("ray", (RAY,), "rollout.engine"),
        ("ray", ("reward.engine=ray",), "reward.engine"),
        ("wandb", ("logging.wandb=true",), "logging.wandb"),
        ("trackio", ("logging.trackio=true",), "logging.trackio"),
    ],
)
def test_a_package_that_is_not_there_is_named(
    package: str, overrides: tuple[str, ...], key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        sys.modules["rlhf_drive.config_scale_rules"], "find_spec", lambda name: None if name == package else util
    )
    found = _problems(*overrides)
    assert len(found) == 1, found
    assert found[0].startswith(f"{key}: needs the package")
    assert f'pip install "rlhf-drive[{package}]"' in found[0]


def test_a_run_folder_is_no_scene_store(tmp_path: Path) -> None:
    (tmp_path / "stages.json").touch()
    found = _problems(f"scenes.store={tmp_path}", f"rl.policy={tmp_path}", recipe="rl")
    assert (
        f"scenes.store: {str(tmp_path)!r} is a run folder. Give its scene store, {str(tmp_path / 'scenes')!r}" in found
    )
