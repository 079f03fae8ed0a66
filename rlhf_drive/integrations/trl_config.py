"""TRL's `GRPOConfig` as keys of a recipe, and a recipe as a `GRPOConfig`.

    keys = recipe_keys_from_grpo_config(GRPOConfig(loss_type="dapo", epsilon_high=0.28, max_steps=200))
    recipe = load_recipe("quickstart", [f"{key}={value}" for key, value in keys.items()])
    config = grpo_config_from_recipe(recipe, output_dir="somewhere")

Most names are the same. What differs: TRL counts optimizer steps and a recipe RL steps, each of `num_iterations`
optimizer steps; TRL counts completions and a recipe scenes, each of `num_generations`. Our learning rate is always a
cosine after the warm-up: TRL's default, linear, becomes that. `rl.importance_sampling_cap` is TRL's correction for
samples of vLLM (modes `token_truncate` and `sequence_truncate`, `vllm_importance_sampling_clip_max`); in a recipe it
acts where rollouts are older than the update, or of another precision.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Iterator, Mapping
from typing import Any

from rlhf_drive.config import ACTION_TOKENS, Recipe
from rlhf_drive.errors import ConfigError

__all__ = ["grpo_config_from_recipe", "recipe_keys_from_grpo_config"]

SAME_NAME: Mapping[str, tuple[str, ...]] = {
    "rl": (
        "learning_rate",
        "weight_decay",
        "max_grad_norm",
        "num_iterations",
        "loss_type",
        "importance_sampling_level",
        "scale_rewards",
        "epsilon",
        "sapo_temperature_pos",
        "sapo_temperature_neg",
        "beta",
        "use_bias_correction_kl",
        "sync_ref_model",
        "ref_model_mixup_alpha",
        "entropy_coef",
    ),
    "rollout": ("num_generations", "temperature", "top_k"),
}
"""Keys by section that mean the same under the same name in TRL."""
AGGREGATIONS = {"group_mean": "sum_then_normalize", "gdpo": "normalize_then_sum"}
"""`rl.advantages` and TRL's `multi_objective_aggregation`."""
TRL_LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo")
"""Objectives that both have."""
TRL_LEVELS = ("token", "sequence")
"""Importance levels that both have."""
TRANSLATED = {
    *("max_steps", "warmup_steps", "save_steps", "save_total_limit", "ref_model_sync_steps", "seed", "use_cpu"),
    *("epsilon_high", "delta", "multi_objective_aggregation", "max_completion_length", "lr_scheduler_type"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "generation_batch_size"),
    *("gradient_checkpointing", "activation_checkpointing"),
    *("vllm_importance_sampling_correction", "vllm_importance_sampling_mode", "vllm_importance_sampling_clip_max"),
}
"""Fields of `GRPOConfig` that become recipe keys by a rule of their own."""
OPERATIONAL = {
    *("output_dir", "run_name", "project", "report_to", "disable_tqdm", "debug", "skip_memory_metrics", "local_rank"),
    *("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "do_train", "bf16", "disable_dropout"),
    *("per_device_eval_batch_size", "num_completions_to_print", "remove_unused_columns", "pad_to_multiple_of"),
}
"""Fields that change no update: where and how much is logged, and what our RL does anyway (no dropout, float32)."""
TRUNCATE = "_truncate"
"""Modes of TRL's importance-sampling correction that lower weights; the others set them to zero, as ours never does."""
OPERATIONAL_PREFIXES = ("log", "hub_", "push_to_hub", "dataloader_", "vllm_", "ds3_")
ALONE: Mapping[str, tuple[object, ...]] = {
    "likelihood": ("trace",),
    "likelihood_steps": (0,),
    "advantages": tuple(AGGREGATIONS),
    "reward_scale": (1.0,),
    "dynamic_sampling_budget": (0.0,),
    "scene_visits": ("uniform",),
    "loss_type": TRL_LOSS_TYPES,
    "importance_sampling_level": TRL_LEVELS,
    "bc_coef": (0.0,),
    "router": ("free", "frozen"),
    "load_balance_coef": (0.0,),
    "router_z_coef": (0.0,),
    "lora_rank": (0,),
    "ema_decay": (0.0,),
    "kl_limit": (0.0,),
    "ratio_limit": (0.0,),
}
"""Keys of section `rl` that TRL lacks, or has fewer values of, and the values with which it does the same."""


def recipe_keys_from_grpo_config(config: Any) -> dict[str, Any]:
    """What a `trl.GRPOConfig` says, as values by dotted recipe key.

    `max_steps` of -1 (TRL then counts epochs), `save_total_limit` of None and TRL's default correction of samples
    (`sequence_mask`, which needs vLLM to act) give no key: the recipe's own stand.

    Args:
        config: A `trl.GRPOConfig`.

    Raises:
        ConfigError: Fields that differ from TRL's default and have no counterpart; the message lists all.

    Example:
        >>> keys = recipe_keys_from_grpo_config(GRPOConfig(epsilon=0.1, delta=2.0))
        >>> keys["rl.epsilon"], keys["rl.epsilon_high"], keys["rl.delta"]
        (0.1, 0.1, 2.0)
    """
    problems = [*_without_counterpart(config), *_unlike(config)]
    if problems:
        raise ConfigError("This GRPOConfig has no recipe:" + "".join(f"\n  {problem}" for problem in problems))
    keys = {f"{section}.{name}": getattr(config, name) for section, names in SAME_NAME.items() for name in names}
    keys["rl.epsilon_high"] = config.epsilon if config.epsilon_high is None else config.epsilon_high
    keys["rl.delta"] = config.delta or 0.0
    keys["rl.kl_estimator"], keys["rl.kl_in"] = "k3", "loss"
    keys["rl.advantages"] = {v: k for k, v in AGGREGATIONS.items()}[config.multi_objective_aggregation]
    keys["rl.gradient_checkpointing"] = bool(config.gradient_checkpointing)
    keys["rl.seeds"] = [config.seed]
    scenes = config.generation_batch_size // config.num_generations
    keys["rollout.scenes_per_step"] = keys["rollout.scenes_per_chunk"] = scenes
    keys["rl.micro_batch_scenes"] = max(1, config.per_device_train_batch_size // config.num_generations)
    updates = config.num_iterations
    if config.max_steps > 0:
        keys["rl.max_steps"] = config.max_steps // updates
    keys["rl.warmup_ratio"] = _warmup_ratio(config.warmup_steps, config.max_steps)
    keys["rl.save_steps"] = math.ceil(config.save_steps / updates)
    keys["rl.ref_model_sync_steps"] = math.ceil(config.ref_model_sync_steps / updates)
    if config.save_total_limit is not None:
        keys["rl.keep_checkpoints"] = config.save_total_limit
    if not config.vllm_importance_sampling_correction:
        keys["rl.importance_sampling_cap"] = 0.0
    elif config.vllm_importance_sampling_mode.endswith(TRUNCATE):
        keys["rl.importance_sampling_cap"] = config.vllm_importance_sampling_clip_max
    if config.use_cpu:
        keys["device"] = "cpu"
    return keys


def grpo_config_from_recipe(recipe: Recipe, **overrides: Any) -> Any:
    """The `trl.GRPOConfig` that trains a language model as the recipe's sections `rollout` and `rl` train a policy.

    What a `GRPOConfig` does not hold stays behind: scenes, reward, network, decoding order and steps, checkpoints,
    monitors, `spread_tolerance` (TRL filters nothing; a group without spread has advantage 0 there too).

    Args:
        recipe: A recipe with both sections.
        overrides: Fields of `GRPOConfig` that are set whatever the recipe says.

    Raises:
        ConfigError: TRL is not installed, or keys say what TRL cannot do; the message lists all.

    Example:
        >>> grpo_config_from_recipe(load_recipe("quickstart"), output_dir="out").importance_sampling_level
        'sequence'
    """
    if importlib.util.find_spec("trl") is None:
        raise ConfigError("A GRPOConfig needs TRL, which is not installed: pip install 'rlhf-drive[trl]'.")
    from trl import GRPOConfig

    if not recipe.rl or not recipe.rollout:
        raise ConfigError(f"Recipe {recipe.name!r} has no RL: sections rl and rollout are needed for a GRPOConfig.")
    rl, rollout = recipe.rl, recipe.rollout
    problems = [problem for field, problem in _beyond_trl(recipe) if field not in overrides]
    if problems:
        raise ConfigError(f"Recipe {recipe.name!r} has no GRPOConfig:" + "".join(f"\n  {p}" for p in problems))
    fields = {name: getattr(getattr(recipe, section), name) for section, names in SAME_NAME.items() for name in names}
    micro = math.gcd(rl.micro_batch_scenes, rollout.scenes_per_step)
    updates = rl.num_iterations
    fields |= {
        "epsilon_high": rl.epsilon_high,
        "delta": rl.delta or None,
        "multi_objective_aggregation": AGGREGATIONS.get(rl.advantages),
        "vllm_importance_sampling_correction": rl.importance_sampling_cap > 0,
        "activation_checkpointing": rl.gradient_checkpointing,
        "seed": rl.seeds[0],
        "per_device_train_batch_size": micro * rollout.num_generations,
        "gradient_accumulation_steps": rollout.scenes_per_step // micro,
        "max_steps": rl.max_steps * updates,
        # A ratio below 1, or a number of steps; a ratio of 1 would be read as one step.
        "warmup_steps": rl.warmup_ratio if rl.warmup_ratio < 1 else rl.max_steps * updates,
        "save_steps": rl.save_steps * updates,
        "ref_model_sync_steps": rl.ref_model_sync_steps * updates,
        "save_total_limit": rl.keep_checkpoints,
        "lr_scheduler_type": "cosine",
        "max_completion_length": ACTION_TOKENS,
        "disable_dropout": True,
        "use_cpu": recipe.device == "cpu",
        "bf16": False,
        "output_dir": recipe.output_dir,
    }
    if rl.importance_sampling_cap > 0:
        fields["vllm_importance_sampling_mode"] = rl.importance_sampling_level + TRUNCATE
        fields["vllm_importance_sampling_clip_max"] = rl.importance_sampling_cap
    return GRPOConfig(**{**fields, **overrides})


def _without_counterpart(config: Any) -> Iterator[str]:
    """Fields that no key stands for, where they differ from TRL's default."""
    usual = type(config)(
        output_dir=config.output_dir, use_cpu=config.use_cpu, bf16=False, activation_checkpointing=True
    )
    known = {name for names in SAME_NAME.values() for name in names} | TRANSLATED | OPERATIONAL
    for field in dataclasses.fields(config):
        value, default = getattr(config, field.name), getattr(usual, field.name)
        if field.name not in known and not field.name.startswith(OPERATIONAL_PREFIXES) and value != default:
            yield f"{field.name} = {value!r} has no counterpart. Leave it at {default!r}."


def _unlike(config: Any) -> Iterator[str]:
    """Values of fields that have a counterpart, but not for that value."""
    if config.loss_type not in TRL_LOSS_TYPES:
        yield f"loss_type = {config.loss_type!r} has no counterpart. Known: {', '.join(TRL_LOSS_TYPES)}."
    if config.lr_scheduler_type not in ("linear", "cosine"):
        yield f"lr_scheduler_type = {str(config.lr_scheduler_type)!r} has no counterpart: ours is 'cosine'."
    if config.steps_per_generation != config.gradient_accumulation_steps:
        yield (
            f"steps_per_generation = {config.steps_per_generation} makes several updates on parts of the rollouts; "
            f"ours are on all of them. Leave it at gradient_accumulation_steps = {config.gradient_accumulation_steps}."
        )
    if config.loss_type == "bnpo" and config.per_device_train_batch_size % config.num_generations:
        yield (
            f"per_device_train_batch_size = {config.per_device_train_batch_size} splits a group of num_generations = "
            f"{config.num_generations}; bnpo depends on the split, and ours keeps groups whole."
        )
    yield from _unlike_correction(config)
    if config.max_completion_length not in (512, ACTION_TOKENS):
        yield f"max_completion_length = {config.max_completion_length}: a plan has {ACTION_TOKENS} tokens. Leave it."
    if config.warmup_steps >= 1 and config.max_steps <= 0:
        yield f"warmup_steps = {config.warmup_steps} is a share of max_steps, which is {config.max_steps}. Set that."
    counted = ["max_steps", *(["ref_model_sync_steps"] if config.sync_ref_model else [])]
    for name in counted:
        if getattr(config, name) > 0 and getattr(config, name) % config.num_iterations:
            yield (
                f"{name} = {getattr(config, name)} counts updates, of which each RL step makes num_iterations = "
                f"{config.num_iterations}. Make it a multiple."
            )


def _unlike_correction(config: Any) -> Iterator[str]:
    """Truncated importance sampling that is not ours: other places, a lower bound, no upper one."""
    mode = config.vllm_importance_sampling_mode
    if not config.vllm_importance_sampling_correction or not mode.endswith(TRUNCATE):
        return
    if mode != config.importance_sampling_level + TRUNCATE:
        yield (
            f"vllm_importance_sampling_mode = {mode!r}: ours weighs what importance_sampling_level = "
            f"{config.importance_sampling_level!r} compares. Set it to {config.importance_sampling_level + TRUNCATE!r}."
        )
    if config.vllm_importance_sampling_clip_max is None or config.vllm_importance_sampling_clip_min is not None:
        yield (
            f"vllm_importance_sampling_clip_min = {config.vllm_importance_sampling_clip_min}, clip_max = "
            f"{config.vllm_importance_sampling_clip_max}: ours bounds weights from above only. Give clip_max alone."
        )


def _beyond_trl(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """What TRL cannot do, each with the field of `GRPOConfig` that would hold it (empty where there is none)."""
    rl, rollout = recipe.rl, recipe.rollout
    for name, same in ALONE.items():
        value = getattr(rl, name)
        if value not in same:
            field = "multi_objective_aggregation" if name == "advantages" else name
            yield field, f"rl.{name} = {value!r}: TRL has {' or '.join(repr(v) for v in same)} only."
    if rl.beta > 0 and (rl.kl_estimator, rl.kl_in) != ("k3", "loss"):
        yield (
            "beta",
            f"rl.kl_estimator = {rl.kl_estimator!r}, rl.kl_in = {rl.kl_in!r}: TRL has 'k3' in the 'loss' only.",
        )
    if rollout.max_staleness > 0:
        yield (
            "",
            f"rollout.max_staleness = {rollout.max_staleness}: TRL's GRPOTrainer samples with the latest weights only.",
        )
    if len(rl.seeds) != 1:
        yield "seed", f"rl.seeds = {list(rl.seeds)}: a GRPOConfig is one run. Give one."
    if rl.loss_type == "bnpo" and rollout.scenes_per_step % rl.micro_batch_scenes:
        yield (
            "per_device_train_batch_size",
            f"rl.micro_batch_scenes = {rl.micro_batch_scenes} does not divide rollout.scenes_per_step = "
            f"{rollout.scenes_per_step}; bnpo depends on the split, and TRL's is even.",
        )


def _warmup_ratio(warmup_steps: float, max_steps: int) -> float:
    """Share of the steps, such that ``ceil(ratio * max_steps)`` gives the steps back."""
    if warmup_steps < 1:
        return float(warmup_steps)
    ratio = min(1.0, warmup_steps / max_steps)
    while math.ceil(ratio * max_steps) > warmup_steps:  # 7 / 100 * 100 is 7.000000000000001
        ratio = math.nextafter(ratio, 0.0)
    return ratio
