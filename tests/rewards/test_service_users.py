"""Rewards of users: what they see, and what it costs when they fail, hang or return something else."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from oracles.stand_in import kinds, make_scene, plans, reasons, service, x_of

from rewards import (
    PDMS_COMPONENTS,
    REWARDS,
    Failure,
    RewardInputs,
    RewardSpec,
    Scores,
    call_thread,
    isolation,
    reward,
)
from rewards.reward_stats import reward_failures

Array = NDArray[np.float64]


@pytest.fixture(autouse=True)
def _registered_names_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(REWARDS, "_entries", dict(REWARDS._entries))


@pytest.fixture
def release() -> Iterator[threading.Event]:
    """Ends the rewards that hang when the test is over."""
    event = threading.Event()
    yield event
    event.set()


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


def test_row_that_hangs_is_lost_alone_and_counted(release: threading.Event) -> None:
    @reward("hangs")
    def hangs(inputs: RewardInputs) -> Array:
        if 46 in x_of(inputs):
            release.wait()
        return x_of(inputs)

    x = [float(v) for v in range(40, 72)]
    with service([RewardSpec("hangs")], timeout_s=0.5) as limited:
        started = time.monotonic()
        scores = limited.score([make_scene("a")], plans(x))
        assert time.monotonic() - started < 3 * 0.5 + 4.0
        stats = limited.stats
        assert dict(scores.failures) == {
            6: Failure("hangs", "timeout", "scene 'a': reward 'hangs': took longer than 0.5 s")
        }
        np.testing.assert_array_equal(scores.total, [np.nan if v == 46 else v for v in x])
        assert reward_failures(scores) == {"hangs/timeout": 1}
        # Rows 0, 1 2, then 3 4 5 6: late; 3 4: fine, so 5 6 hang and are taken apart untried; 5: fine; 6: late.
        assert (stats.timeouts, stats.abandoned, stats.restarts) == (2, 2, 2)
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
        assert time.monotonic() - started < 4 * 0.25 + 4.0
    assert set(reward_failures(scores)) == {"hangs/timeout"}
    assert len(scores.failures) == 500
    assert "took longer than 0.25 s" in scores.failures[0].reason
    assert "given up untried: calls that failed took" in scores.failures[499].reason
    assert limited.stats.timeouts == 3


def test_rewards_that_fail_in_every_way_cost_their_rows_alone(
    release: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(call_thread, "_GRACE_S", 0.5)

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

    with service([RewardSpec("wild")], timeout_s=0.5) as limited:
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
