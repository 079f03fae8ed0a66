"""Plans of the previous frame: checked, and handed on row by row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from oracles.stand_in import make_scene, plans

from rewards import (
    REWARDS,
    Failure,
    LocalRewardService,
    RewardInputs,
    RewardSpec,
    ScorerInfo,
    build_reward,
    reward,
)
from rewards.scorer import Scorer
from rlhf_drive.errors import DataError
from rlhf_drive.scenes import Trajectories

Array = NDArray[np.float64]


@pytest.fixture(autouse=True)
def _registered_names_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(REWARDS, "_entries", dict(REWARDS._entries))


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
