"""Experience for one RL step: plans are sampled chunk by chunk, and scored while the next chunk is sampled."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, InvalidStateError
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from rewards.carriers import Scores
from rewards.service import RewardService
from rewards.two_frame import frame_offset
from rlhf_drive.errors import DataError
from rlhf_drive.policies import Decoding
from rlhf_drive.scenes import Scene, Trajectories
from rlhf_drive.scenes.previous import human_previous, previous_scene
from rlhf_drive.scenes.split import previous_gaps_us
from rlhf_drive.training import profile
from rlhf_drive.training.ranks import Ranks
from rlhf_drive.training.together import on_all
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
    return _submit_previous(rollouts, scenes, sampling, step).result()


def check_previous_frames(scenes: Sequence[Scene], sampling: Sampling) -> None:
    """Refuse scenes whose previous frame is not known where a plan of it is asked for: EC could not be told.

    Raises:
        DataError: There are such scenes.
    """
    if sampling.previous_plan == "none":
        return
    lacking = [i for i, gap in enumerate(previous_gaps_us(scenes).tolist()) if frame_offset(gap) == 0]
    if lacking:
        raise DataError(
            f"{len(lacking)} of {len(scenes)} scenes do not hold the ego's state of 0.5 s ago, which two-frame comfort "
            f"needs; the first is {scenes[lacking[0]].token!r}. Leave them out, or set rollout.previous_plan to none."
        )


@dataclass(frozen=True)
class _Chunk:
    """Some scenes on their way."""

    rollout: Future[Rollout]
    """Their plans."""
    scores: Future[Scores]
    """What these are worth."""


def collect(
    rollouts: RolloutService,
    rewards: RewardService,
    scenes: Sequence[Scene],
    sampling: Sampling,
    *,
    step: int,
    ranks: Ranks | None = None,
) -> Experience:
    """Sample and score G plans for each of S scenes; what is sampled is scored while others are still being sampled.

    Args:
        rollouts: Samples the chunks.
        rewards: Scores them.
        scenes: S scenes.
        sampling: How.
        step: Keys the random numbers.
        ranks: Processes that share the chunks, every `count`-th each, and all get the whole; each has services of its
            own. None: this process collects alone.

    Raises:
        RlhfDriveError: What sampling or scoring raised, on whichever process.
    """
    started = time.perf_counter()
    size = sampling.scenes_per_chunk
    chunks = [scenes[first : first + size] for first in range(0, len(scenes), size)]
    sampled = started

    def mine() -> list[tuple[Rollout, Scores]]:
        nonlocal sampled
        share = chunks if ranks is None else chunks[ranks.index :: ranks.count]
        parts: list[_Chunk] = []
        try:
            with profile.part("sampling"):
                parts += [_submit(rollouts, rewards, chunk, sampling, step) for chunk in share]
                plans = [part.rollout.result() for part in parts]
            sampled = time.perf_counter()
            with profile.part("scoring"):  # what is left of it
                return [(rollout, part.scores.result()) for rollout, part in zip(plans, parts, strict=True)]
        finally:
            for part in parts:  # after an error nobody wants the rest; those that are done take no notice
                part.rollout.cancel()
                part.scores.cancel()

    found = mine() if ranks is None or ranks.count == 1 else _dealt(ranks, mine)
    joined = Rollout.concatenate([rollout for rollout, _ in found])
    scores = Scores.concatenate([scores for _, scores in found])
    return Experience(joined, scores, sampled - started, time.perf_counter() - sampled)


def _dealt(ranks: Ranks, mine: Callable[[], list[tuple[Rollout, Scores]]]) -> list[tuple[Rollout, Scores]]:
    """All chunks in their order, on the CPU of every process."""
    cpu = torch.device("cpu")
    by_rank = ranks.gather(on_all(ranks, lambda: [(rollout.to(cpu), scores) for rollout, scores in mine()]))
    return [part for parts in itertools.zip_longest(*by_rank) for part in parts if part is not None]


def _submit(
    rollouts: RolloutService, rewards: RewardService, scenes: Sequence[Scene], sampling: Sampling, step: int
) -> _Chunk:
    """Have a chunk sampled, and scored as soon as its plans, and those of the frame before, are there."""
    before = _submit_previous(rollouts, scenes, sampling, step)
    rollout = rollouts.submit(
        scenes, sampling.num_generations, sampling.decoding, step=step, keep_experts=sampling.keep_experts
    )
    scores = _then(
        before,
        lambda previous: _then(rollout, lambda found: rewards.submit(scenes, found.trajectories, previous)),
    )
    return _Chunk(rollout, scores)


def _submit_previous(
    rollouts: RolloutService, scenes: Sequence[Scene], sampling: Sampling, step: int
) -> Future[Trajectories | None]:
    """:func:`previous_plans`, while the caller goes on."""
    if sampling.previous_plan == "none":
        return _done(None)
    if sampling.previous_plan == "human":
        return _done(_for_each_row(np.stack([human_previous(scene) for scene in scenes]), sampling))
    before = [previous_scene(scene) for scene in scenes]
    sampled = rollouts.submit(before, 1, sampling.decoding, step=step)
    return _then(sampled, lambda found: _done(_for_each_row(found.trajectories.poses, sampling)))


A = TypeVar("A")
B = TypeVar("B")


def _done(value: A) -> Future[A]:
    future: Future[A] = Future()
    future.set_result(value)
    return future


def _then(first: Future[A], go: Callable[[A], Future[B]]) -> Future[B]:
    """The result of ``go(result of first)``; an error or a cancellation of either is passed on."""
    outer: Future[B] = Future()

    def pass_on(inner: Future[B]) -> None:
        with contextlib.suppress(InvalidStateError):  # whoever waited has given up
            if inner.cancelled():
                outer.cancel()
            elif (error := inner.exception()) is not None:
                outer.set_exception(error)
            else:
                outer.set_result(inner.result())

    def go_on(done: Future[A]) -> None:
        if outer.cancelled():
            return
        try:
            go(done.result()).add_done_callback(pass_on)
        except CancelledError:
            outer.cancel()
        except Exception as error:  # of `first`, or of `go`: whoever asks for the result gets it
            with contextlib.suppress(InvalidStateError):
                outer.set_exception(error)

    first.add_done_callback(go_on)
    return outer


def _for_each_row(poses: NDArray[np.float64], sampling: Sampling) -> Trajectories:
    """One plan a scene, for all of its G rows."""
    index = np.repeat(np.arange(len(poses)), sampling.num_generations)
    return Trajectories(poses[index], index)
