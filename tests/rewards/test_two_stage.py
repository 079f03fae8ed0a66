"""The two-stage score against official numbers, and its weights by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rewards.epdms import combine_epdms
from rewards.kernels.comfort_v2 import FRAME_LIMITS, frame_differences
from rewards.two_stage import StageGroup, aggregate_two_stage, second_stage_weights
from rlhf_drive.errors import DataError

SHORT = {
    "no_at_fault_collisions": "nc",
    "drivable_area_compliance": "dac",
    "driving_direction_compliance": "ddc",
    "traffic_light_compliance": "tlc",
    "ego_progress": "ep",
    "time_to_collision_within_bound": "ttc",
    "lane_keeping": "lk",
    "history_comfort": "hc",
}
COLUMNS = (*SHORT, "two_frame_extended_comfort", "score")


@pytest.fixture(scope="module")
def vector(navsim_golden: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((navsim_golden / "golden" / "two_stage.json").read_text(encoding="utf-8"))
    return content


def columns(vector: dict[str, Any], token: str) -> list[float]:
    """Scores of one frame in the order of `COLUMNS`."""
    row = next(row for row in vector["rows"] if row["token"] == token)
    official = vector["per_token"][token]
    return [*(row["metrics"][name] for name in SHORT), official["two_frame_extended_comfort"], official["score"]]


def group(vector: dict[str, Any], first: str, second: list[str]) -> StageGroup:
    rows = {row["token"]: row for row in vector["rows"]}
    return StageGroup(
        first=np.array(columns(vector, first)),
        endpoint=np.array(rows[first]["endpoint"]),
        second=np.array([columns(vector, token) for token in second]),
        starts=np.array([rows[token]["start_point"] for token in second]),
    )


def pairs(vector: dict[str, Any]) -> list[tuple[StageGroup, StageGroup]]:
    return [
        (group(vector, now, [pair[0] for pair in later]), group(vector, previous, [pair[1] for pair in later]))
        for now, previous, later in vector["mappings"]
    ]


def test_official_result(vector: dict[str, Any]) -> None:
    result = aggregate_two_stage(pairs(vector))
    for name, values in (("combined", result.combined), ("stage_one", result.first), ("stage_two", result.second)):
        np.testing.assert_allclose(values, [vector[name][column] for column in COLUMNS], atol=1e-12, err_msg=name)


def test_official_weights(vector: dict[str, Any]) -> None:
    for now, previous, later in vector["mappings"]:
        for first, tokens in ((now, [pair[0] for pair in later]), (previous, [pair[1] for pair in later])):
            of = group(vector, first, tokens)
            expected = [vector["per_token"][token]["weight"] for token in tokens]
            np.testing.assert_allclose(second_stage_weights(of.endpoint, of.starts), expected, atol=1e-12)


def test_official_scores_of_frames_follow_from_their_states(vector: dict[str, Any], navsim_golden: Path) -> None:
    """EC is one number for a frame and the one before it; the aggregate of each carries it with weight 2 of 16."""
    rows = {row["token"]: row for row in vector["rows"]}

    def states(token: str) -> np.ndarray:
        row = rows[token]
        with np.load(navsim_golden / "golden" / f"{Path(row['scene']).name}.golden.npz", allow_pickle=False) as archive:
            return np.ascontiguousarray(archive[row["states"]][row["index"]][None])

    for now, previous, later in vector["mappings"]:
        for a, b in ((now, previous), *later):
            rms = np.empty((1, 4))
            offset = round((rows[a]["start_time"] - rows[b]["start_time"]) / 0.1)
            frame_differences(states(a), states(b), offset, rms)
            ec = float((rms[0] <= np.array(FRAME_LIMITS)).all())
            for token in (a, b):
                official = vector["per_token"][token]
                assert official["two_frame_extended_comfort"] == ec, token
                parts = {SHORT[name]: np.array([value]) for name, value in rows[token]["metrics"].items()}
                score = combine_epdms({**parts, "ec": np.array([ec])}, with_ec=True)[0]
                assert score == pytest.approx(official["score"], abs=1e-12), token


def test_weights_fall_with_the_squared_distance() -> None:
    """Starts at 0 m and sqrt(.2 ln 3) = .469 m: exp(0) to exp(-ln 3), three to one."""
    starts = np.array([[5.0, 1.0], [5.0, 1.0 + math.sqrt(0.2 * math.log(3.0))]])
    np.testing.assert_allclose(second_stage_weights(np.array([5.0, 1.0]), starts), [0.75, 0.25], atol=1e-12)


def test_far_starts_share_equally() -> None:
    """The sum of two starts is 1e-8 at sqrt(-.2 ln(5e-9)) = 1.955 m: beyond it that counts as nothing, within not."""
    edge = math.sqrt(-0.2 * math.log(5e-9))
    beyond = np.array([[edge + 1e-3, 0.0], [0.0, edge + 2e-3]])
    assert second_stage_weights(np.zeros(2), beyond).tolist() == [0.5, 0.5]
    within = np.array([[edge - 3e-3, 0.0], [0.0, edge - 1e-3]])
    assert second_stage_weights(np.zeros(2), within)[0] > 0.505
    assert second_stage_weights(np.zeros(2), 1e3 * beyond).tolist() == [0.5, 0.5]


def test_columns_are_multiplied_one_by_one_and_frames_averaged() -> None:
    """now: .5 (1 + 0) / 2 = .25 and 1 (.2 + .4) / 2 = .3; previous: 1 * .6 and 0: means .425 and .15."""
    here = np.zeros((2, 2))
    now = StageGroup(np.array([0.5, 1.0]), np.zeros(2), np.array([[1.0, 0.2], [0.0, 0.4]]), here)
    previous = StageGroup(np.array([1.0, 0.0]), np.zeros(2), np.array([[0.6, 0.9]]), here[:1])
    result = aggregate_two_stage([(now, previous)])
    np.testing.assert_allclose(result.combined, [0.425, 0.15], atol=1e-12)
    np.testing.assert_allclose(result.first, [0.75, 0.5], atol=1e-12)
    np.testing.assert_allclose(result.second, [0.55, 0.6], atol=1e-12)


def test_bad_groups_are_refused() -> None:
    with pytest.raises(DataError, match=r"got starts of shape \[1, 2\]"):
        StageGroup(np.ones(3), np.zeros(2), np.ones((2, 3)), np.zeros((1, 2)))
    with pytest.raises(DataError, match=r"finite.*got second of shape \[1, 3\]: \[nan"):
        StageGroup(np.ones(3), np.zeros(2), np.full((1, 3), np.nan), np.zeros((1, 2)))
    with pytest.raises(DataError, match="J and C above 0"):
        StageGroup(np.ones(3), np.zeros(2), np.ones((0, 3)), np.zeros((0, 2)))
    with pytest.raises(DataError, match=r"column counts \[\]"):
        aggregate_two_stage([])
    few, many = (StageGroup(np.ones(c), np.zeros(2), np.ones((1, c)), np.zeros((1, 2))) for c in (2, 3))
    with pytest.raises(DataError, match=r"column counts \[2, 3\]"):
        aggregate_two_stage([(few, few), (many, many)])
