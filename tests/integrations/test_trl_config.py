"""A GRPOConfig and a recipe say the same in both directions, and what one of them cannot say is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from rlhf_drive.config import load_recipe
from rlhf_drive.errors import ConfigError
from rlhf_drive.integrations.trl_config import grpo_config_from_recipe, recipe_keys_from_grpo_config

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")

CHANGED: dict[str, Any] = {
    "learning_rate": 3e-5,
    "weight_decay": 0.02,
    "warmup_steps": 0.1,
    "max_grad_norm": 0.7,
    "num_generations": 4,
    "max_steps": 60,
    "num_iterations": 3,
    "beta": 0.04,
    "epsilon": 0.11,
    "epsilon_high": 0.22,
    "delta": 3.5,
    "loss_type": "bnpo",
    "importance_sampling_level": "sequence",
    "scale_rewards": "batch",
    "temperature": 0.9,
    "top_k": 40,
    "sync_ref_model": True,
    "ref_model_mixup_alpha": 0.3,
    "ref_model_sync_steps": 12,
    "entropy_coef": 0.01,
    "sapo_temperature_pos": 1.2,
    "sapo_temperature_neg": 1.4,
    "use_bias_correction_kl": False,
    "activation_checkpointing": False,
    "multi_objective_aggregation": "normalize_then_sum",
    "seed": 5,
    "save_steps": 30,
    "save_total_limit": 3,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 6,
    "use_cpu": True,
    "vllm_importance_sampling_mode": "sequence_truncate",
    "vllm_importance_sampling_clip_max": 1.7,
}
"""Every shared field, none at its default."""


def _config(**fields: Any) -> Any:
    return pytest.importorskip("trl").GRPOConfig(**{"bf16": False, "use_cpu": True, "output_dir": "out", **fields})


def _recipe(keys: dict[str, Any]) -> Any:
    return load_recipe("quickstart", [f"{key}={value}" for key, value in keys.items()])


@pytest.mark.parametrize("fields", [{"loss_type": "dapo"}, CHANGED], ids=["defaults", "changed"])
def test_from_trl_and_back(fields: dict[str, Any]) -> None:
    config = _config(**fields)
    keys = recipe_keys_from_grpo_config(config)
    back = grpo_config_from_recipe(_recipe(keys))
    for name in CHANGED:
        wanted = getattr(config, name)
        masked = name.startswith("vllm_") and config.vllm_importance_sampling_mode == "sequence_mask"
        if wanted is not None and (name, wanted) != ("max_steps", -1) and not masked:  # else the recipe's own stands
            assert getattr(back, name) == wanted, name
    assert recipe_keys_from_grpo_config(back).items() >= keys.items()
    assert back.steps_per_generation == config.steps_per_generation
    assert back.generation_batch_size == config.generation_batch_size


def test_every_shared_field_of_the_round_trip_differs_from_its_default() -> None:
    usual, changed = _config(), _config(**CHANGED)
    same = [name for name in CHANGED if getattr(usual, name) == getattr(changed, name)]
    assert same == ["per_device_train_batch_size", "use_cpu"]


def test_from_a_recipe_and_back() -> None:
    recipe = load_recipe("quickstart")
    keys = recipe_keys_from_grpo_config(grpo_config_from_recipe(recipe, use_cpu=True))
    assert _recipe(keys | {"device": recipe.device}) == recipe


def test_steps_and_batches_are_translated() -> None:
    """60 updates, three per RL step; 8 * 6 completions in groups of 4, 8 at a time."""
    keys = recipe_keys_from_grpo_config(_config(**CHANGED))
    assert keys["rl.max_steps"] == 20
    assert keys["rl.save_steps"] == 10
    assert keys["rl.ref_model_sync_steps"] == 4
    assert keys["rollout.scenes_per_step"] == 12
    assert keys["rl.micro_batch_scenes"] == 2
    assert keys["rl.advantages"] == "gdpo"
    assert keys["rl.seeds"] == [5]


@pytest.mark.parametrize(("steps", "total"), [(7, 100), (29, 100), (100, 100), (3, 7)])
def test_warmup_steps_survive_the_ratio(steps: int, total: int) -> None:
    from rlhf_drive.training.schedule import learning_rate_scale

    keys = recipe_keys_from_grpo_config(_config(warmup_steps=steps, max_steps=total))
    ratio = keys["rl.warmup_ratio"]
    assert learning_rate_scale(steps - 1, total, ratio) == 1.0
    assert learning_rate_scale(steps - 2, total, ratio) == pytest.approx((steps - 1) / steps)
    back = grpo_config_from_recipe(_recipe(keys))
    assert back.get_warmup_steps(total) == steps


def test_an_unset_upper_bound_is_the_lower_one() -> None:
    keys = recipe_keys_from_grpo_config(_config(epsilon=0.15))
    assert (keys["rl.epsilon_high"], keys["rl.delta"]) == (0.15, 0.0)
    assert "rl.max_steps" not in keys


@pytest.mark.parametrize(
    ("fields", "cap"),
    [
        ({"vllm_importance_sampling_mode": "token_truncate"}, 3.0),  # TRL's default bound
        ({"vllm_importance_sampling_correction": False, "vllm_importance_sampling_mode": "token_truncate"}, 0.0),
        ({}, None),  # sequence_mask, without vLLM to act on
    ],
)
def test_the_correction_of_older_samples_is_translated(fields: dict[str, Any], cap: float | None) -> None:
    keys = recipe_keys_from_grpo_config(_config(**fields))
    assert keys.get("rl.importance_sampling_cap") == cap
    recipe = load_recipe("quickstart", ["rl.importance_sampling_cap=0.0", "rl.importance_sampling_level=token"])
    assert not grpo_config_from_recipe(recipe).vllm_importance_sampling_correction
    weighed = replace(recipe, rl=replace(recipe.rl, importance_sampling_cap=1.5))
    back = grpo_config_from_recipe(weighed)
    assert (back.vllm_importance_sampling_mode, back.vllm_importance_sampling_clip_max) == ("token_truncate", 1.5)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"vllm_importance_sampling_mode": "sequence_truncate"}, "Set it to 'token_truncate'"),
        ({"vllm_importance_sampling_clip_max": None, "vllm_importance_sampling_clip_min": 0.5}, "from above only"),
        ({"vllm_importance_sampling_clip_min": 0.5}, "Give clip_max alone"),
    ],
)
def test_other_corrections_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=rf"vllm_importance_sampling_.* = .*{words}") as caught:
        recipe_keys_from_grpo_config(_config(**{"vllm_importance_sampling_mode": "token_truncate", **fields}))
    assert len(str(caught.value).splitlines()) == 2


def test_trl_has_no_older_samples() -> None:
    recipe = load_recipe("quickstart")
    with pytest.raises(ConfigError, match=r"rollout\.max_staleness = 1: TRL"):
        grpo_config_from_recipe(replace(recipe, rollout=replace(recipe.rollout, max_staleness=1)))


def test_what_trl_alone_can_do_is_listed() -> None:
    config = _config(
        loss_type="vespo", top_p=0.9, adam_beta2=0.95, reward_weights=[1.0, 2.0], mask_truncated_completions=True,
        gradient_accumulation_steps=2, steps_per_generation=4, max_completion_length=64, max_steps=7, num_iterations=2,
        lr_scheduler_type="constant",
    )  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        recipe_keys_from_grpo_config(config)
    lines = str(caught.value).splitlines()[1:]
    found = {line.split()[0].rstrip(":") for line in lines}
    assert found == {
        *("loss_type", "top_p", "adam_beta2", "reward_weights", "mask_truncated_completions", "steps_per_generation"),
        *("max_completion_length", "max_steps", "lr_scheduler_type"),
    }
    assert len(lines) == 9


def test_what_a_recipe_alone_can_do_is_listed() -> None:
    changes = {
        "rl.likelihood_steps": 4, "rl.advantages": "rloo", "rl.loss_type": "gmpo", "rl.kl_estimator": "k2",
        "rl.bc_coef": 0.1, "rl.router": "replay", "rl.lora_rank": 4, "rl.ema_decay": 0.9, "rl.seeds": [0, 1],
        "rl.reward_scale": 2.0, "rl.scene_visits": "informative", "rl.likelihood": "elbo",
    }  # fmt: skip
    recipe = load_recipe("quickstart")
    plain = {key.removeprefix("rl."): value for key, value in changes.items()}
    broken = replace(recipe, rl=replace(recipe.rl, **plain))
    with pytest.raises(ConfigError) as caught:
        grpo_config_from_recipe(broken)
    lines = str(caught.value).splitlines()[1:]
    assert {line.split()[0].rstrip(",") for line in lines} == set(changes)
    # What is overridden is no problem.
    with pytest.raises(ConfigError) as caught:
        grpo_config_from_recipe(broken, loss_type="grpo", seed=3, beta=0.0)
    assert len(str(caught.value).splitlines()) == len(lines) + 1 - 3


def test_a_recipe_without_rl_has_no_config() -> None:
    with pytest.raises(ConfigError, match="sections rl and rollout"):
        grpo_config_from_recipe(replace(load_recipe("quickstart"), rl=None))  # type: ignore[arg-type]
