"""The scorer's pieces and what the host does for each plan and scene, as calls to be timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import TracebackType

import numpy as np

from rewards.carriers import Scores
from rewards.from_recipe import metric_config, reward_config
from rewards.monitors import batch_monitors
from rewards.service import LocalRewardService
from rlhf_drive.config import Recipe
from rlhf_drive.policies import TrajectoryTokenizer
from rlhf_drive.policies.inputs import tensorise
from rlhf_drive.policies.route import anchor_path
from rlhf_drive.scenes import POSE_DT_S, Scene, Trajectories
from rollout.seeding import row_uniforms

__all__ = ["ScorerPieces"]

Item = tuple[str, float, Callable[[], object]]
SETTINGS = {"max_agents": 16, "max_polylines": 32, "points_per_polyline": 10}


class ScorerPieces:
    """The recipe's reward on sample scenes with plans around what the human drove."""

    def __init__(self, recipe: Recipe, scenes: Sequence[Scene]) -> None:
        self.scenes, self.group = list(scenes), recipe.rollout.num_generations
        self._config = reward_config(recipe.reward)
        if recipe.policy:
            policy = recipe.policy
            keys = ("max_agents", "max_polylines", "points_per_polyline")
            self._settings = {key: getattr(policy, key) for key in keys}
        else:
            self._settings = SETTINGS
        tokens = recipe.tokenizer
        self._tokenizer = (
            TrajectoryTokenizer(**vars(tokens)) if tokens else TrajectoryTokenizer("waypoints", -100, 100, 1)
        )
        self.one = LocalRewardService(self._config.build(), workers=1)
        self.all = LocalRewardService(self._config.build(), workers=recipe.reward.workers)
        self.heldout = LocalRewardService(metric_config("epdms").build(), workers=1)

    def __enter__(self) -> ScorerPieces:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for service in (self.one, self.all, self.heldout):
            service.close(cancel=kind is not None)

    def timed(self) -> Iterator[Item]:
        """Every piece, most at two sizes. The first call of a service prepares its scenes."""
        few, many = self.scenes[: max(1, len(self.scenes) // 4)], self.scenes
        for scenes in (few, many):
            plans = self._plans(scenes, self.group)
            yield "score", float(len(plans.poses)), partial(self.one.score, scenes, plans)
        scores = self.one.score(many, plans)
        yield "monitor", float(len(plans.poses)), partial(batch_monitors, many, plans, scores)
        for scenes in (few, many):
            single = self._plans(scenes, 1)
            yield "heldout", float(len(scenes)), partial(self.heldout.score, scenes, single, single)
        yield "features", float(len(few)), partial(self._features, few)
        for scenes in (few, many):
            yield "plans", float(len(scenes) * self.group), partial(self._host, scenes)

    def _plans(self, scenes: Sequence[Scene], group: int) -> Trajectories:
        """Faster, slower and wavering versions of what the human drove."""
        generator = np.random.default_rng(0)
        human = np.stack([scene.reference.human_poses for scene in scenes for _ in range(group)])
        speed = generator.normal(1.0, 0.15, (len(human), 1, 1))
        poses = human * np.concatenate([np.repeat(speed, 2, axis=2), np.ones_like(speed)], axis=2)
        poses[..., 1] += generator.normal(0.0, 0.3, (len(human), 1)) * np.linspace(0.0, 1.0, poses.shape[1])
        return Trajectories(poses, np.repeat(np.arange(len(scenes)), group))

    def _features(self, scenes: Sequence[Scene]) -> None:
        """Network inputs of scenes that were not seen before."""
        for scene in scenes:
            tensorise(scene.observation, **self._settings)
            anchor_path(scene.observation, POSE_DT_S * np.arange(1, self._tokenizer.num_poses + 1))

    def _host(self, scenes: Sequence[Scene]) -> None:
        """A plan's random numbers, and its poses from its tokens."""
        names = [scene.token for scene in scenes]
        length = self._tokenizer.length
        row_uniforms(0, 0, names, self.group, (2, length))
        tokens = np.full((len(names) * self.group, length), self._tokenizer.vocab_size // 3)
        self._tokenizer.decode(tokens)

    def thread_gain(self) -> float:
        """By how much the recipe's number of scoring threads is faster than one."""
        plans = self._plans(self.scenes, self.group)
        seconds: dict[LocalRewardService, list[float]] = {self.one: [], self.all: []}
        for service in seconds:
            service.score(self.scenes, plans)
        for _ in range(5):
            for service, found in seconds.items():
                start = time.perf_counter()
                service.score(self.scenes, plans)
                found.append(time.perf_counter() - start)
        one, together = (statistics.median(found) for found in seconds.values())
        return max(1.0, one / together)

    def prepare_s(self) -> float:
        """Seconds to prepare a scene: a fresh service's first call against its second."""
        plans = self._plans(self.scenes, self.group)
        with LocalRewardService(self._config.build(), workers=1) as fresh:
            first, second = (_seconds(lambda: fresh.score(self.scenes, plans)) for _ in range(2))
        return max(0.0, first - second) / len(self.scenes)


def _seconds(call: Callable[[], Scores]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
