"""Rules between the keys that say on how many workers and processes a recipe runs. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.util import find_spec

from rlhf_drive.config_schema import LoggingSection, RaySection, Recipe, RlSection, RolloutSection
from rlhf_drive.objective_rules import correction_refusal

__all__ = ["BEHAVIOUR", "find_scale_conflicts"]

BEHAVIOUR = "trace"
"""The likelihood whose values at the weights that sampled are the sampler's own log-probabilities."""


def find_scale_conflicts(recipe: Recipe) -> Iterator[str]:
    """Problems of engines, workers, staleness and logs; ``key.path: what is wrong``, one line each."""
    if recipe.rollout:
        yield from _workers(recipe.rollout)
    if recipe.rollout and recipe.rl:
        yield from _stale(recipe.rollout, recipe.rl)
        yield from _weighed(recipe, recipe.rollout, recipe.rl)
    if recipe.ray:
        yield from _cluster(recipe, recipe.ray)
    if recipe.sft and recipe.sft.micro_batch_scenes > recipe.sft.batch_size:
        most, got = recipe.sft.batch_size, recipe.sft.micro_batch_scenes
        yield f"sft.micro_batch_scenes: at most sft.batch_size = {most}, or 0 for all of it; got {got}"
    if recipe.rl and recipe.logging:
        yield from _logging(recipe.rl, recipe.logging)


def _workers(rollout: RolloutSection) -> Iterator[str]:
    chunks = -(-rollout.scenes_per_step // rollout.scenes_per_chunk)
    if rollout.engine == "ray" and rollout.workers > chunks * (1 + rollout.max_staleness):
        yield (
            f"rollout.workers: a step is sampled in {chunks} chunks of scenes_per_chunk = {rollout.scenes_per_chunk} "
            f"scenes, so {rollout.workers} workers would not all have work. Use smaller chunks, or fewer workers"
        )
    if rollout.engine == "local" and (rollout.workers > 1 or rollout.gpus_per_worker):
        key, value = ("workers", "1") if rollout.workers > 1 else ("gpus_per_worker", "0")
        yield (
            f"rollout.{key}: has no effect with engine 'local', with which the processes that train sample. Set it to "
            f"{value}, or rollout.engine to ray"
        )
    if rollout.gpus_per_worker > 1 and rollout.gpus_per_worker != round(rollout.gpus_per_worker):
        yield f"rollout.gpus_per_worker: a part of one GPU, or whole ones; got {rollout.gpus_per_worker:g}"


def _stale(rollout: RolloutSection, rl: RlSection) -> Iterator[str]:
    if not rollout.max_staleness:
        return
    if rollout.engine != "ray":
        yield (
            "rollout.max_staleness: above 0 sampling and training overlap, for which sampling needs workers of its "
            "own. Set rollout.engine to ray, or max_staleness to 0"
        )
    if rl.likelihood != BEHAVIOUR:
        yield (
            f"rollout.max_staleness: what older weights have sampled is weighed by their log-probabilities, which are "
            f"those of likelihood {BEHAVIOUR!r}; with {rl.likelihood!r} there are none. Use {BEHAVIOUR}, or set it to 0"
        )


def _weighed(recipe: Recipe, rollout: RolloutSection, rl: RlSection) -> Iterator[str]:
    """Losses that cannot weigh what other weights, or another rounding, have sampled."""
    coarse = recipe.parallel is not None and recipe.parallel.precision == "bfloat16" and rl.likelihood == BEHAVIOUR
    why = f"rollout.max_staleness {rollout.max_staleness}" if rollout.max_staleness else "parallel.precision bfloat16"
    weighed = (rollout.max_staleness > 0 or coarse) and rl.importance_sampling_cap > 0
    if weighed and (reason := correction_refusal(rl.loss_type)):
        yield f"rl.importance_sampling_cap: with {why}: {reason.rstrip('.')}"


def _cluster(recipe: Recipe, ray: RaySection) -> Iterator[str]:
    used = ["rollout"] if recipe.rollout and recipe.rollout.engine == "ray" else []
    used += ["reward"] if recipe.reward and recipe.reward.engine == "ray" else []
    if used and find_spec("ray") is None:
        yield f'{used[0]}.engine: needs the package ray. Install it: pip install "rlhf-drive[ray]", or use local'
    if ray.address is None:
        return
    if not used:
        yield "ray.address: nothing here runs on Ray. Set it to null, or rollout.engine or reward.engine to ray"
    if ray.address.startswith("ray://"):
        yield (
            f"ray.address: Ray Client cannot be used; got {ray.address!r}. Start the run on a machine of the cluster "
            "and give host:port of its head, or auto"
        )
    elif ray.address != "auto" and not re.fullmatch(r"[^\s:]+:\d+|\[[0-9a-fA-F:]+\]:\d+", ray.address):
        yield f"ray.address: must be host:port of a cluster's head, auto or null; got {ray.address!r}"


def _logging(rl: RlSection, logging: LoggingSection) -> Iterator[str]:
    late = [step for step in logging.profile_steps if step > rl.max_steps]
    if late:
        yield f"logging.profile_steps: the run has rl.max_steps = {rl.max_steps} steps; got {late[0]}"
    for package in ("trackio", "wandb"):
        if getattr(logging, package) and find_spec(package) is None:
            yield f'logging.{package}: needs the package. Install it: pip install "rlhf-drive[{package}]"'
    if (logging.trackio or logging.wandb) and not logging.project.strip():
        yield "logging.project: must name a project for Trackio and Weights & Biases"
