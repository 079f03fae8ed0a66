"""The reward service: rows land where they belong, and failures stay where they arise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from oracles.stand_in import INFO, counting, kinds, make_scene, plans, reasons, service, stand_in, x_of

from rewards import (
    PDMS_COMPONENTS,
    REWARDS,
    Failure,
    LocalRewardService,
    RewardInputs,
    RewardSpec,
    Scores,
    build_reward,
    check_invalid,
    reward,
)
from rewards.reward_stats import reward_failures
from rlhf_drive.errors import ConfigError, DataError, RewardError
from rlhf_drive.scenes import SceneReference, Trajectories

Array = NDArray[np.float64]


@pytest.fixture(autouse=True)
def _registered_names_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(REWARDS, "_entries", dict(REWARDS._entries))


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


def test_no_rows_make_no_scores() -> None:
    scores = service([RewardSpec("pdms")]).score([make_scene("a")], plans([]))
    assert (len(scores), scores.components.shape) == (0, (0, 7))
    check_invalid(scores, 0.0)


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


@pytest.mark.parametrize("options", [{"workers": -1}, {"cache_size": -1}, {"timeout_s": -1}, {"cache_mb": -1}])
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


def test_rows_come_out_the_same_in_any_order_and_company() -> None:
    @reward("own")
    def own(inputs: RewardInputs) -> Array:
        if (x_of(inputs) > 80).any():
            raise ValueError("too far")
        return np.where(x_of(inputs) > 70, np.nan, x_of(inputs) ** 2)

    rng = np.random.default_rng(5)
    scenes = [make_scene(f"s{i}", 7.0 + i) for i in range(5)]
    whole = plans(rng.uniform(-9, 95, 200).tolist(), rng.integers(0, 5, 200).tolist())
    specs = [RewardSpec("pdms"), RewardSpec("own", 0.5)]
    expected = service(specs).score(scenes, whole)
    assert set(reward_failures(expected)) == {"own/not_finite", "own/raised", "scorer/not_finite", "scorer/raised"}
    for seed, pieces, options in ((0, 1, {}), (1, 3, {"workers": 3}), (2, 17, {"timeout_s": 30.0}), (3, 200, {})):
        order = np.random.default_rng(seed).permutation(200)
        with service(specs, **options) as again:
            parts = [
                again.score(scenes, Trajectories(whole.poses[part], whole.scene_index[part]))
                for part in np.array_split(order, pieces)
            ]
        scores = Scores.concatenate(parts)
        np.testing.assert_array_equal(scores.components, expected.components[order])
        np.testing.assert_array_equal(scores.total, expected.total[order])
        assert scores.failures == {i: expected.failures[row] for i, row in enumerate(order) if row in expected.failures}


@pytest.mark.parametrize(
    ("change", "kind", "reason"),
    [
        (lambda columns: {**columns, "ep": columns["ep"][:1]}, "wrong_output", "returned ep of shape [1] for 2 rows"),
        (lambda columns: {k: v for k, v in columns.items() if k != "ttc"}, "wrong_output", "returned no ttc"),
        (lambda columns: {**columns, "ep": np.array(["a", "b"])}, "wrong_output", "not numbers"),
        (lambda columns: {**columns, "c": columns["c"] * np.inf}, "not_finite", "no finite score"),
        (lambda columns: None, "raised", "TypeError"),
    ],
)
def test_scorer_that_returns_something_else(change: Callable[[Any], Any], kind: str, reason: str) -> None:
    ordinary = stand_in()
    odd = replace(ordinary, score=lambda p, poses, previous: change(ordinary.score(p, poses, previous)))
    scores = service(scorer=odd).score([make_scene("a")], plans([10, 20]))
    assert kinds(scores) == {0: ("scorer", kind), 1: ("scorer", kind)}
    assert all(text.startswith("scene 'a': scoring failed: ") and reason in text for text in reasons(scores).values())


def test_total_that_overflows_is_invalid() -> None:
    reward("huge")(lambda inputs: np.full(len(inputs.trajectories), 1e200))
    reward("vast")(lambda inputs: np.full(len(inputs.trajectories), 1e200))
    built = build_reward([RewardSpec("huge")], gates=[RewardSpec("vast")])
    with np.errstate(over="ignore"):
        scores = LocalRewardService(replace(built, scorer=stand_in())).score([make_scene("a")], plans([1]))
    assert dict(scores.failures) == {0: Failure("total", "not_finite", "scene 'a': gates and terms together give inf")}


def test_gates_multiply_and_are_computed_once() -> None:
    calls: list[int] = []

    @reward("half")
    def half(inputs: RewardInputs) -> Array:
        calls.append(1)
        return np.full(len(inputs.trajectories), 0.5)

    built = build_reward([RewardSpec("pdms", 3.0), RewardSpec("half")], gates=[RewardSpec("half")])
    scores = LocalRewardService(replace(built, scorer=stand_in())).score([make_scene("a")], plans([10, 50]))
    assert scores.names == (*PDMS_COMPONENTS, "half")
    np.testing.assert_allclose(scores.total, [0.5 * (0.3 + 0.5) / 4, 0.5 * (1.5 + 0.5) / 4], rtol=1e-15)
    assert calls == [1]


def test_cache_is_limited_by_memory() -> None:
    def prepare(reference: SceneReference) -> Array:
        return np.full(1_000_000 // 8, reference.speed_limit)

    heavy = replace(stand_in(), prepare=lambda token, reference: prepare(reference))
    heavy = replace(heavy, score=lambda p, poses, previous: stand_in().score(p[0], poses, previous))
    with service(scorer=heavy, cache_mb=5) as cached:
        for i in range(1, 12):
            assert cached.score([make_scene(f"s{i}", float(i))], plans([10])).component("ep")[0] == 10 / i
            assert cached.stats.cached_bytes <= 5_000_000
        assert cached.stats.cached_bytes > 4_000_000
