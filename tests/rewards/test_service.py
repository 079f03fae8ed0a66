"""The reward service: rows land where they belong, failures stay where they arise, threads change nothing."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, Future
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
    isolation,
    reward,
)
from rewards.reward_stats import reward_failures
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


def test_closed_service_can_be_used_again() -> None:
    scenes = [make_scene("a"), make_scene("b")]
    again = service(workers=2)
    first = again.score(scenes, plans([1, 2], [0, 1]))
    again.close()
    np.testing.assert_array_equal(again.score(scenes, plans([1, 2], [0, 1])).total, first.total)
    again.close()


# Threads, submissions, limits of time, plans of the previous frame.


@pytest.fixture
def release() -> Iterator[threading.Event]:
    """Ends the rewards that hang when the test is over."""
    event = threading.Event()
    yield event
    event.set()


def x_of(inputs: RewardInputs) -> Array:
    return inputs.trajectories.poses[:, -1, 0]


def test_parts_of_one_scene_are_scored_at_the_same_time_and_prepared_once() -> None:
    barrier = threading.Barrier(2, timeout=10.0)
    sizes: list[int] = []
    ordinary = stand_in(counting(counts := {}))

    def score(prepared: float, poses: Array, previous: Array | None) -> Mapping[str, Array]:
        sizes.append(len(poses))
        if len(sizes) <= 2:
            barrier.wait()  # breaks, and so fails the rows, unless two parts are scored at once
        return ordinary.score(prepared, poses, previous)

    x = np.linspace(0, 90, 1000).tolist()
    with service(workers=2, scorer=replace(ordinary, score=score), cache_size=0) as two:
        scores = two.score([make_scene("a")], plans(x))
    assert scores.component("pdms").tolist() == [v / 100 for v in x]
    assert (sizes, counts) == ([125] * 8, {10.0: 1})


def test_small_groups_are_not_taken_apart() -> None:
    sizes: list[int] = []
    ordinary = stand_in()

    def score(prepared: float, poses: Array, previous: Array | None) -> Mapping[str, Array]:
        sizes.append(len(poses))
        return ordinary.score(prepared, poses, previous)

    with service(workers=4, scorer=replace(ordinary, score=score)) as four:
        four.score([make_scene("a"), make_scene("b")], plans([1.0] * 24, [0] * 12 + [1] * 12))
    assert sizes == [12, 12]


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


def test_submission_runs_while_the_caller_goes_on() -> None:
    gate = threading.Event()

    @reward("waits")
    def waits(inputs: RewardInputs) -> Array:
        assert gate.wait(10.0)
        return x_of(inputs)

    with service([RewardSpec("waits")]) as busy:
        pending = busy.submit([make_scene("a")], plans([1, 2]))
        assert not pending.done()
        gate.set()
        assert pending.result(10.0).total.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("workers", [1, 2])
def test_several_submissions_under_way_give_what_scoring_gives(workers: int) -> None:
    barrier = threading.Barrier(3, timeout=10.0)

    def prepare(reference: SceneReference) -> float:
        if reference.speed_limit < 4.0:
            barrier.wait()  # breaks unless three submissions are under way
        return reference.speed_limit

    scenes = [make_scene(f"s{i}", float(i)) for i in range(1, 9)]
    with service(workers=3 if workers > 1 else 1, scorer=stand_in(prepare)) as busy:
        pending = [busy.submit([scene], plans([10, 20])) for scene in scenes]
        results = [future.result(10.0).component("ep").tolist() for future in pending]
    assert results == [[10 / i, 20 / i] for i in range(1, 9)]
    assert busy.stats.rows == 16


def test_plans_may_be_changed_once_they_are_submitted() -> None:
    gate = threading.Event()

    def prepare(reference: SceneReference) -> float:
        assert gate.wait(10.0)
        return reference.speed_limit

    scenes, trajectories = [make_scene("a")], plans([10, 20])
    with service(scorer=stand_in(prepare)) as busy:
        pending = busy.submit(scenes, trajectories, plans([10, 20]))
        trajectories.poses[:] = 0.0
        trajectories.scene_index[:] = 7
        scenes.clear()
        gate.set()
        assert pending.result(10.0).total.tolist() == [0.1, 0.2]


def test_what_scoring_raises_arrives_in_the_future() -> None:
    @reward("stopper")
    def stopper(inputs: RewardInputs) -> Array:
        raise KeyboardInterrupt

    with service([RewardSpec("stopper")]) as busy:
        with pytest.raises(DataError, match="scene_index"):
            busy.submit([make_scene("a")], plans([1], [1])).result(10.0)
        with pytest.raises(KeyboardInterrupt):
            busy.submit([make_scene("a")], plans([1])).result(10.0)


def test_close_waits_for_what_was_submitted() -> None:
    before = set(threading.enumerate())
    busy = service([RewardSpec("pdms"), RewardSpec("wam_flow")], scorer=stand_in(delay_s=0.2), workers=2)
    pending = [busy.submit([make_scene("a"), make_scene("b")], plans([1, 2], [0, 1])) for _ in range(2)]
    busy.close()
    assert all(future.done() for future in pending)
    assert pending[0].result().component("pdms").tolist() == [0.01, 0.02]
    started = [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("reward-wam_flow")]
    for thread in started:
        thread.join(10.0)
    assert [thread for thread in set(threading.enumerate()) - before if thread.is_alive()] == []


def test_leaving_by_an_exception_cancels_even_what_hangs(release: threading.Event) -> None:
    @reward("hangs")
    def hangs(inputs: RewardInputs) -> Array:
        release.wait()
        return x_of(inputs)

    started = time.monotonic()
    busy = service([RewardSpec("hangs")])
    pending: list[Future[Scores]] = []

    def sample() -> None:
        with busy:
            pending.append(busy.submit([make_scene("a")], plans([1])))
            raise RuntimeError("sampling failed")

    with pytest.raises(RuntimeError, match="sampling failed"):
        sample()
    with pytest.raises(CancelledError):
        pending[0].result(10.0)
    assert time.monotonic() - started < 5.0
    release.set()
    assert busy.score([make_scene("a")], plans([3])).total.tolist() == [3.0]  # and it can be used again
    busy.close()


def test_cancelled_submission_scores_no_further_scene() -> None:
    seen: list[float] = []
    first = threading.Event()

    def prepare(reference: SceneReference) -> float:
        seen.append(reference.speed_limit)
        first.set()
        time.sleep(0.1)
        return reference.speed_limit

    busy = service(scorer=stand_in(prepare))
    pending = busy.submit([make_scene(f"s{i}", float(i)) for i in range(1, 50)], plans([1.0] * 49, list(range(49))))
    assert first.wait(10.0)
    busy.close(cancel=True)
    with pytest.raises(CancelledError):
        pending.result(10.0)
    assert len(seen) <= 3


def test_row_that_hangs_is_lost_alone_and_counted(release: threading.Event) -> None:
    @reward("hangs")
    def hangs(inputs: RewardInputs) -> Array:
        if 50 in x_of(inputs):
            release.wait()
        return x_of(inputs)

    x = [float(v) for v in range(40, 72)]
    with service([RewardSpec("hangs")], timeout_s=0.2) as limited:
        started = time.monotonic()
        scores = limited.score([make_scene("a")], plans(x))
        assert time.monotonic() - started < 7 * 0.2 + 2.0
        stats = limited.stats
        assert dict(scores.failures) == {
            10: Failure("hangs", "timeout", "scene 'a': reward 'hangs': took longer than 0.2 s")
        }
        np.testing.assert_array_equal(scores.total, [np.nan if v == 50 else v for v in x])
        assert reward_failures(scores) == {"hangs/timeout": 1}
        assert stats.timeouts == stats.abandoned >= 1
        assert stats.restarts >= stats.abandoned - 1
        assert (stats.failures_by_kind, stats.failures_by_source) == ({"timeout": 1}, {"hangs": 1})
        assert limited.score([make_scene("a")], plans([1, 2])).total.tolist() == [1.0, 2.0]


def test_time_is_bounded_when_every_row_hangs(release: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "GIVE_UP_AFTER", 3)

    @reward("hangs")
    def hangs(inputs: RewardInputs) -> Array:
        release.wait()
        return x_of(inputs)

    with service([RewardSpec("hangs"), RewardSpec("pdms")], timeout_s=0.25) as limited:
        started = time.monotonic()
        scores = limited.score([make_scene("a")], plans([5.0] * 500))
        assert time.monotonic() - started < 4 * 0.25 + 2.0
    assert set(reward_failures(scores)) == {"hangs/timeout"}
    assert len(scores.failures) == 500
    assert "took longer than 0.25 s" in scores.failures[0].reason
    assert "given up untried: calls that failed took" in scores.failures[499].reason
    assert limited.stats.timeouts == 3


def test_rewards_that_fail_in_every_way_cost_their_rows_alone(release: threading.Event) -> None:
    @reward("wild")
    async def wild(inputs: RewardInputs) -> Any:
        x = x_of(inputs)
        await asyncio.sleep(0)
        if 1 in x:
            raise ValueError("one")
        if 2 in x:
            await asyncio.sleep(60)
        if 3 in x:
            raise SystemExit("three")
        if 4 in x:
            release.wait()
        if 5 in x and len(x) == 1:
            return np.zeros(9)
        return np.where(x == 6, np.inf, x)

    with service([RewardSpec("wild")], timeout_s=0.2) as limited:
        singly = [limited.score([make_scene("a")], plans([x])) for x in range(1, 9)]
        assert limited.stats.abandoned == 1  # the sleeping one was cancelled
    assert [reward_failures(scores) for scores in singly] == [
        {"wild/raised": 1},
        {"wild/timeout": 1},
        {"wild/worker_died": 1},
        {"wild/timeout": 1},
        {"wild/wrong_output": 1},
        {"wild/not_finite": 1},
        {},
        {},
    ]
    assert np.isnan([scores.total[0] for scores in singly[:6]]).all()
    assert np.isnan([scores.component("wild")[0] for scores in singly[:6]]).all()
    assert [scores.total[0] for scores in singly[6:]] == [7.0, 8.0]


@pytest.mark.parametrize("timeout_s", [0.0, 20.0])
def test_reward_that_must_be_awaited(timeout_s: float) -> None:
    @reward("slowly")
    async def slowly(inputs: RewardInputs, *, factor: float = 2.0) -> Array:
        values = await asyncio.gather(*(one(x) for x in x_of(inputs)))
        return factor * np.array(values)

    async def one(x: float) -> float:
        await asyncio.sleep(0.001)
        return x

    async def outer() -> Scores:
        with service([RewardSpec("slowly")], timeout_s=timeout_s) as awaiting:
            return awaiting.score([make_scene("a")], plans([1, 2, 3]))  # inside a running loop, as in a notebook

    assert asyncio.run(outer()).total.tolist() == [2.0, 4.0, 6.0]


def test_user_reward_is_called_by_one_thread_at_a_time() -> None:
    inside: list[int] = []
    most: list[int] = []

    @reward("shy")
    def shy(inputs: RewardInputs) -> Array:
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.01)
        inside.pop()
        return x_of(inputs)

    with service([RewardSpec("shy")], workers=2) as busy:
        pending = [busy.submit([make_scene("a")], plans([float(i)])) for i in range(6)]
        assert [future.result(10.0).total[0] for future in pending] == [0, 1, 2, 3, 4, 5]
    assert max(most) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda inputs: inputs.trajectories.poses.fill(0.0),
        lambda inputs: inputs.trajectories.scene_index.fill(0),
        lambda inputs: inputs.previous.poses.fill(0.0),
        lambda inputs: inputs.scenes[0].reference.map_xy.fill(0.0),
        lambda inputs: inputs.scenes[0].observation.ego_history.fill(1.0),
    ],
)
def test_user_reward_cannot_change_plans_or_scenes(change: Callable[[RewardInputs], None]) -> None:
    @reward("vandal")
    def vandal(inputs: RewardInputs) -> Array:
        change(inputs)
        return x_of(inputs)

    scene = make_scene("a")
    scores = service([RewardSpec("pdms"), RewardSpec("vandal")]).score([scene], plans([10]), plans([20]))
    assert scores.failures[0].kind == "raised"
    assert "read-only" in scores.failures[0].reason
    assert scene.reference.map_xy.flags.writeable  # the caller's own arrays stay as they were
    assert not scene.observation.ego_history.any()


def test_user_reward_that_changes_its_own_containers_changes_no_others() -> None:
    seen: list[tuple[list[str], int]] = []

    def spoil(inputs: RewardInputs) -> Array:
        seen.append((sorted(inputs.components), len(inputs.scenes)))
        inputs.components.clear()  # type: ignore[attr-defined]
        return x_of(inputs)

    reward("first")(spoil)
    reward("second")(lambda inputs: spoil(inputs))
    service([RewardSpec("first"), RewardSpec("second")]).score([make_scene("a")], plans([10]))
    assert seen == [(sorted(PDMS_COMPONENTS), 1)] * 2


TWO_FRAME_COLUMNS = ("ep", "ec", "epdms")


def two_frame_scorer() -> Scorer:
    """``ep = x / 100``, ``ec = previous x``, NaN without one; `epdms` is their mean, or `ep` alone."""

    def score(prepared: Any, poses: Array, previous: Array | None) -> Mapping[str, Array]:
        ep = poses[:, -1, 0] / 100
        ec = np.full(len(ep), np.nan) if previous is None else previous[:, -1, 0]
        ec = np.where(ec == 9.0, np.nan, ec)
        return {"ep": ep, "ec": ec, "epdms": np.where(np.isnan(ec), ep, (ep + ec) / 2)}

    info = ScorerInfo("epdms", "test", "on")
    return Scorer(info, TWO_FRAME_COLUMNS, lambda token, reference: None, score, frozenset({"ec"}))


def two_frame_service(names: list[str]) -> LocalRewardService:
    built = build_reward([RewardSpec(name) for name in names], scorer="epdms")
    return LocalRewardService(replace(built, scorer=two_frame_scorer()), workers=1)


def test_plans_of_the_previous_frame_reach_scorer_and_rewards_row_by_row() -> None:
    seen: list[Array] = []

    @reward("looks_back", two_frame=True)
    def looks_back(inputs: RewardInputs) -> Array:
        assert inputs.previous is not None
        seen.append(inputs.previous.scene_index)
        return inputs.previous.poses[:, -1, 0]

    scenes = [make_scene("a"), make_scene("b")]
    scores = two_frame_service(["epdms", "looks_back"]).score(
        scenes, plans([10, 20, 30], [1, 0, 1]), plans([0.5, 1.0, 0.0], [1, 0, 1])
    )
    assert scores.component("ec").tolist() == [0.5, 1.0, 0.0]
    assert scores.component("looks_back").tolist() == [0.5, 1.0, 0.0]
    assert scores.component("epdms").tolist() == [0.3, 0.6, 0.15]
    assert seen[0].tolist() == [1, 0, 1]


def test_row_whose_plan_of_the_previous_frame_is_not_finite_is_invalid() -> None:
    earlier = plans([0.5, 1.0, 0.0])
    earlier.poses[1, 2, 0] = np.nan
    scores = two_frame_service(["epdms"]).score([make_scene("a")], plans([10, 20, 30]), earlier)
    assert dict(scores.failures) == {
        1: Failure("plan", "invalid_plan", "scene 'a': the plan of the previous frame holds a value that is not finite")
    }
    np.testing.assert_array_equal(scores.total, [0.3, np.nan, 0.15])


def test_component_that_a_row_lacks_is_named() -> None:
    scores = two_frame_service(["ec", "ep"]).score([make_scene("a")], plans([10, 20]), plans([9.0, 1.0]))
    assert dict(scores.failures) == {0: Failure("ec", "unavailable", "scene 'a': component ec is not available")}
    assert scores.total[1] == 0.6
    without = two_frame_service(["epdms"]).score([make_scene("a")], plans([10, 20]), plans([9.0, 1.0]))
    assert without.valid.all()  # EC may be lacking where it is not asked for


@pytest.mark.parametrize(
    ("previous", "match"),
    [
        (None, r"needs the plans of the previous frame \(for ec\); got None"),
        (plans([1.0]), "row by row; got 1 of them for 2 plans"),
        (plans([1.0, 2.0], [0, 1]), "or another scene_index"),
        (replace(plans([1.0, 2.0]), dt_s=0.1), r"Plans of the previous frame must have 8 poses 0\.5 s apart"),
    ],
)
def test_plans_of_the_previous_frame_that_cannot_be_meant(previous: Trajectories | None, match: str) -> None:
    prepared: list[str] = []
    built = two_frame_service(["ec"]).reward
    scorer = replace(built.scorer, prepare=lambda token, reference: prepared.append(token))
    with pytest.raises(DataError, match=match):
        LocalRewardService(replace(built, scorer=scorer)).score([make_scene("a")] * 2, plans([1.0, 2.0]), previous)
    assert prepared == []


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


def test_many_scenes_are_not_held_at_once() -> None:
    alive: set[int] = set()
    most: list[int] = []

    class Held:
        def __init__(self, number: float) -> None:
            self.number = number
            alive.add(id(self))
            most.append(len(alive))

        def __del__(self) -> None:
            alive.discard(id(self))

    passing = stand_in(lambda reference: Held(reference.speed_limit))
    passing = replace(passing, score=lambda p, poses, previous: stand_in().score(p.number, poses, previous))
    for workers in (1, 2):
        with service(scorer=passing, cache_size=0, workers=workers) as flat:
            scenes = [make_scene(f"s{i}", float(i + 1)) for i in range(60)]
            flat.score(scenes, plans([10.0] * 120, [i // 2 for i in range(120)]))
        assert max(most) <= workers + 2
