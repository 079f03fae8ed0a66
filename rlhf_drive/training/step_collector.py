"""The scored groups of each step: chosen scenes, sampled and scored, refilled, by one process or by all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray

from rewards.carriers import Scores
from rewards.service import RewardService, check_invalid
from rlhf_drive.scenes import Scene
from rlhf_drive.training.collect import Experience, Sampling, collect
from rlhf_drive.training.lookahead import Lookahead
from rlhf_drive.training.ranks import Ranks
from rlhf_drive.training.refill import Filled, extra_groups, fill, join_experiences, select_groups
from rlhf_drive.training.together import on_main
from rlhf_drive.training.visiting import SceneVisits
from rollout import RolloutService

__all__ = ["Services", "StepCollector", "Visiting"]


@dataclass(frozen=True)
class Visiting:
    """Which scenes an RL step learns from."""

    mode: str
    """`uniform` or `informative`."""
    refill: float
    """Groups sampled at most in place of those that teach nothing, as a share of the step's scenes; 0 = none."""


@dataclass(frozen=True)
class Services:
    """Who samples and who scores, for a group of processes."""

    rollouts: RolloutService
    """Samples. On processes other than the main one of a `central` pair it only takes part in pushing weights."""
    rewards: RewardService | None
    """Scores; None on processes that have none."""
    ranks: Ranks = field(default_factory=Ranks)
    """The processes that train."""
    central: bool = False
    """Whether the main process alone talks to the services, which have workers of their own; else every process has
    its own pair, and they share the chunks."""


class StepCollector:
    """Gives each step's groups, the same on every process; with `ahead` > 0 they are collected while others train.

    Example::

        with StepCollector(services, scenes, sampling, visits, ...) as collector:
            filled = collector.take(step)
    """

    def __init__(
        self,
        services: Services,
        scenes: Sequence[Scene],
        sampling: Sampling,
        visits: SceneVisits,
        informative: Callable[[Scores, int], NDArray[np.bool_]],
        *,
        refill: float,
        max_invalid_fraction: float,
        ahead: int,
        last: int,
    ) -> None:
        """Begin nothing yet.

        Args:
            services: Who samples and scores.
            scenes: Scenes to choose from.
            sampling: How groups are sampled.
            visits: Chooses the scenes.
            informative: ``(scores, G)`` to ``[S]``, whether each group differs.
            refill: See :class:`Visiting`.
            max_invalid_fraction: Share of rows without a score that a step may have.
            ahead: Steps that are collected ahead; central services only.
            last: Steps of the run.
        """
        self._services, self._scenes, self._sampling, self._visits = services, scenes, sampling, visits
        self._informative, self._refill, self._max_invalid = informative, refill, max_invalid_fraction
        self.lookahead = Lookahead(self._filled, ahead=ahead, last=last)
        """Collects; its `waited_s` and `ready` are of interest."""

    def take(self, step: int) -> Filled[Experience]:
        """The step's scored groups; those that teach nothing have given way to fresh ones while the budget lasted.

        Raises:
            RewardError: More rows than tolerated could not be scored.
        """
        ranks = self._services.ranks
        if self._services.central and ranks.count > 1:
            return on_main(ranks, lambda: _on_cpu(self.lookahead.take(step)))
        return self.lookahead.take(step)

    def __enter__(self) -> StepCollector:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.lookahead.__exit__(kind, error, trace)

    def _filled(self, step: int) -> Filled[Experience]:
        services, sampling = self._services, self._sampling
        parts: list[Scores] = []

        def sample(index: list[int]) -> Experience:
            assert services.rewards is not None
            ranks = None if services.central else services.ranks
            batch = [self._scenes[i] for i in index]
            experience = collect(services.rollouts, services.rewards, batch, sampling, step=step, ranks=ranks)
            parts.append(experience.scores)
            # Over the whole step so far: a round may be a single scene.
            check_invalid(Scores.concatenate(parts), self._max_invalid)
            return experience

        return fill(
            lambda number, taken: self._visits.choose(step, number, taken),
            sample,
            lambda experience: self._informative(experience.scores, sampling.num_generations),
            join_experiences,
            select_groups,
            want=sampling.scenes_per_step,
            budget=extra_groups(self._refill, sampling.scenes_per_step),
        )


def _on_cpu(filled: Filled[Experience]) -> Filled[Experience]:
    """As other processes can read it, whatever device they compute on."""
    cpu = torch.device("cpu")
    first, experience = filled.first, filled.experience
    return replace(
        filled,
        first=replace(first, rollout=first.rollout.to(cpu)),
        experience=replace(experience, rollout=experience.rollout.to(cpu)),
    )
