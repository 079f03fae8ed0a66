"""A scorer that reads one number of a plan, the smallest scenes there are, and services over both."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rewards import (
    PDMS_COMPONENTS,
    LocalRewardService,
    RewardInputs,
    RewardSpec,
    ScorerInfo,
    Scores,
    build_reward,
)
from rewards.scorer import Scorer
from rlhf_drive.scenes import Observation, Scene, SceneReference, Trajectories

Array = NDArray[np.float64]


INFO = ScorerInfo("stand-in", "test")


def make_scene(token: str, speed_limit: float = 10.0) -> Scene:
    """The smallest scene there can be; the scorer below reads its speed limit alone."""
    observation = Observation(
        ego_history=np.zeros((4, 8)),
        agents=np.zeros((0, 4, 5)),
        agents_valid=np.zeros((0, 4)),
        agents_size=np.zeros((0, 2)),
        agents_type=np.zeros(0),
        map_xy=np.zeros((0, 2)),
        map_offsets=np.zeros(1),
        map_type=np.zeros(0),
        map_speed_limit=np.zeros(0),
        map_on_route=np.zeros(0),
        map_red=np.zeros(0),
        route_xy=np.zeros((0, 2)),
        command=1,
    )
    reference = SceneReference(
        t0_us=0,
        ego_init=np.zeros(11),
        prev_t0_us=-500_000,
        prev_ego_init=np.zeros(11),
        past_times_us=np.arange(4),
        past_states=np.zeros((4, 11)),
        human_poses=np.zeros((8, 3)),
        centerline=np.zeros((2, 3)),
        speed_limit=speed_limit,
        map_xy=np.zeros((3, 2)),
        map_offsets=np.array([0, 3]),
        map_layer=np.zeros(1),
        map_on_route=np.ones(1),
        red_xy=np.zeros((0, 2)),
        red_offsets=np.zeros(1),
        red_on_route=np.zeros(0),
        red_active=np.zeros((0, 51)),
        agent_pose=np.zeros((0, 51, 3)),
        agent_velocity=np.zeros((0, 51, 2)),
        agent_valid=np.zeros((0, 51)),
        agent_size=np.zeros((0, 2)),
        agent_type=np.zeros(0),
        pdm_reference_v1=np.zeros((0, 3)),
        pdm_reference_v2=np.zeros((0, 3)),
    )
    return Scene(token, "test", token, False, observation, reference)


def stand_in(prepare: Callable[[SceneReference], Any] | None = None, delay_s: float = 0.0) -> Scorer:
    """Scores a plan by its last x alone: ``pdms = x / 100``, ``ep = x / speed limit``; raises beyond x = 90."""
    prepared_of = prepare or (lambda reference: reference.speed_limit)

    def score(prepared: float, poses: Array, previous: Array | None) -> Mapping[str, Array]:
        time.sleep(delay_s)
        x = poses[:, -1, 0]
        if (x > 90.0).any():
            raise ArithmeticError(f"x = {x.max():g}")
        ones = np.ones(len(x))
        return dict.fromkeys(PDMS_COMPONENTS, ones) | {"pdms": np.where(x < 0, np.nan, x / 100), "ep": x / prepared}

    return Scorer(INFO, PDMS_COMPONENTS, lambda token, reference: prepared_of(reference), score)


def plans(x: list[float], scene_index: list[int] | None = None) -> Trajectories:
    poses = np.zeros((len(x), 8, 3))
    poses[:, -1, 0] = x
    return Trajectories(poses, np.array(scene_index if scene_index is not None else [0] * len(x)))


def service(
    specs: Sequence[RewardSpec] = (RewardSpec("pdms"),), scorer: Scorer | None = None, **options: Any
) -> LocalRewardService:
    reward = replace(build_reward(specs), scorer=scorer or stand_in())
    return LocalRewardService(reward, **{"workers": 1, **options})


def reasons(scores: Scores) -> dict[int, str]:
    return {row: failure.reason for row, failure in scores.failures.items()}


def kinds(scores: Scores) -> dict[int, tuple[str, str]]:
    return {row: (failure.source, failure.kind) for row, failure in scores.failures.items()}


def x_of(inputs: RewardInputs) -> Array:
    return inputs.trajectories.poses[:, -1, 0]


def counting(counts: dict[float, int]) -> Callable[[SceneReference], float]:
    def prepare(reference: SceneReference) -> float:
        counts[reference.speed_limit] = counts.get(reference.speed_limit, 0) + 1
        return reference.speed_limit

    return prepare
