"""From a recipe's sections to the objects that work: recipes never reach the mathematics."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs

from rlhf_drive.config import CompareSection, ParallelSection, ProcessSection, Recipe, RlSection, RolloutSection
from rlhf_drive.config_schema import PROCESS_KEYS
from rlhf_drive.errors import ConfigError
from rlhf_drive.likelihood import make_likelihood
from rlhf_drive.objectives import AdvantageSettings, ObjectiveSettings, make_advantages, make_objective
from rlhf_drive.policies import Architecture, Decoding, Policy, TrajectoryTokenizer, load_policy
from rlhf_drive.policies.checkpoints import check_same
from rlhf_drive.policies.feature_cache import FeatureCache
from rlhf_drive.policies.lora import LoraSettings, add_lora
from rlhf_drive.training.collect import Sampling
from rlhf_drive.training.engine import TrainingEngine
from rlhf_drive.training.guards import Limits
from rlhf_drive.training.ranks import Ranks
from rlhf_drive.training.reference import AdapterReference, FrozenReference, ReferencePolicy
from rlhf_drive.training.rl import LoopSettings
from rlhf_drive.training.routing import freeze_router
from rlhf_drive.training.run_folder import RunIdentity
from rlhf_drive.training.sft import SftSettings
from rlhf_drive.training.step_collector import Visiting
from rlhf_drive.training.trainer import RlTrainer
from rlhf_drive.training.trainer_settings import TrainerSettings

__all__ = [
    "build_accelerator",
    "build_policy",
    "build_trainer",
    "decoding_of",
    "loop_settings",
    "objective_settings",
    "precision_of",
    "sampling_of",
    "sft_settings",
    "trainer_settings",
    "visiting_of",
]


def build_accelerator(device: str, *, timeout_s: float = 1800.0) -> Accelerator:
    """The process's accelerator; joins the other processes where `torchrun` or `accelerate launch` started several.

    Args:
        device: `auto`, `cpu` or `cuda`; on CUDA each process of a machine gets a GPU of its own.
        timeout_s: A process that waits for longer for the others ends with an error.

    Raises:
        ConfigError: CUDA was asked for and is not there, or the launcher was told how to divide weights.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda', but torch sees no GPU; use device=auto or device=cpu.")
    handlers = [
        InitProcessGroupKwargs(timeout=timedelta(seconds=timeout_s)),
        DistributedDataParallelKwargs(broadcast_buffers=False),  # buffers are constants
    ]
    # Without being told so `accelerate` does not join processes on a machine that has no GPU.
    cpu = device == "cpu" or not torch.cuda.is_available()
    # An environment variable of `accelerate` must not change the precision behind the recipe's back.
    accelerator = Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=handlers)
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise ConfigError(
            f"`accelerate` was told to use {accelerator.distributed_type.value}, but the recipe decides how processes "
            "share a policy: set parallel.strategy there, and leave FSDP and DeepSpeed out of the launcher's settings."
        )
    return accelerator


def build_policy(recipe: Recipe, device: torch.device) -> Policy:
    """A policy with fresh weights, drawn from `recipe.seed`; or the checkpoint that `recipe.sft.policy` names."""
    architecture = Architecture(**dataclasses.asdict(recipe.policy))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        tokenizer = TrajectoryTokenizer(**dataclasses.asdict(recipe.tokenizer))
        policy = Policy(architecture, tokenizer, recipe.process.name, process_options(recipe.process))
    if recipe.sft.policy:
        start = load_policy(Path(recipe.sft.policy))
        check_same(start, policy, f"sft.policy {recipe.sft.policy} does not fit the recipe")
        policy = start
    return policy.to(device)


def process_options(section: ProcessSection) -> dict[str, float]:
    """Numbers that the recipe's process is built with."""
    return {key: float(getattr(section, key)) for key in PROCESS_KEYS[section.name]}


def decoding_of(section: RolloutSection | CompareSection) -> Decoding:
    """How a recipe samples."""
    return Decoding(section.steps, section.order, section.temperature, section.top_k)


def sampling_of(section: RolloutSection, *, keep_experts: bool = False) -> Sampling:
    """How a recipe samples groups for RL."""
    return Sampling(
        decoding=decoding_of(section),
        num_generations=section.num_generations,
        scenes_per_step=section.scenes_per_step,
        scenes_per_chunk=section.scenes_per_chunk,
        previous_plan=section.previous_plan,
        keep_experts=keep_experts,
    )


