"""Dynamic sampling: which groups stay, how many are sampled, and that the rest is as it was."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from oracles.tiny_policy import ARCHITECTURE

from rewards import LocalRewardService, RewardConfig, RewardSpec
from rlhf_drive.policies import Decoding, Policy, TrajectoryTokenizer
from rlhf_drive.policies.feature_cache import FeatureCache
from rlhf_drive.scenes.store import SceneStore
from rlhf_drive.training.collect import Experience, Sampling, collect
from rlhf_drive.training.refill import Filled, extra_groups, fill, join_experiences, select_groups
from rlhf_drive.training.visiting import SceneVisits
from rollout import LocalRolloutService


@dataclass
class World:
    """Scenes 0, 1, 2, … of which some differ; an experience is the list of its scenes."""

    differing: set[int]
    count: int = 100
    asked: list[tuple[int, frozenset[int]]] = field(default_factory=list)
    sampled: list[list[int]] = field(default_factory=list)
    generous: int = 0

    def next_scenes(self, number: int, taken: Set[int]) -> list[int]:
        """The lowest that are free."""
        self.asked.append((number, frozenset(taken)))
        return [s for s in range(self.count) if s not in taken][: number + self.generous * bool(taken)]

    def sample(self, scenes: list[int]) -> list[int]:
        """Notes what is sampled."""
        self.sampled.append(scenes)
        return list(scenes)

    def informative(self, experience: list[int]) -> NDArray[np.bool_]:
        """Whether each scene differs."""
        return np.array([s in self.differing for s in experience])

    def fill(self, want: int, budget: int) -> Filled[list[int]]:
        """The loop over this world."""
        return fill(
            self.next_scenes, self.sample, self.informative, _join, lambda e, at: [e[i] for i in at.tolist()],
            want=want, budget=budget,
        )  # fmt: skip


def _join(parts: Sequence[list[int]]) -> list[int]:
    return [scene for part in parts for scene in part]


def test_by_hand() -> None:
    # 0 1 2 3 4 5: 1 and 4 differ, so 4 are lacking. 6 7 8 9: 6 and 9 differ, 2 are lacking. 10 11: 10 differs, 1 is
    # lacking. 12 differs: six are found with seven extra groups.
    world = World({1, 4, 6, 9, 10, 12, 13})
    found = world.fill(6, 12)
    assert world.sampled == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9], [10, 11], [12]]
    assert found.scenes == found.experience == [1, 4, 6, 9, 10, 12]
    assert found.visited == list(range(13))
    assert found.informative.tolist() == [s in world.differing for s in range(13)]
    assert found.first == [0, 1, 2, 3, 4, 5]
    assert found.metrics == pytest.approx(
        {"groups/kept": 6.0, "groups/resampled_frac": 7 / 6, "groups/sampled_degenerate_frac": 7 / 13}, abs=1e-12
    )
    assert [taken for _, taken in world.asked] == [frozenset(range(n)) for n in (0, 6, 10, 12)]


def test_when_the_budget_is_spent_the_rest_is_what_it_is() -> None:
    # 4 are lacking, 3 may be sampled: 6 differs. The other places stay with the earliest flat groups, 0, 2 and 3.
    found = World({1, 4, 6, 9, 10, 12}).fill(6, 3)
    assert found.scenes == found.experience == [0, 1, 2, 3, 4, 6]
    assert found.visited == list(range(9))
    assert found.metrics["groups/kept"] == 3.0
    assert found.metrics["groups/resampled_frac"] == 0.5


def test_no_scenes_left_ends_the_search() -> None:
    world = World({1}, count=7)
    found = world.fill(5, 50)
    assert (found.visited, found.scenes) == (list(range(7)), [0, 1, 2, 3, 4])
    assert world.sampled == [[0, 1, 2, 3, 4], [5, 6]]


@pytest.mark.parametrize(("differing", "budget"), [(set(), 0), ({1}, 0), (set(range(6)), 12)])
def test_where_nothing_is_replaced_the_first_sample_itself_is_used(differing: set[int], budget: int) -> None:
    world = World(differing)
    found = world.fill(6, budget)
    assert found.experience is found.first
    assert found.scenes == list(range(6))
    assert len(world.sampled) == 1
    assert found.metrics["groups/kept"] == len(differing & set(range(6)))
    assert found.metrics["groups/resampled_frac"] == 0.0


def test_a_search_in_vain_is_counted() -> None:
    found = World(set()).fill(6, 4)
    assert found.scenes == found.experience == found.first == list(range(6))
    assert found.experience is not found.first  # it carries the seconds of all that was sampled
    assert found.metrics == {
        "groups/kept": 0.0, "groups/resampled_frac": 4 / 6, "groups/sampled_degenerate_frac": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize("generous", [0, 5])
def test_never_more_than_the_budget_nor_more_than_needed(generous: int) -> None:
    for seed in range(60):
        random = np.random.default_rng(seed)
        want, budget = int(random.integers(1, 12)), int(random.integers(0, 20))
        differing = set(np.flatnonzero(random.random(100) < random.random()).tolist())
        world = World(differing, generous=generous)
        found = world.fill(want, budget)
        extra = len(found.visited) - want
        good = [s for s in found.visited if s in differing]
        assert extra <= budget
        assert len(found.scenes) == want
        assert len(good) <= want  # never samples a group that would be thrown away
        assert found.metrics["groups/kept"] == len(good)
        assert set(good) <= set(found.scenes)
        assert len(good) == want or extra == budget
        assert found.scenes == sorted(found.scenes)
        assert len(set(found.visited)) == len(found.visited)


def test_budget_in_groups() -> None:
    assert [extra_groups(share, 16) for share in (0.0, 0.01, 0.5, 1.0, 1.1, 3.0)] == [0, 1, 8, 16, 18, 48]


TAKEN = ("tokens", "logp", "totals", "poses", "names")


def _facts(experience: Experience) -> dict[str, object]:
    rollout, scores = experience.rollout, experience.scores
    values = (rollout.tokens, rollout.trace.logp, scores.total, rollout.trajectories.poses)
    return {**dict(zip(TAKEN, (np.asarray(v) for v in values), strict=False)), "names": rollout.scene_tokens}


def test_real_groups_are_those_that_their_scenes_alone_would_have_had(tiny_store: SceneStore) -> None:
    torch.manual_seed(0)
    policy = Policy(ARCHITECTURE, TrajectoryTokenizer("displacements", -5.0, 15.0, 0.1)).eval()
    rollouts = LocalRolloutService(policy, seed=0, features=FeatureCache())
    scenes = tiny_store.split("train")
    sampling = Sampling(Decoding(4, "causal", 1.0, 0), 3, 5, 5, "none")
    visits = SceneVisits("uniform", len(scenes), seed=0)
    with LocalRewardService(RewardConfig((RewardSpec("pdms"),), scorer="pdms").build(), workers=1) as rewards:

        def sample(indices: list[int]) -> Experience:
            return collect(rollouts, rewards, [scenes[i] for i in indices], sampling, step=2)

        def width(experience: Experience) -> NDArray[np.float64]:
            return np.asarray(np.ptp(experience.rollout.trajectories.poses[:, -1, 1].reshape(-1, 3), axis=1))

        def informative(experience: Experience) -> NDArray[np.bool_]:
            return width(experience) > threshold

        whole = sample(list(range(len(scenes))))
        threshold = float(np.median(width(whole)))
        found = fill(
            lambda number, taken: visits.choose(2, number, taken), sample, informative, join_experiences,
            select_groups, want=5, budget=20,
        )  # fmt: skip
    assert visits.choose(2, 5) == found.visited[:5]
    assert len(found.visited) > 5
    assert found.scenes != found.visited[:5]
    assert found.experience.rollout.scene_tokens == tuple(scenes[i].token for i in found.scenes)
    assert informative(found.experience).all()
    expected = select_groups(whole, np.array(found.scenes))
    a, b = _facts(found.experience), _facts(expected)
    assert a["names"] == b["names"]
    for name in TAKEN[:-1]:
        np.testing.assert_allclose(a[name], b[name], atol=1e-4 if name == "logp" else 0, rtol=0, err_msg=name)  # type: ignore[arg-type, call-overload]
    np.testing.assert_array_equal(found.experience.rollout.trajectories.scene_index, np.repeat(np.arange(5), 3))
    assert found.experience.sampling_s >= found.first.sampling_s > 0
