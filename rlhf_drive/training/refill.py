"""Dynamic sampling (DAPO, 2503.14476, equation 11): groups that teach nothing give way to groups of fresh scenes."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from rewards.carriers import Scores
from rlhf_drive.training.collect import Experience
from rollout import Rollout

__all__ = ["Filled", "extra_groups", "fill", "join_experiences", "select_groups"]

E = TypeVar("E")


@dataclass(frozen=True)
class Filled(Generic[E]):
    """S groups to learn from, and all that was sampled to get them."""

    scenes: list[int]
    """Scene of each group, S of them."""
    experience: E
    """The S groups, in that order."""
    visited: list[int]
    """Scene of every group that was sampled, in that order; the first S are the step's own."""
    informative: NDArray[np.bool_]
    """For each of `visited`, whether its group differs."""
    first: E
    """The step's own S groups, before any gave way: their rewards are means over scenes that nobody selected."""
    metrics: dict[str, float]
    """``groups/kept``: informative groups among the S; ``groups/resampled_frac``: extra groups sampled, as a share of
    S; ``groups/sampled_degenerate_frac``: share of all sampled groups that teach nothing."""


def extra_groups(share: float, scenes_per_step: int) -> int:
    """Budget in groups: `share` of `scenes_per_step`, rounded to the nearest; a share above 0 gives at least one."""
    return max(round(share * scenes_per_step), int(share > 0))


def fill(
    next_scenes: Callable[[int, Set[int]], list[int]],
    sample: Callable[[list[int]], E],
    informative: Callable[[E], NDArray[np.bool_]],
    join: Callable[[Sequence[E]], E],
    select: Callable[[E, NDArray[np.int64]], E],
    *,
    want: int,
    budget: int,
) -> Filled[E]:
    """Sample S groups, then as many again as teach nothing, until S informative ones or the budget is spent.

    The informative groups are kept in the order they were sampled; those that are lacking when the budget or the scenes
    are spent stay what they are, the earliest first. So there are S groups whatever happens, and with a budget of 0, or
    where all groups differ at once, the result is the first sample itself.

    Args:
        next_scenes: ``(number, taken)`` to the indices of so many scenes; at the first call `taken` is empty, then it
            holds all scenes of the step so far, and none of them may come back. Fewer where no more are left.
        sample: Groups for these scenes, scored, all with the same weights.
        informative: ``[scenes]`` whether each group differs.
        join: Groups of several samples, one after the other.
        select: The groups at these places, in that order.
        want: S.
        budget: Most groups sampled beyond S.
    """
    visited = next_scenes(want, frozenset())
    parts = [sample(visited)]
    flags = np.asarray(informative(parts[0]), dtype=np.bool_)
    want = len(visited)
    while (lacking := want - int(flags.sum())) > 0 and len(visited) < want + budget:
        number = min(lacking, want + budget - len(visited))
        fresh = next_scenes(number, frozenset(visited))[:number]
        if not fresh:
            break
        parts.append(sample(fresh))
        visited = visited + fresh
        flags = np.concatenate([flags, np.asarray(informative(parts[-1]), dtype=np.bool_)])
    # Stable: informative groups first, each kind in its order of sampling; then back to the order of sampling.
    kept = np.sort(np.argsort(~flags, kind="stable")[:want])
    return Filled(
        scenes=[visited[i] for i in kept.tolist()],
        experience=parts[0] if len(parts) == 1 else select(join(parts), kept),
        visited=visited,
        informative=flags,
        first=parts[0],
        metrics={
            "groups/kept": float(flags[kept].sum()),
            "groups/resampled_frac": (len(visited) - want) / want,
            "groups/sampled_degenerate_frac": float(1.0 - flags.mean()),
        },
    )


def join_experiences(parts: Sequence[Experience]) -> Experience:
    """Groups of several samples of one step, one after the other; seconds add up."""
    return Experience(
        Rollout.concatenate([part.rollout for part in parts]),
        Scores.concatenate([part.scores for part in parts]),
        sum(part.sampling_s for part in parts),
        sum(part.waiting_s for part in parts),
    )


def select_groups(experience: Experience, groups: NDArray[np.int64]) -> Experience:
    """The groups at the places `groups`, rollouts and scores alike; the seconds are those of all."""
    size = experience.rollout.num_generations
    rows = (groups[:, None] * size + np.arange(size)).reshape(-1)
    return Experience(
        experience.rollout.scenes(groups),
        experience.scores.rows(rows),
        experience.sampling_s,
        experience.waiting_s,
    )
