"""From a recipe's sections to the objects that work: recipes never reach the mathematics."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import torch
from accelerate import Accelerator

from rlhf_drive.config import CompareSection, Recipe, RlSection, RolloutSection
from rlhf_drive.errors import CheckpointError, ConfigError
from rlhf_drive.policies import Architecture, Decoding, Policy, TrajectoryTokenizer, load_policy
from rlhf_drive.policies.checkpoints import describe_difference
from rlhf_drive.training.collect import Sampling
from rlhf_drive.training.sft import SftSettings
from rlhf_drive.training.trainer import TrainerSettings

__all__ = [
    "build_accelerator",
    "build_policy",
    "decoding_of",
    "sampling_of",
    "sft_settings",
    "trainer_settings",
]


def build_accelerator(device: str) -> Accelerator:
    """The process's accelerator.

    Raises:
        ConfigError: CUDA was asked for and is not there, or several processes were launched.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda', but torch sees no GPU; use device=auto or device=cpu.")
    # An environment variable of `accelerate` must not change the precision behind the recipe's back.
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision="no")
    if accelerator.num_processes > 1:
        raise ConfigError(
            f"{accelerator.num_processes} processes were launched; training runs in one process for now. Start it with "
            "`rlhf-drive train` instead of `accelerate launch`."
        )
    return accelerator


def build_policy(recipe: Recipe, device: torch.device) -> Policy:
    """A policy with fresh weights, drawn from `recipe.seed`; or the checkpoint that `recipe.sft.policy` names."""
    architecture = Architecture(**dataclasses.asdict(recipe.policy))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        tokenizer = TrajectoryTokenizer(**dataclasses.asdict(recipe.tokenizer))
        policy = Policy(architecture, tokenizer, recipe.process.name)
    if recipe.sft.policy:
        start = load_policy(Path(recipe.sft.policy))
        if start.describe() != policy.describe():
            difference = describe_difference(start.describe(), policy.describe())
            raise CheckpointError(f"sft.policy {recipe.sft.policy} does not fit the recipe: {difference}.")
        policy = start
    return policy.to(device)


def decoding_of(section: RolloutSection | CompareSection) -> Decoding:
    """How a recipe samples."""
    return Decoding(section.steps, section.order, section.temperature, section.top_k)


def sampling_of(section: RolloutSection) -> Sampling:
    """How a recipe samples groups for RL."""
    return Sampling(
        decoding=decoding_of(section),
        num_generations=section.num_generations,
        scenes_per_step=section.scenes_per_step,
        scenes_per_chunk=section.scenes_per_chunk,
        previous_plan=section.previous_plan,
    )


def sft_settings(recipe: Recipe) -> SftSettings:
    """Arguments of supervised training."""
    values = dataclasses.asdict(recipe.sft)
    values.pop("policy")
    return SftSettings(**values, seed=recipe.seed)


def trainer_settings(section: RlSection) -> TrainerSettings:
    """Arguments of the policy update."""
    names = {f.name for f in dataclasses.fields(TrainerSettings)}
    return TrainerSettings(**{k: v for k, v in dataclasses.asdict(section).items() if k in names})


def epochs_to_steps(scenes: int, batch_size: int, epochs: int) -> int:
    """Optimizer steps of so many passes."""
    return math.ceil(scenes / batch_size) * epochs
