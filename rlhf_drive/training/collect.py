"""Experience for one RL step: plans are sampled chunk by chunk, and scored while the next chunk is sampled."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rewards.carriers import Scores
from rewards.service import RewardService
from rewards.two_frame import has_previous_frame
from rlhf_drive.errors import DataError
from rlhf_drive.policies import Decoding
from rlhf_drive.scenes import Scene, Trajectories
from rlhf_drive.scenes.previous import human_previous, previous_scene
from rollout import Rollout, RolloutService

__all__ = ["Experience", "Sampling", "check_previous_frames", "collect", "previous_plans"]


@dataclass(frozen=True)
class Sampling:
    """How groups of plans are sampled."""

    decoding: Decoding
    """Steps, order, temperature, top-k."""
    num_generations: int
    """G: plans per scene."""
    scenes_per_step: int
    """S: scenes per RL step."""
    scenes_per_chunk: int
    """Scenes sampled at once."""
    previous_plan: Literal["none", "human", "sampled"]
    """Where the plan of the frame before comes from."""
    keep_experts: bool = False
    """Whether the routing of the samples' forward passes is kept, to be replayed in training."""


@dataclass(frozen=True)
class Experience:
    """N = S * G scored rollouts, scene-major."""

    rollout: Rollout
    """Plans and how they came about."""
    scores: Scores
    """What they are worth."""
    sampling_s: float
    """Seconds spent sampling."""
    waiting_s: float
    """Seconds spent waiting for scores after the last plan was sampled."""


def previous_plans(
    rollouts: RolloutService, scenes: Sequence[Scene], sampling: Sampling, *, step: int
) -> Trajectories | None:
    """One plan of the frame before for each scene, the same for all G rows: what the plans of now must agree with.

    It is part of a row's circumstances, like the traffic: nothing is learned through it.

    Returns:
        ``[S * G, 8, 3]`` in the ego frame of 0.5 s ago, or None where none is asked for.

    Raises:
        DataError: The human's drive is asked for and a scene does not hold it.
    """
    if sampling.previous_plan == "none":
        return None
    if sampling.previous_plan == "human":
        poses = np.stack([human_previous(scene) for scene in scenes])
    else:
        before = [previous_scene(scene) for scene in scenes]
        poses = rollouts.sample(before, 1, sampling.decoding, step=step).trajectories.poses
    index = np.repeat(np.arange(len(scenes)), sampling.num_generations)
    return Trajectories(poses[index], index)


def check_previous_frames(scenes: Sequence[Scene], sampling: Sampling) -> None:
    """Refuse scenes whose previous frame is not known where a plan of it is asked for: EC could not be told.

    Raises:
        DataError: There are such scenes.
    """
    lacking = [scene.token for scene in scenes if not has_previous_frame(scene)]
    if lacking and sampling.previous_plan != "none":
        raise DataError(
            f"{len(lacking)} of {len(scenes)} scenes do not hold the ego's state of 0.5 s ago, which two-frame comfort "
            f"needs; the first is {lacking[0]!r}. Leave them out, or set rollout.previous_plan to none."
        )


def collect(
    rollouts: RolloutService, rewards: RewardService, scenes: Sequence[Scene], sampling: Sampling, *, step: int
) -> Experience:
    """Sample and score G plans for each of S scenes."""
    started = time.perf_counter()
    parts: list[Rollout] = []
    pending: list[Future[Scores]] = []
    for first in range(0, len(scenes), sampling.scenes_per_chunk):
        chunk = scenes[first : first + sampling.scenes_per_chunk]
        previous = previous_plans(rollouts, chunk, sampling, step=step)
        parts.append(
            rollouts.sample(
                chunk, sampling.num_generations, sampling.decoding, step=step, keep_experts=sampling.keep_experts
            )
        )
        pending.append(rewards.submit(chunk, parts[-1].trajectories, previous))
    sampled = time.perf_counter()
    scores = Scores.concatenate([future.result() for future in pending])
    return Experience(Rollout.concatenate(parts), scores, sampled - started, time.perf_counter() - sampled)
