"""Geometry of the generator's maps: widths, bends, continuity, drivable junctions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from rlhf_drive.scenes.geometry import (
    Array,
    Path,
    boxes_overlap,
    connect,
    contact_zone,
    path_from_points,
    points_in_polygon,
)
from rlhf_drive.scenes.junctions import crossroads, on_ramp, roundabout
from rlhf_drive.scenes.model import MapLayer
from rlhf_drive.scenes.roads import CrossSection, RoadMap, bending_road, corridor, lane_path

ARMS = [np.pi, 1.5 * np.pi, 2.0 * np.pi, 2.5 * np.pi]


def area(ring: Array) -> float:
    """Shoelace formula."""
    x, y = ring.T
    return 0.5 * abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1)))


def drivable(road: RoadMap, points: Array) -> float:
    """Share of points inside some drivable polygon."""
    inside = np.zeros(len(points), dtype=bool)
    for layer, ring in road.areas:
        if layer in (MapLayer.ROADBLOCK, MapLayer.INTERSECTION):
            inside |= points_in_polygon(points, ring)
    return float(inside.mean())


def swept(path: Path, low: float, high: float, aside: float) -> Array:
    """Points beside a path on both sides."""
    s = np.arange(low, high, 1.7)
    return np.concatenate([path.pose(s, d)[:, :2] for d in (-aside, 0.0, aside)])


def test_bend_has_its_radius_and_its_length() -> None:
    road = bending_road([(10.0, 60.0, 25.0)], -20.0, 100.0)
    middle = road.curvature[20 + 30 : 20 + 40]
    np.testing.assert_allclose(middle, 1 / 25.0, rtol=1e-6)
    # eased over 6 m at both ends, so 44 m of full curvature: 44 / 25 rad
    assert road.heading[-1] == pytest.approx(44.0 / 25.0, abs=0.02)


def test_parallel_of_a_left_bend_is_shorter_by_offset_times_angle() -> None:
    road = bending_road([(10.0, 70.0, 30.0)], 0.0, 100.0)
    inside = road.offset(4.0)
    turned = float(road.heading[-1] - road.heading[0])
    assert (road.end - road.start) - (inside.end - inside.start) == pytest.approx(4.0 * turned, abs=1.01)
    gap = np.hypot(*(inside.pose(inside.end)[:2] - road.pose(road.end, 4.0)[:2]))
    assert gap < 1.01


def test_lane_polygons_have_width_times_length() -> None:
    section = CrossSection(forward=2, backward=1, lane_width=3.4, shoulder=0.5)
    road = corridor(bending_road([], 0.0, 60.0), section, 13.9, [0.0, 20.0, 60.0])
    assert [round(area(lane.polygon), 6) for lane in road.lanes] == [68.0] * 3 + [136.0] * 3
    # forward roadblock: two lanes and a shoulder over 20 m
    assert area(road.areas[0][1]) == pytest.approx(20.0 * (2 * 3.4 + 0.5))


def test_backward_lane_runs_the_other_way_on_the_left() -> None:
    section = CrossSection(1, 1, 3.5, 0.4)
    path = lane_path(bending_road([], -50.0, 50.0), section, -1)
    pose = path.pose(10.0)
    np.testing.assert_allclose([pose[0], pose[1], np.cos(pose[2])], [-10.0, 1.75, -1.0], atol=1e-9)


def test_consecutive_lane_pieces_meet() -> None:
    section = CrossSection(2, 2, 3.4, 0.4)
    road = corridor(bending_road([(0.0, 40.0, 30.0)], -60.0, 120.0), section, 11.1, [-50.0, -10.0, 45.0, 90.0])
    for lane in range(4):
        pieces = [road.lanes[lane + 4 * k] for k in range(3)]
        pieces = pieces[::-1] if lane < 2 else pieces
        for before, after in itertools.pairwise(pieces):
            np.testing.assert_allclose(before.center[-1], after.center[0], atol=1e-9)
            np.testing.assert_allclose(before.left[-1], after.left[0], atol=1e-9)


def test_every_way_over_the_crossroads_is_drivable_and_drivable_by_a_car() -> None:
    section = CrossSection(2, 2, 3.4, 0.4)
    junction = crossroads(ARMS, section, corner=6.0, limit=11.1, route=3, signals=True)
    for (a, b), lanes in junction.curves.items():
        for lane in lanes:
            way = junction.way(a, b, lane)
            assert drivable(junction.map, swept(way, -40.0, junction.length(a, b) + 40.0, 1.2)) == 1.0
            assert np.abs(way.curvature).max() < 1 / 6.0
            assert np.hypot(*np.diff(way.xy, axis=0).T).max() < 1.01


def test_lights_govern_opposite_arms_together() -> None:
    junction = crossroads(ARMS, CrossSection(1, 1, 3.4, 0.4), corner=6.0, limit=11.1, route=2, signals=True)
    connectors = [lane for lane in junction.map.lanes if lane.connector]
    assert sorted(lane.signal for lane in connectors) == [0] * 6 + [1] * 6
    for lane in connectors:
        direction = lane.center[1] - lane.center[0]
        assert lane.signal == int(abs(direction[1]) > abs(direction[0]))
    assert sum(lane.on_route for lane in connectors) == 1


def test_roundabout_is_driven_counter_clockwise_around_its_island() -> None:
    junction = roundabout(ARMS, CrossSection(1, 1, 3.5, 0.5), radius=16.0, limit=8.3, route=2)
    way = junction.way(0, 2)
    s = np.arange(0.0, junction.length(0, 2), 1.0)
    points = way.pose(s)
    assert np.hypot(points[:, 0], points[:, 1]).min() == pytest.approx(16.0, abs=0.3)
    angle = np.unwrap(np.arctan2(points[:, 1], points[:, 0]))
    assert angle[-1] - angle[0] == pytest.approx(np.pi, abs=0.2)
    assert drivable(junction.map, np.zeros((1, 2))) == 0.0
    for a, b in ((0, 1), (0, 2), (0, 3), (3, 1)):
        assert drivable(junction.map, swept(junction.way(a, b), -30.0, junction.length(a, b) + 30.0, 1.3)) == 1.0


def test_ramp_becomes_the_right_main_lane() -> None:
    reference = bending_road([(-40.0, 90.0, 250.0)], -140.0, 210.0)
    section = CrossSection(2, 0, 3.6, 0.4)
    ways = on_ramp(reference, section, begin=-30.0, end=60.0, apart=10.0, limit=19.4, ego_on_ramp=True)
    beyond = ways.ramp.pose(ways.end + np.arange(0.0, 60.0, 10.0))
    assert max(abs(ways.main[-1].nearest(p[:2])[1]) for p in beyond) < 0.05
    assert abs(ways.main[-1].nearest(ways.ramp.pose(ways.gore - 60.0)[:2])[1]) == pytest.approx(10.0, abs=0.1)
    assert drivable(ways.map, swept(ways.ramp, ways.gore - 60.0, ways.end + 40.0, 1.6)) == 1.0


def test_route_of_a_ramp_leaves_out_the_main_road_before_it() -> None:
    reference = bending_road([], -140.0, 210.0)
    section = CrossSection(1, 0, 3.6, 0.4)
    ways = on_ramp(reference, section, begin=-30.0, end=60.0, apart=10.0, limit=19.4, ego_on_ramp=True)
    main = [lane for lane in ways.map.lanes if abs(lane.center[0][1] + 1.8) < 1e-6 and not lane.connector]
    assert [lane.on_route for lane in main] == sorted(lane.on_route for lane in main)
    assert {lane.on_route for lane in main} == {False, True}


def test_connect_turns_ninety_degrees_almost_in_an_arc() -> None:
    curve = connect(np.array([0.0, 0.0, 0.0]), np.array([10.0, 10.0, 0.5 * np.pi]))
    assert np.abs(np.hypot(curve[:, 0], curve[:, 1] - 10.0) - 10.0).max() < 0.05


def test_contact_zone_of_two_crossing_lanes() -> None:
    east = path_from_points(np.array([[-50.0, 0.0], [50.0, 0.0]]), -50.0)
    north = path_from_points(np.array([[0.0, -40.0], [0.0, 40.0]]), -40.0)
    # vertices every 2 m within 5 m of the other line: -4 ... 4 on both
    assert contact_zone(east, north, 5.0) == (-4.0, 4.0, -4.0, 4.0)
    assert contact_zone(east, path_from_points(np.array([[-50.0, 9.0], [50.0, 9.0]])), 5.0) is None


def test_boxes_overlap_by_separating_axes() -> None:
    size = np.array([4.0, 2.0])
    here = np.zeros(3)
    # the last one is apart only along its own axis: 6.4 / sqrt 2 = 4.53 > 2 + 3 / sqrt 2 = 4.12
    others = np.array([[3.9, 0, 0], [4.1, 0, 0], [0, 2.1, 0], [0, 2.9, 0.5 * np.pi], [3.8, 2.6, 0.25 * np.pi]])
    np.testing.assert_array_equal(boxes_overlap(here, size, others, size), [True, False, False, True, False])
