"""Monitors of a scored batch, on hand-made plans and scores."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from rewards.carriers import Failure, ScorerInfo, Scores
from rewards.monitors import batch_monitors, component_monitors, plan_monitors
from rlhf_drive.scenes import Scene, Trajectories
from rlhf_drive.scenes.generator import generate_scenes

NO_POSES = np.zeros((0, 3))


def line(speed: float) -> NDArray[np.float64]:
    return np.stack([0.5 * speed * np.arange(1, 9), np.zeros(8), np.zeros(8)], axis=1)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    """Humans at 5 m/s and at rest; no PDM-Closed reference."""
    bare = {"pdm_reference_v1": NO_POSES, "pdm_reference_v2": NO_POSES}
    speeds = (5.0, 0.0)
    return [
        scene.with_reference(human_poses=line(speed), **bare)
        for scene, speed in zip(generate_scenes(2, seed=11), speeds, strict=True)
    ]


def scored(total: list[float], **columns: list[float]) -> Scores:
    """Rows with a NaN total are invalid."""
    values = np.array(total)
    valid = np.isfinite(values)
    failures = {int(row): Failure("plan", "invalid_plan", "test") for row in np.flatnonzero(~valid)}
    names = tuple(columns)
    stacked = np.stack([np.array(columns[name]) for name in names], axis=1) if names else np.zeros((len(values), 0))
    return Scores(names, stacked, values, valid, ScorerInfo("pdms", "test"), failures)


def test_reversal_is_a_share_of_finite_plans(scenes: list[Scene]) -> None:
    plans = np.stack([line(5.0)] * 5)
    plans[0, -1, 0] -= 3.0
    plans[4, 2, 1] = np.nan
    monitors = plan_monitors(scenes, Trajectories(plans, np.zeros(5, dtype=np.int64)))
    assert monitors["monitor/final_reversal"] == 0.25


def test_standing_still_counts_only_where_the_reference_moves(scenes: list[Scene]) -> None:
    plans = np.stack([line(0.2), line(0.3), line(5.0), line(0.0)])
    # Rows 0 to 2 face a human at 5 m/s; 0.2 m/s gets 0.8 m far, 0.3 m/s 1.2 m. Row 3 waits with its human.
    monitors = plan_monitors(scenes, Trajectories(plans, np.array([0, 0, 0, 1])))
    assert monitors["monitor/standstill"] == pytest.approx(1 / 3)
    assert "monitor/standstill" not in plan_monitors(scenes, Trajectories(plans[3:], np.array([1])))


def test_pdm_closed_stands_in_for_a_human_that_is_not_there(scenes: list[Scene]) -> None:
    x, y, heading = scenes[0].reference.ego_init[:3]
    ahead = 0.5 * np.arange(41)
    states = np.stack([x + ahead * np.cos(heading), y + ahead * np.sin(heading), np.full(41, heading)], axis=1)
    alone = scenes[0].with_reference(human_poses=NO_POSES)
    still = Trajectories(line(0.0)[None], np.array([0]))
    assert plan_monitors([alone.with_reference(pdm_reference_v2=states)], still)["monitor/standstill"] == 1.0
    assert set(plan_monitors([alone], still)) == {"monitor/final_reversal"}


def test_ratios_are_taken_over_the_rows_with_a_human(scenes: list[Scene]) -> None:
    mixed = [scenes[0], scenes[1].with_reference(human_poses=NO_POSES)]
    turning = line(5.0)
    turning[:, 2] = 0.1
    wild = line(5.0)
    wild[:, 2] = 2.0
    monitors = plan_monitors(mixed, Trajectories(np.stack([turning, wild]), np.array([0, 1])))
    assert monitors["monitor/heading_change_ratio"] == pytest.approx(0.12 / 0.02)
    human = plan_monitors(mixed, Trajectories(line(5.0)[None], np.array([0])))
    assert [human[f"monitor/{name}_ratio"] for name in ("heading_change", "curvature", "longitudinal_jerk")] == [
        1.0
    ] * 3
    assert human["monitor/lateral_jerk_ratio"] == 1.0


def test_components_of_two_groups() -> None:
    scores = scored([0.0, 0.5, 1.0, 1.0], nc=[0.0, 1.0, 1.0, 1.0], mine=[3.0, 3.0, 3.0, 2.0])
    monitors = component_monitors(scores, np.array([0, 0, 1, 1]))
    assert monitors["monitor/mean/nc"] == 0.75
    assert monitors["monitor/ceiling/nc"] == 0.75
    assert monitors["monitor/group_spread/nc"] == 0.5
    # A user's term is at its ceiling where it is largest.
    assert monitors["monitor/ceiling/mine"] == 0.75
    assert monitors["monitor/group_spread/mine"] == 0.5


def test_scorer_component_that_is_always_low_is_not_at_its_ceiling() -> None:
    scores = scored([0.1, 0.2], nc=[0.5, 0.5], mine=[0.5, 0.5])
    monitors = component_monitors(scores, np.array([0, 0]))
    assert (monitors["monitor/ceiling/nc"], monitors["monitor/ceiling/mine"]) == (0.0, 1.0)
    assert monitors["monitor/group_spread/nc"] == 0.0


def test_groups_of_one_tell_no_spread() -> None:
    monitors = component_monitors(scored([0.1, 0.2], nc=[0.0, 1.0]), np.array([0, 1]))
    assert set(monitors) == {"monitor/mean/nc", "monitor/ceiling/nc"}


def test_variance_share_is_a_squared_correlation_within_groups() -> None:
    ep = [0.0, 0.4, 0.9, 0.5]
    nc = [0.0, 1.0, 0.0, 1.0]
    total = [0.0 + 0.0, 0.4 + 1.0, 0.9 + 0.0, 0.5 + 1.0]
    monitors = component_monitors(scored(total, ep=ep, nc=nc), np.array([0, 0, 1, 1]))
    # Deviations ±(0.2, 0.2), nc ±0.5, total ±0.7 and ±0.3. Group means differ, and do not count.
    dx, dn, dt = np.array([-0.2, 0.2, 0.2, -0.2]), np.array([-0.5, 0.5, -0.5, 0.5]), np.array([-0.7, 0.7, -0.3, 0.3])
    assert monitors["monitor/variance_share/ep"] == pytest.approx((dx @ dt) ** 2 / (dx @ dx) / (dt @ dt))
    assert monitors["monitor/variance_share/nc"] == pytest.approx((dn @ dt) ** 2 / (dn @ dn) / (dt @ dt))


def test_total_itself_and_aggregates_have_no_variance_share() -> None:
    scores = scored([0.1, 0.5], pdms=[0.2, 0.9], mine=[0.1, 0.5], nc=[1.0, 1.0])
    assert not [name for name in component_monitors(scores, np.array([0, 0])) if "variance_share" in name]


def test_invalid_rows_are_left_out_everywhere(scenes: list[Scene]) -> None:
    plans = np.stack([line(5.0), line(5.0), line(5.0)])
    plans[2, -1, 0] = 0.0
    index = np.array([0, 0, 0])
    nan = float("nan")
    whole = batch_monitors(scenes, Trajectories(plans, index), scored([0.1, 0.2, nan], nc=[1.0, 0.5, 0.0]))
    part = batch_monitors(scenes, Trajectories(plans[:2], index[:2]), scored([0.1, 0.2], nc=[1.0, 0.5]))
    assert whole == part
    assert whole["monitor/mean/nc"] == 0.75


def test_a_component_that_is_nan_in_valid_rows_is_averaged_over_the_others() -> None:
    scores = scored([0.1, 0.2, 0.3], ec=[np.nan, 1.0, 0.0], hc=[np.nan] * 3)
    monitors = component_monitors(scores, np.array([0, 0, 0]))
    assert monitors["monitor/mean/ec"] == 0.5
    assert not [name for name in monitors if name.endswith("/hc")]


def test_an_empty_batch_has_no_monitors(scenes: list[Scene]) -> None:
    nothing = Trajectories(np.zeros((0, 8, 3)), np.zeros(0, dtype=np.int64))
    assert batch_monitors(scenes, nothing, scored([], nc=[])) == {}
    row = Trajectories(line(5.0)[None], np.array([0]))
    assert batch_monitors(scenes, row, scored([float("nan")], nc=[1.0])) == {}


def test_component_without_weight_is_never_at_its_ceiling() -> None:
    scores = scored([0.5, 0.5], ddc=[1.0, 1.0], nc=[1.0, 1.0])
    found = component_monitors(scores, np.zeros(2, dtype=np.int64))
    assert "monitor/ceiling/ddc" not in found  # PDMS gives it no weight
    assert found["monitor/ceiling/nc"] == 1.0
    multiplied = Scores(scores.names, scores.components, scores.total, scores.valid, ScorerInfo("epdms", "test"))
    assert component_monitors(multiplied, np.zeros(2, dtype=np.int64))["monitor/ceiling/ddc"] == 1.0
