"""The reward service: rows land where they belong, failures stay where they arise, threads change nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from rewards import (
    PDMS_COMPONENTS,
    REWARDS,
    Failure,
    LocalRewardService,
    RewardInputs,
    RewardSpec,
    ScorerInfo,
    Scores,
    build_reward,
    check_invalid,
    reward,
)
from rewards.scorer import Scorer
from rlhf_drive.errors import ConfigError, DataError, RewardError
from rlhf_drive.scenes import Observation, Scene, SceneReference, Trajectories

Array = NDArray[np.float64]
PDMS = [RewardSpec("pdms")]


@pytest.fixture(autouse=True)
def _registered_names_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(REWARDS, "_entries", dict(REWARDS._entries))


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


INFO = ScorerInfo("stand-in", "test")


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


def service(specs: list[RewardSpec] = PDMS, scorer: Scorer | None = None, **options: Any) -> LocalRewardService:
    reward = replace(build_reward(specs), scorer=scorer or stand_in())
    return LocalRewardService(reward, **{"workers": 1, **options})


def reasons(scores: Scores) -> dict[int, str]:
    return {row: failure.reason for row, failure in scores.failures.items()}


def kinds(scores: Scores) -> dict[int, tuple[str, str]]:
    return {row: (failure.source, failure.kind) for row, failure in scores.failures.items()}


def test_rows_get_the_score_of_their_scene_in_any_order() -> None:
    scenes = [make_scene("a", 10.0), make_scene("b", 20.0), make_scene("unused"), make_scene("c", 40.0)]
    scores = service().score(scenes, plans([10, 20, 30, 40], [3, 0, 1, 0]))
    assert scores.component("ep").tolist() == [10 / 40, 20 / 10, 30 / 20, 40 / 10]
    assert scores.total.tolist() == [0.1, 0.2, 0.3, 0.4]
    assert scores.names == PDMS_COMPONENTS
    assert (scores.valid.all(), dict(scores.failures), scores.scorer) == (True, {}, INFO)


def test_result_does_not_depend_on_workers_or_batches() -> None:
    @reward("with_map")
    def with_map(inputs: RewardInputs) -> Array:
        limits = np.array([scene.reference.speed_limit for scene in inputs.scenes])
        return limits[inputs.trajectories.scene_index] * inputs.components["ep"] + inputs.trajectories.poses[:, -1, 0]

    rng = np.random.default_rng(3)
    scenes = [make_scene(f"s{i}", 7.0 + i) for i in range(12)]
    x, index = rng.uniform(-5, 95, 96).tolist(), np.repeat(np.arange(12), 8).tolist()
    specs = [RewardSpec("pdms", 0.7), RewardSpec("with_map", 0.3)]
    expected = service(specs).score(scenes, plans(x, index))
    assert 0 < len(expected.failures) < 96
    for workers in (0, 2, 5):
        with service(specs, workers=workers) as many:
            scores = many.score(scenes, plans(x, index))
        np.testing.assert_array_equal(scores.components, expected.components)
        np.testing.assert_array_equal(scores.total, expected.total)
        assert scores.failures == expected.failures
    singly = [service(specs).score([scenes[s]], plans([v])) for v, s in zip(x, index, strict=True)]
    np.testing.assert_array_equal(np.concatenate([s.total for s in singly]), expected.total)
    assert [s.failures.get(0) for s in singly] == [expected.failures.get(row) for row in range(96)]


def test_scenes_are_scored_at_the_same_time() -> None:
    barrier = threading.Barrier(2, timeout=10.0)

    def prepare(reference: SceneReference) -> float:
        barrier.wait()  # breaks, and so fails the rows, unless two scenes are prepared at once
        return reference.speed_limit

    with service(workers=2, scorer=stand_in(prepare)) as two:
        assert two.score([make_scene("a"), make_scene("b")], plans([1, 2], [0, 1])).valid.tolist() == [True, True]


def test_scene_that_cannot_be_prepared_loses_its_rows_alone() -> None:
    def prepare(reference: SceneReference) -> float:
        if reference.speed_limit == 13.0:
            raise ValueError("the centreline crosses itself\nand more")
        return reference.speed_limit

    scenes = [make_scene("bad", 13.0), make_scene("a")]
    scores = service(scorer=stand_in(prepare)).score(scenes, plans([10] * 4, [1, 0, 1, 0]))
    assert scores.valid.tolist() == [True, False, True, False]
    np.testing.assert_array_equal(scores.total, [0.1, np.nan, 0.1, np.nan])
    assert np.isnan(scores.components[1]).all()
    assert kinds(scores) == {1: ("scene", "invalid_scene"), 3: ("scene", "invalid_scene")}
    assert scores.failures[3].reason == "scene 'bad' cannot be prepared: ValueError: the centreline crosses itself"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_plan_that_is_not_finite_is_invalid_not_zero(value: float) -> None:
    trajectories = plans([10, 20, 30])
    trajectories.poses[1, 4, 2] = value
    scores = service().score([make_scene("a")], trajectories)
    np.testing.assert_array_equal(scores.total, [0.1, np.nan, 0.3])
    assert dict(scores.failures) == {
        1: Failure("plan", "invalid_plan", "scene 'a': the plan holds a value that is not finite")
    }


def test_plan_on_which_the_scorer_raises_is_lost_alone() -> None:
    scores = service().score([make_scene("a")], plans([10, 95, 30, 99, 50]))
    np.testing.assert_array_equal(scores.total, [0.1, np.nan, 0.3, np.nan, 0.5])
    assert kinds(scores) == {1: ("scorer", "raised"), 3: ("scorer", "raised")}
    assert reasons(scores) == {
        1: "scene 'a': scoring failed: ArithmeticError: x = 95",
        3: "scene 'a': scoring failed: ArithmeticError: x = 99",
    }


def test_plan_without_a_finite_score_is_invalid() -> None:
    scores = service().score([make_scene("a")], plans([10, -1]))
    np.testing.assert_array_equal(scores.total, [0.1, np.nan])
    assert kinds(scores) == {1: ("scorer", "not_finite")}
    assert reasons(scores) == {1: "scene 'a': scoring failed: it gave no finite score"}
    assert scores.component("nc").tolist() == [1.0, 1.0]  # what could be computed is kept


def test_user_reward_that_raises_loses_only_the_rows_it_raises_on() -> None:
    calls: list[int] = []

    @reward("touchy")
    def touchy(inputs: RewardInputs) -> Array:
        x = inputs.trajectories.poses[:, -1, 0]
        calls.append(len(x))
        if 30 in x:
            raise KeyError("thirty")
        return x

    scores = service([RewardSpec("pdms"), RewardSpec("touchy")]).score(
        [make_scene("a"), make_scene("b")], plans([10, 20, 30, 40], [0, 0, 1, 1])
    )
    np.testing.assert_allclose(scores.total, [5.05, 10.1, np.nan, 20.2], rtol=1e-15)  # (x/100 + x) / 2
    assert dict(scores.failures) == {2: Failure("touchy", "raised", "scene 'b': reward 'touchy': KeyError: 'thirty'")}
    assert scores.component("pdms").tolist() == [0.1, 0.2, 0.3, 0.4]
    assert calls == [4, 2, 2, 1, 1]  # all, halves, and the half that fails row by row


def test_user_reward_of_nan_or_infinity_is_invalid() -> None:
    @reward("gappy")
    def gappy(inputs: RewardInputs) -> Array:
        return np.array([1.0, np.nan, np.inf, 4.0])

    scores = service([RewardSpec("gappy"), RewardSpec("pdms", 0.0)]).score([make_scene("a")], plans([1, 2, 3, 4]))
    assert scores.valid.tolist() == [True, False, False, True]
    assert kinds(scores) == {1: ("gappy", "not_finite"), 2: ("gappy", "not_finite")}
    assert reasons(scores) == {
        1: "scene 'a': reward 'gappy': returned nan",
        2: "scene 'a': reward 'gappy': returned inf",
    }


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (np.zeros((3, 2)), "returned shape [3, 2] for 3 rows"),
        (np.zeros(2), "returned shape [2] for 3 rows"),
        (0.5, "returned shape [] for 3 rows"),
        (None, "returned None, not numbers"),
        (["a", "b", "c"], "returned list of type <U1, not numbers"),
    ],
)
def test_user_reward_of_the_wrong_form_is_called_once_and_explained(value: Any, reason: str) -> None:
    calls: list[int] = []

    @reward("formless")
    def formless(inputs: RewardInputs) -> Any:
        calls.append(1)
        return value

    scores = service([RewardSpec("formless")]).score([make_scene("a")], plans([1, 2, 3]))
    assert not scores.valid.any()
    assert set(scores.failures.values()) == {
        Failure("formless", "wrong_output", f"scene 'a': reward 'formless': {reason}")
    }
    assert calls == [1]


def test_interrupt_is_not_swallowed() -> None:
    @reward("stopper")
    def stopper(inputs: RewardInputs) -> Array:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        service([RewardSpec("stopper")]).score([make_scene("a")], plans([1]))


def test_user_reward_sees_scored_rows_and_their_scenes_only() -> None:
    seen: list[RewardInputs] = []

    @reward("observer")
    def observer(inputs: RewardInputs) -> Array:
        seen.append(inputs)
        return np.ones(len(inputs.trajectories))

    scenes = [make_scene("a"), make_scene("b"), make_scene("c")]
    scores = service([RewardSpec("observer")]).score(scenes, plans([95, 20, 30, 40], [0, 2, 1, 2]))
    (inputs,) = seen
    assert [scene.token for scene in inputs.scenes] == ["b", "c"]
    assert inputs.trajectories.scene_index.tolist() == [1, 0, 1]
    assert inputs.trajectories.poses[:, -1, 0].tolist() == [20, 30, 40]
    assert inputs.components["pdms"].tolist() == [0.2, 0.3, 0.4]
    assert list(scores.failures) == [0]


def test_user_reward_cannot_change_what_others_see() -> None:
    @reward("vandal")
    def vandal(inputs: RewardInputs) -> Array:
        inputs.components["pdms"][:] = 1.0
        return inputs.components["pdms"]

    scores = service([RewardSpec("pdms"), RewardSpec("vandal")]).score([make_scene("a")], plans([10]))
    assert scores.component("pdms").tolist() == [0.1]
    assert "read-only" in scores.failures[0].reason


def test_row_keeps_its_first_reason() -> None:
    @reward("never")
    def never(inputs: RewardInputs) -> Array:
        raise RuntimeError("never")

    scores = service([RewardSpec("never")]).score([make_scene("a")], plans([95, 10]))
    assert "ArithmeticError" in scores.failures[0].reason
    assert "reward 'never': RuntimeError: never" in scores.failures[1].reason


def test_no_rows_make_no_scores() -> None:
    scores = service([RewardSpec("pdms")]).score([make_scene("a")], plans([]))
    assert (len(scores), scores.components.shape) == (0, (0, 7))
    check_invalid(scores, 0.0)


def counting(counts: dict[float, int]) -> Callable[[SceneReference], float]:
    def prepare(reference: SceneReference) -> float:
        counts[reference.speed_limit] = counts.get(reference.speed_limit, 0) + 1
        return reference.speed_limit

    return prepare


def test_scene_is_prepared_once_and_the_oldest_is_dropped() -> None:
    counts: dict[float, int] = {}
    cached = service(cache_size=2, scorer=stand_in(counting(counts)))
    for limit in (1.0, 2.0, 1.0, 3.0, 1.0, 2.0):  # 3 drops 2 (used before 1), so only 2 is prepared again
        cached.score([make_scene(f"s{limit}", limit)], plans([10]))
    assert counts == {1.0: 1, 2.0: 2, 3.0: 1}
    assert cached.stats.prepared == 4


def test_scene_with_another_reference_under_the_same_token_is_prepared_anew() -> None:
    cached = service()
    before, after = make_scene("a", 10.0), make_scene("a", 20.0)
    assert cached.score([before], plans([40])).component("ep").tolist() == [4.0]
    assert cached.score([after], plans([40])).component("ep").tolist() == [2.0]


def test_unknown_speed_limit_does_not_defeat_the_cache() -> None:
    cached = service()
    for _ in range(2):
        cached.score([make_scene("a", float("nan"))], plans([10]))
    assert cached.stats.prepared == 1


def test_stats_count_rows_failures_and_time() -> None:
    slow = service(scorer=stand_in(delay_s=0.02))
    slow.score([make_scene("a")], plans([10, -1, 30]))
    slow.score([make_scene("a")], plans([10, 20]))
    assert (slow.stats.rows, slow.stats.failures, slow.stats.prepared) == (5, 1, 1)
    assert slow.stats.seconds >= 0.04
    assert slow.stats.rows_per_s == pytest.approx(5 / slow.stats.seconds)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"scene_index": np.array([0, 1])}, r"scene_index must lie in 0 … 0; got 0 … 1"),
        ({"scene_index": np.array([-1, 0])}, r"scene_index must lie in 0 … 0; got -1 … 0"),
        ({"poses": np.zeros((2, 7, 3))}, r"8 poses 0\.5 s apart to be scored; got 7 poses"),
        ({"dt_s": 0.1}, r"got 8 poses 0\.1 s apart"),
    ],
)
def test_trajectories_that_cannot_be_meant(change: dict[str, Any], match: str) -> None:
    with pytest.raises(DataError, match=match):
        service().score([make_scene("a")], replace(plans([1, 2]), **change))


@pytest.mark.parametrize("options", [{"workers": -1}, {"cache_size": -1}])
def test_negative_size_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="at least 0; got -1"):
        service(**options)


def scores_with_failures(rows: int, failed: int) -> Scores:
    valid = np.arange(rows) >= failed
    failures = {i: Failure("scorer", "raised", f"reason {i}") for i in range(failed)}
    return Scores(("pdms",), np.ones((rows, 1)), np.ones(rows), valid, INFO, failures)


def test_share_of_invalid_rows_up_to_the_limit_passes() -> None:
    check_invalid(scores_with_failures(100, 5), 0.05)
    check_invalid(scores_with_failures(100, 29), 0.29)  # 0.29 * 100 < 29 in floating point
    with pytest.raises(RewardError) as caught:
        check_invalid(scores_with_failures(100, 6), 0.05)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("6 of 100 rollouts (6.0%) could not be scored; 5.0% are tolerated (reward.max_invalid_")
    assert lines[1:] == [
        "  row 0: reason 0",
        "  row 1: reason 1",
        "  row 2: reason 2",
    ]


def test_closed_service_can_be_used_again() -> None:
    scenes = [make_scene("a"), make_scene("b")]
    again = service(workers=2)
    first = again.score(scenes, plans([1, 2], [0, 1]))
    again.close()
    np.testing.assert_array_equal(again.score(scenes, plans([1, 2], [0, 1])).total, first.total)
    again.close()
