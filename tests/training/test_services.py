"""The pair of services of an RL run: what ends first when a run is left while plans are still being sampled."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest

import rlhf_drive.training.services as services_module
from rewards.from_recipe import reward_config
from rlhf_drive.config import Recipe
from rlhf_drive.errors import RlhfDriveError, RolloutError, RunStoppedError
from rlhf_drive.policies.feature_cache import FeatureCache
from rlhf_drive.scenes.store import SceneStore
from rlhf_drive.training.build import sampling_of
from rlhf_drive.training.collect import collect
from rlhf_drive.training.ranks import Ranks
from rlhf_drive.training.services import open_services


class Sampler:
    """A rollout service whose workers are busy until somebody lets them be done."""

    def __init__(self) -> None:
        self.asked, self.closed = threading.Event(), 0
        self.futures: list[Future[Any]] = []

    def submit(self, *_: object, **__: object) -> Future[Any]:
        self.futures.append(Future())
        self.asked.set()
        return self.futures[-1]

    def done(self) -> None:
        for future in self.futures:
            if not future.done():
                future.set_result(SimpleNamespace(trajectories=None))

    def close(self) -> None:
        self.closed += 1
        for future in self.futures:
            if not future.done():
                future.set_exception(RolloutError("closed"))

    def __enter__(self) -> Sampler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Scorer:
    """A reward service; as the one on Ray it starts anew when it is asked after its end."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler, self.ended, self.started_again = sampler, False, 0

    def submit(self, *_: object) -> Future[Any]:
        self.started_again += self.ended
        return Future()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.ended = True
        self.sampler.done()  # workers do not know that the run is over


def test_scores_do_not_start_anew_for_plans_that_come_late(
    tiny_recipe: Callable[..., Recipe], tiny_store: SceneStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe("quickstart", "rollout.engine=ray")
    sampler = Sampler()
    scorer = Scorer(sampler)
    monkeypatch.setattr(services_module, "_ray_rollouts", lambda *_: sampler)
    monkeypatch.setattr(services_module, "build_service", lambda *_, **__: scorer)
    scenes, policy = tiny_store.split("train")[:2], SimpleNamespace()

    def ahead(services: Any) -> None:
        with suppress(RlhfDriveError):
            collect(services.rollouts, services.rewards, scenes, sampling_of(recipe.rollout), step=1)

    opened = open_services(
        recipe, reward_config(recipe.reward), policy, seed=0, features=FeatureCache(), ranks=Ranks()  # type: ignore[arg-type]
    )  # fmt: skip
    thread = threading.Thread(target=ahead, args=(opened.__enter__(),), daemon=True)
    thread.start()
    assert sampler.asked.wait(10)
    stopped = RunStoppedError("stopped", exit_code=143)
    assert not opened.__exit__(RunStoppedError, stopped, None)  # it is raised on
    thread.join(10)
    assert (thread.is_alive(), scorer.started_again) == (False, 0)
    assert (scorer.ended, sampler.closed > 0) == (True, True)
