"""Rules of areas, driving direction, lane keeping, lights and progress that are easy to get nearly right."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from oracles.judge import judge
from oracles.straight_road import straight_road
from oracles.tiny_scene import REAR_M, ROAD, ROUTE_LANE, TWO_LANES, Polygon, rectangle, straight_states

from rewards.kernels.boxes import EGO_HALF_LENGTH_M, REAR_AXLE_TO_CENTER_M
from rewards.kernels.lanes import MULTIPLE_LANES, NON_DRIVABLE, ONCOMING
from rewards.kernels.score import V1_RULES, V2_RULES, ScoreRules, score_states
from rewards.prepare import prepare_agents, prepare_road
from rlhf_drive.scenes import MapLayer

VERSIONS = pytest.mark.parametrize("rules", [V1_RULES, V2_RULES], ids=["v1", "v2"])


def turning_on_the_spot(step_rad: float) -> np.ndarray:
    """States whose rear axle stays at the origin while the heading grows by `step_rad` a step."""
    states = straight_states(0.0)
    states[0, :, 2] = step_rad * np.arange(41)
    return states


@VERSIONS
def test_a_connector_outside_every_drivable_layer_is_off_the_road(rules: ScoreRules) -> None:
    """Lanes and connectors are no ground to drive on, though NAVSIM names them among the map's layers."""
    lanes: list[Polygon] = [ROUTE_LANE, (MapLayer.LANE_CONNECTOR, True, rectangle(-50, 150, -3, 3))]
    assert judge(polygons=lanes, rules=rules).dac[0] == 0.0
    assert judge(polygons=[*lanes, ROAD], rules=rules).dac[0] == 1.0


@VERSIONS
def test_a_corner_on_a_shared_edge_is_off_the_road(rules: ScoreRules) -> None:
    """Strict containment, polygon by polygon: two roads that meet at the front bumper leave the corners on neither.

    The frame is the world's, so that the edge is exactly where the bumper is; a hair beside it does no harm.
    """
    bumper = REAR_AXLE_TO_CENTER_M + EGO_HALF_LENGTH_M
    for x, expected in ((bumper - 1e-9, 1.0), (bumper, 0.0), (bumper + 1e-9, 1.0)):
        behind, ahead = rectangle(-50, x, -5, 5), rectangle(x, 150, -5, 5)
        roads = replace(
            straight_road(),
            map_xy=np.array([*behind, *ahead]),
            map_layer=np.array([MapLayer.ROADBLOCK, MapLayer.ROADBLOCK]),
        )
        nobody = prepare_agents(
            roads.agent_pose, roads.agent_velocity, roads.agent_valid, roads.agent_size, roads.agent_type, np.zeros(3)
        )
        assert score_states(prepare_road(roads), nobody, straight_states(0.0), rules=rules).dac[0] == expected


@VERSIONS
def test_multiple_lanes_counts_connectors_and_lanes_off_the_route(rules: ScoreRules) -> None:
    """Straddling a route lane and a connector off it, and straddling two segments of one lane."""
    side: Polygon = (MapLayer.LANE_CONNECTOR, False, rectangle(-50, 150, 2, 6))
    areas = judge(states=straight_states(5.0, y=1.5), polygons=[ROUTE_LANE, side, ROAD], rules=rules).areas[0]
    assert (areas & MULTIPLE_LANES).all()
    # An intersection or a car park is no lane: one lane alone remains.
    park: Polygon = (MapLayer.CARPARK_AREA, False, rectangle(-50, 150, 2, 6))
    areas = judge(states=straight_states(5.0, y=1.5), polygons=[ROUTE_LANE, park, ROAD], rules=rules).areas[0]
    assert not (areas & MULTIPLE_LANES).any()


@VERSIONS
def test_oncoming_means_off_the_route_not_off_every_lane(rules: ScoreRules) -> None:
    """The box centre in a lane off the route (2 < y < 6), in a car park, and outside everything."""
    park: Polygon = (MapLayer.CARPARK_AREA, True, rectangle(-50, 150, 8, 12))
    for y, oncoming in ((0.0, False), (4.0, True), (10.0, True), (30.0, True)):
        areas = judge(states=straight_states(5.0, y=y), polygons=[*TWO_LANES, park], rules=rules).areas[0]
        assert bool((areas & ONCOMING).all()) == oncoming


@VERSIONS
def test_the_route_is_asked_for_the_box_centre(rules: ScoreRules) -> None:
    """A route lane that ends at 1 m holds the rear axle at 0 but not the centre at 1.461."""
    short: Polygon = (MapLayer.LANE, True, rectangle(-50, 1.0, -2, 2))
    areas = judge(states=straight_states(0.0), polygons=[short, ROAD], rules=rules).areas[0]
    assert (areas & ONCOMING).all()


@VERSIONS
@pytest.mark.parametrize(("step_rad", "expected"), [(0.12, 1.0), (0.13, 0.5)])
def test_direction_measures_the_way_of_the_box_centre(rules: ScoreRules, step_rad: float, expected: float) -> None:
    """Turning on the spot moves the centre by the chord 2 * 1.461 * sin(d / 2), eleven times within the window.

    d = 0.12: 11 * 0.17522 = 1.927 m < 2; d = 0.13: 11 * 0.18980 = 2.088 m. The rear axle does not move at all.
    """
    assert 11 * 2 * REAR_AXLE_TO_CENTER_M * math.sin(step_rad / 2) == pytest.approx(
        1.927 if expected == 1.0 else 2.088, abs=1e-3
    )
    off_route: list[Polygon] = [(MapLayer.LANE, False, rectangle(-50, 150, -20, 20)), ROAD]
    assert judge(states=turning_on_the_spot(step_rad), polygons=off_route, rules=rules).ddc[0] == expected


