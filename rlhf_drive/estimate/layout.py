"""How a run is spread: processes that train, workers that sample, workers that score."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rlhf_drive.config import Recipe
from rlhf_drive.errors import ConfigError

__all__ = ["NODE", "ONE_PROCESS", "Layout", "layout_of"]

NODE = 8
"""Devices of a node."""


@dataclass(frozen=True)
class Layout:
    """Who does what."""

    trainers: int
    """Processes that train."""
    samplers: int
    """Workers that sample; 0 = the processes that train sample in turn (rollout engine `local`)."""
    scorers: int
    """Workers that score, each on a core; 0 = the cores beside the process (reward engine `local`)."""
    sharded: bool
    """Whether weights, gradients and moments are divided among those that train (FSDP2)."""
    bfloat16: bool
    """Whether matrix products are."""
    shared_gpu: bool = False
    """Whether samplers have no device of their own."""

    @property
    def nodes(self) -> int:
        """Nodes of those that train."""
        return math.ceil(self.trainers / NODE)

    @property
    def chunk_takers(self) -> int:
        """Processes that chunks of scenes are handed to."""
        return self.samplers or self.trainers


ONE_PROCESS = Layout(trainers=1, samplers=0, scorers=0, sharded=False, bfloat16=False)
"""One process that trains and samples, and scores on the cores beside it."""


def layout_of(
    recipe: Recipe, *, gpus: int = 1, workers: int | None = None, reward_workers: int | None = None
) -> Layout:
    """The layout of a recipe on so many devices.

    Args:
        recipe: Its engines, strategy and precision; `rollout.workers` where `workers` is not given.
        gpus: Devices, or processes on a CPU, in all. Workers that sample on devices of their own take theirs first.
        workers: Workers that sample (engine `ray`).
        reward_workers: Workers that score; None = the recipe's.

    Raises:
        ConfigError: Workers leave no device to train on.
    """
    rollout, trainers, samplers = recipe.rollout, gpus, 0
    ray = rollout.engine == "ray" or workers is not None
    per_worker = rollout.gpus_per_worker
    if ray:
        samplers = workers or rollout.workers
        taken = math.ceil(samplers * per_worker) if gpus > 1 else 0
        trainers = gpus - taken
        if trainers < 1:
            raise ConfigError(
                f"{samplers} workers with {per_worker:g} GPUs each take {taken} of {gpus} GPUs, so that none is left "
                "to train on. Give more --gpus, or fewer --workers."
            )
    scorers = reward_workers if reward_workers is not None else 0
    if not scorers and recipe.reward.engine == "ray":
        scorers = recipe.reward.workers
    parallel = recipe.parallel
    return Layout(
        trainers=trainers,
        samplers=samplers,
        scorers=scorers,
        sharded=parallel is not None and parallel.strategy == "fsdp2",
        bfloat16=parallel is not None and parallel.precision == "bfloat16",
        shared_gpu=bool(ray and not per_worker),
    )