def sft_settings(recipe: Recipe) -> SftSettings:
    """Arguments of supervised training."""
    values = dataclasses.asdict(recipe.sft)
    values.pop("policy")
    return SftSettings(**values, seed=recipe.seed)


T = TypeVar("T")


def _fields_of(kind: type[T], section: RlSection, **others: object) -> T:
    """`kind` from the keys of the section that have its fields' names."""
    names = {field.name for field in dataclasses.fields(cast(Any, kind))}
    return kind(**{k: v for k, v in dataclasses.asdict(section).items() if k in names}, **others)


def trainer_settings(section: RlSection, *, seed: int = 0, recompute_old: bool = False) -> TrainerSettings:
    """Arguments of the policy update."""
    limits = _fields_of(Limits, section)
    return _fields_of(TrainerSettings, section, seed=seed, recompute_old=recompute_old, limits=limits)


def loop_settings(recipe: Recipe, *, seed: int, run: RunIdentity | None = None) -> LoopSettings:
    """Arguments of the loop around the update."""
    rl, logging = recipe.rl, recipe.logging
    return LoopSettings(
        seed=seed,
        save_steps=rl.save_steps,
        keep_checkpoints=rl.keep_checkpoints,
        max_invalid_fraction=recipe.reward.max_invalid_fraction,
        max_staleness=recipe.rollout.max_staleness,
        picture_steps=logging.picture_steps,
        picture_scenes=logging.picture_scenes,
        profile_steps=logging.profile_steps,
        run=run,
    )


def precision_of(section: ParallelSection) -> torch.dtype:
    """What matrix products are computed in."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[section.precision]


def objective_settings(section: RlSection) -> ObjectiveSettings:
    """Arguments of the objective."""
    return _fields_of(ObjectiveSettings, section)


def visiting_of(section: RlSection) -> Visiting:
    """Which scenes an RL step learns from."""
    return Visiting(section.scene_visits, section.dynamic_sampling_budget)


def build_trainer(
    section: RlSection,
    policy: Policy,
    *,
    seed: int,
    accelerator: Accelerator,
    features: FeatureCache,
    folder: Path,
    reward_weights: Mapping[str, float] | None = None,
    ranks: Ranks | None = None,
    strategy: str = "ddp",
    stale: bool = False,
) -> RlTrainer:
    """Everything of an RL run that updates the policy.

    Args:
        section: The recipe's.
        policy: Policy to start from; it gets adapters where the recipe says so.
        seed: Of the run.
        accelerator: Device and backward.
        features: Cache of network inputs.
        folder: Of the stage, for what is kept of an update that is not finite.
        reward_weights: Weight of each reward term by its column in the scores, for `gdpo`.
        ranks: The processes that train together; those that were launched by default.
        strategy: How they share the policy, `ddp` or `fsdp2`.
        stale: Whether older weights may have sampled.

    Raises:
        ConfigError: A function of the user's cannot be loaded, or values do not fit together.
    """
    objective = objective_settings(section)
    if section.lora_rank:
        settings = LoraSettings(section.lora_rank, section.lora_alpha, section.lora_experts)
        policy = add_lora(policy, settings, seed=seed)
    policy.decoder.checkpointing = section.gradient_checkpointing
    reference: ReferencePolicy | None = None
    if section.beta > 0:
        reference = AdapterReference(policy) if section.lora_rank else FrozenReference(policy)
    if section.router == "frozen":
        freeze_router(policy)
    engine = TrainingEngine(
        policy, learning_rate=section.learning_rate, weight_decay=section.weight_decay, accelerator=accelerator,
        ranks=ranks, strategy=strategy,
    )  # fmt: skip
    return RlTrainer(
        engine,
        make_likelihood(section.likelihood, draws=section.likelihood_draws, antithetic=section.likelihood_antithetic),
        make_advantages(_fields_of(AdvantageSettings, section)),
        make_objective(objective),
        objective,
        trainer_settings(section, seed=seed, recompute_old=stale or policy.precision != torch.float32),
        features=features,
        reference=reference,
        folder=folder,
        reward_weights=reward_weights,
    )


def epochs_to_steps(scenes: int, batch_size: int, epochs: int) -> int:
    """Optimizer steps of so many passes."""
    return math.ceil(scenes / batch_size) * epochs