@VERSIONS
def test_direction_asks_where_a_step_ends(rules: ScoreRules) -> None:
    """A step of 3 m that ends off the route counts; the step that leads back, just as long, does not."""
    states = straight_states(0.0)
    states[0, 20:, 1] = 3.0
    assert judge(states=states, rules=rules).ddc[0] == 0.5
    back = straight_states(0.0, y=3.0)
    back[0, 20:, 1] = 0.0
    assert judge(states=back, rules=rules).ddc[0] == 1.0


@VERSIONS
def test_direction_sums_within_a_second_not_over_the_drive(rules: ScoreRules) -> None:
    """1.5 m off the route at step 5 and at step 25: 3 m in all, never more than 1.5 m within eleven steps."""
    states = straight_states(0.0, y=4.0)
    states[0, 5:, 0] += 1.5
    states[0, 25:, 0] += 1.5
    assert judge(states=states, rules=rules).ddc[0] == 1.0
    states[0, 15:25, 0] += 1.5  # steps 5 and 15 are within eleven steps: 3 m
    assert judge(states=states, rules=rules).ddc[0] == 0.5


@pytest.mark.parametrize(("steps", "expected"), [(19, 1.0), (20, 0.0)])
def test_lane_keeping_is_about_the_box_centre(steps: int, expected: float) -> None:
    """Turned by asin(0.6 / 1.461) = 24 deg on the spot: the rear axle is on the centreline, the centre 0.6 m off."""
    states = straight_states(0.0)
    states[0, 1 : 1 + steps, 2] = math.asin(0.6 / REAR_AXLE_TO_CENTER_M)
    assert judge(states=states, rules=V2_RULES).lk[0] == expected


def test_lane_keeping_starts_anew_after_one_good_step() -> None:
    """19 + 19 steps off the centreline with a step on it between."""
    states = straight_states(10.0)
    states[0, 1:40, 1] = 0.6
    assert judge(states=states, rules=V2_RULES).lk[0] == 0.0
    states[0, 20, 1] = 0.0
    assert judge(states=states, rules=V2_RULES).lk[0] == 1.0


@pytest.mark.parametrize(("y", "expected"), [(0.4999, 1.0), (0.5001, 0.0)])
def test_lane_keeping_allows_half_a_metre_to_either_side(y: float, expected: float) -> None:
    for side in (y, -y):
        assert judge(states=straight_states(10.0, y=side), rules=V2_RULES).lk[0] == expected


@pytest.mark.parametrize(("before", "after", "expected"), [(10, 9, 1.0), (10, 10, 0.0), (19, 1, 0.0)])
def test_lane_keeping_pauses_in_an_intersection(before: int, after: int, expected: float) -> None:
    """`before` steps off the centreline, six within an intersection (on it or off it), `after` steps off again.

    The six neither count nor reset. The ego steps 1 m each time, so a patch from a to a + 6 around the centres of
    steps k = before + 1 … before + 6 (x = k + 1.461) holds exactly these.
    """
    patch: Polygon = (MapLayer.INTERSECTION, False, rectangle(before + 2.0, before + 8.0, -1.0, 1.0))
    for inside_y in (0.0, 0.6):
        states = straight_states(10.0)
        states[0, 1 : before + 1, 1] = 0.6
        states[0, before + 1 : before + 7, 1] = inside_y
        states[0, before + 7 : before + 7 + after, 1] = 0.6
        assert judge(states=states, polygons=[*TWO_LANES, patch], rules=V2_RULES).lk[0] == expected


def test_a_red_light_is_crossed_by_any_part_of_the_box() -> None:
    """Standing at the origin, the box reaches from -1.127 to 4.049: a connector behind the rear axle counts too."""
    for x0, x1, expected in ((4.048, 9.0, 0.0), (4.050, 9.0, 1.0), (-9.0, -REAR_M + 1e-3, 0.0), (-9.0, -1.128, 1.0)):
        red = [rectangle(x0, x1, -1.0, 1.0)]
        assert judge(states=straight_states(0.0), red=red, rules=V2_RULES).tlc[0] == expected


@VERSIONS
def test_progress_is_that_of_the_box_centre(rules: ScoreRules) -> None:
    """After 30 m the ego stands across the road: its centre is at 30, no longer 1.461 m ahead of the rear axle."""
    states = straight_states(7.5)
    states[0, 40, 2] = np.pi / 2
    assert judge(states=states, rules=rules).progress_m[0] == pytest.approx(30.0 - REAR_AXLE_TO_CENTER_M, abs=1e-9)


@VERSIONS
def test_progress_is_from_end_to_end(rules: ScoreRules) -> None:
    """Forwards by 20 m and back by 10 counts 10; backwards counts nothing."""
    states = straight_states(10.0)
    states[0, 20:, 0] = 20.0 - 0.5 * np.arange(21)
    assert judge(states=states, rules=rules).progress_m[0] == pytest.approx(10.0, abs=1e-9)


@VERSIONS
def test_off_the_road_at_the_start_counts(rules: ScoreRules) -> None:
    """All 41 states are judged, that of t=0 included."""
    states = straight_states(10.0)
    states[0, 0, 1] = 50.0
    metrics = judge(states=states, rules=rules)
    assert np.flatnonzero(metrics.areas[0] & NON_DRIVABLE).tolist() == [0]
    assert metrics.dac[0] == 0.0
