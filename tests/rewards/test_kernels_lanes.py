"""Drivable area, driving direction and lane keeping on states driven exactly along +x."""

from __future__ import annotations

import numpy as np
import pytest
from oracles.tiny_scene import FRONT_M, HALF_WIDTH_M, LEFT_LANE, ROAD, ROUTE_LANE, Polygon, make_scene, rectangle
from oracles.tiny_scene import straight_states as drive

from rewards.kernels.lanes import MULTIPLE_LANES, NON_DRIVABLE, ONCOMING
from rewards.kernels.score import V1_RULES, V2_RULES, ScoreRules, StateMetrics, score_states
from rlhf_drive.errors import DataError
from rlhf_drive.scenes import MapLayer

CROSSING: Polygon = (MapLayer.INTERSECTION, False, rectangle(-50, 150, -20, 20))


def judge(states: np.ndarray, polygons: list[Polygon] | None = None, rules: ScoreRules = V1_RULES) -> StateMetrics:
    scene = make_scene(polygons=polygons)
    return score_states(scene.road, scene.agents, states, rules=rules)


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (MapLayer.ROADBLOCK, 1.0),
        (MapLayer.INTERSECTION, 1.0),
        (MapLayer.DRIVABLE_AREA, 1.0),
        (MapLayer.CARPARK_AREA, 1.0),
        (MapLayer.LANE, 0.0),
        (MapLayer.LANE_CONNECTOR, 0.0),
    ],
)
def test_lanes_alone_are_not_drivable(layer: MapLayer, expected: float) -> None:
    assert judge(drive(10.0), [ROUTE_LANE, (layer, False, rectangle(-50, 150, -3, 3))]).dac[0] == expected


def test_one_corner_off_the_road_at_one_step_is_enough() -> None:
    room = 3.0 - HALF_WIDTH_M
    road: list[Polygon] = [ROUTE_LANE, (MapLayer.ROADBLOCK, False, rectangle(-50, 150, -3, 3))]
    assert judge(drive(10.0, y=room - 1e-6), road).dac[0] == 1.0
    assert judge(drive(10.0, y=room + 1e-6), road).dac[0] == 0.0
    short: list[Polygon] = [ROUTE_LANE, (MapLayer.ROADBLOCK, False, rectangle(-50, 40.0 + FRONT_M - 0.5, -3, 3))]
    metrics = judge(drive(10.0), short)
    assert np.flatnonzero(metrics.areas[0] & NON_DRIVABLE).tolist() == [40]
    assert metrics.dac[0] == 0.0


def test_corners_may_stand_on_different_drivable_polygons() -> None:
    halves: list[Polygon] = [
        (MapLayer.ROADBLOCK, False, rectangle(-50, 150, -3, 0.3)),
        (MapLayer.CARPARK_AREA, False, rectangle(-50, 150, 0.3, 3)),
    ]
    assert judge(drive(10.0), [ROUTE_LANE, *halves]).dac[0] == 1.0


def test_multiple_lanes_needs_two_lanes_and_none_that_holds_all_corners() -> None:
    assert not judge(drive(10.0)).areas[0, 5] & MULTIPLE_LANES
    assert judge(drive(10.0, y=1.5)).areas[0, 5] & MULTIPLE_LANES
    wide: Polygon = (MapLayer.LANE_CONNECTOR, True, rectangle(-50, 150, -2, 6))
    assert not judge(drive(10.0, y=1.5), [wide, LEFT_LANE, ROAD]).areas[0, 5] & MULTIPLE_LANES
    segments: list[Polygon] = [
        (MapLayer.LANE, True, rectangle(-50, 20, -2, 2)),
        (MapLayer.LANE, True, rectangle(20, 150, -2, 2)),
    ]
    straddling = judge(drive(10.0), [*segments, ROAD]).areas[0] & MULTIPLE_LANES
    assert np.flatnonzero(straddling).tolist() == [16, 17, 18, 19, 20, 21]


def test_oncoming_is_a_centre_outside_every_route_lane() -> None:
    assert not (judge(drive(10.0, y=1.99)).areas & ONCOMING).any()
    assert (judge(drive(10.0, y=2.01)).areas & ONCOMING).all()


@pytest.mark.parametrize(("speed", "expected"), [(1.80, 1.0), (1.83, 0.5), (5.44, 0.5), (5.47, 0.0)])
def test_direction_sums_eleven_steps(speed: float, expected: float) -> None:
    """11 steps of 0.1 s: 2 m at 1.818 m/s, 6 m at 5.4545 m/s; ten steps would allow 2.0 and 6.0 m/s."""
    assert judge(drive(speed, y=4.0)).ddc[0] == expected


def test_direction_counts_only_steps_off_the_route() -> None:
    states = drive(10.0)
    states[0, 20, 1] = 2.5
    assert judge(states).ddc[0] == 0.5
    assert judge(drive(10.0)).ddc[0] == 1.0


def test_direction_in_intersections_counts_in_v1_only() -> None:
    assert judge(drive(10.0, y=4.0), [ROUTE_LANE, CROSSING]).ddc[0] == 0.0
    assert judge(drive(10.0, y=4.0), [ROUTE_LANE, CROSSING], V2_RULES).ddc[0] == 1.0


def test_lane_keeping_counts_twenty_steps_and_pauses_in_intersections() -> None:
    def wander(steps: int) -> np.ndarray:
        states = drive(10.0)
        states[0, 1 : 1 + steps, 1] = 0.6
        return states

    assert judge(wander(19), rules=V2_RULES).lk[0] == 1.0
    assert judge(wander(20), rules=V2_RULES).lk[0] == 0.0
    assert judge(wander(20)).lk[0] == 1.0
    # Box centres of steps 9 … 13 (10.461 … 14.461) are in the patch: 25 steps outside the lane count as 20.
    patch: Polygon = (MapLayer.INTERSECTION, False, rectangle(10, 15, -5, 5))
    assert judge(wander(24), [ROUTE_LANE, ROAD, patch], V2_RULES).lk[0] == 1.0
    assert judge(wander(25), [ROUTE_LANE, ROAD, patch], V2_RULES).lk[0] == 0.0


def test_progress_is_the_centres_way_along_the_centreline() -> None:
    assert judge(drive(7.5)).progress_m[0] == pytest.approx(30.0, abs=1e-9)
    assert judge(drive(-7.5)).progress_m[0] == 0.0


def test_states_of_another_length_are_refused() -> None:
    with pytest.raises(DataError, match=r"\[B, 41, 11\].*\(1, 40, 11\)"):
        judge(drive(10.0)[:, :40])
