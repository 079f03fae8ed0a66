"""Polygons and boxes that are not as they should be: scored as shapely's predicates have it.

NAVSIM asks GEOS for containment and for intersection and repairs nothing. GEOS answers by the even-odd rule and by
edges, also for polygons it calls invalid, and so do the kernels. Equality is promised up to rounding alone: where a
point is on an edge in exact arithmetic but not in doubles (or the other way round), GEOS decides with more digits.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import shapely
from oracles.judge import judge
from oracles.tiny_scene import ROAD, ROUTE_LANE, TWO_LANES, Agent, Polygon, straight_states

from rewards.kernels.boxes import boxes_touch
from rewards.kernels.lanes import MULTIPLE_LANES, NON_DRIVABLE
from rewards.kernels.polygons import build_polygon_index, locate, polygon_touches_box
from rewards.kernels.score import V1_RULES, V2_RULES
from rlhf_drive.scenes import MapLayer

STAR = 10.0 * np.array([[math.cos(0.8 * math.pi * k), math.sin(0.8 * math.pi * k)] for k in range(5)])
"""A pentagram: the pentagon in its middle is surrounded twice."""
SQUARE = np.array([[0.0, 0.0], [10.0, 0.0], [10.0, 10.0], [0.0, 10.0]])
SHAPES = {
    "pentagram": STAR,
    "bow tie": SQUARE[[0, 2, 1, 3]],
    "twice around": np.concatenate([SQUARE, SQUARE]),
    "there and back": np.concatenate([SQUARE, SQUARE[::-1]]),
    "closed": np.concatenate([SQUARE, SQUARE[:1]]),
    "repeated vertices": np.repeat(SQUARE, 3, axis=0),
    "spike": np.insert(SQUARE, 3, [[5.0, 10.0], [5.0, 15.0], [5.0, 10.0]], axis=0),
    "figure of eight through a corner": np.array([[0.0, 0.0], [5, 5], [10, 0], [10, 10], [5, 5], [0, 10]]),
    "flat": np.array([[0.0, 0.0], [5.0, 0.0], [10.0, 0.0]]),
    "one point": np.full((3, 2), 3.0),
}


def random_shapes(seed: int, count: int = 12) -> list[np.ndarray]:
    """Random closed lines, half of them on whole metres: mostly self-intersecting, edges overlap and corners meet."""
    rng = np.random.default_rng(seed)
    shapes = [rng.uniform(0.0, 10.0, (int(rng.integers(3, 9)), 2)) for _ in range(count)]
    return [np.round(xy) if i % 2 else xy for i, xy in enumerate(shapes)]


def points_around(xy: np.ndarray, seed: int) -> np.ndarray:
    """Random points, whole metres, vertices, and middles of edges where these are exact."""
    whole = np.stack(np.meshgrid(np.arange(-1.0, 12.0), np.arange(-1.0, 12.0)), axis=-1).reshape(-1, 2)
    middles = (xy + np.roll(xy, 1, axis=0)) / 2.0
    exact = middles if (xy == np.round(xy)).all() else middles[:0]
    return np.concatenate([np.random.default_rng(seed).uniform(-11.0, 16.0, (300, 2)), whole, xy, exact])


def containing(polygons: list[np.ndarray], points: np.ndarray) -> list[set[int]]:
    """Polygons that contain each point, as the index finds them."""
    offsets = np.cumsum([0, *(len(xy) for xy in polygons)])
    index = build_polygon_index(np.concatenate(polygons), offsets, np.zeros(len(polygons), dtype=np.uint8))
    found = np.empty((len(points), index.depth), dtype=np.int64)
    count = np.empty(len(points), dtype=np.int64)
    locate(index, points, found, count)
    return [set(found[m, : count[m]].tolist()) for m in range(len(points))]


def assert_contained_as_by_shapely(polygons: list[np.ndarray], points: np.ndarray) -> None:
    inside = np.stack([shapely.contains_xy(shapely.Polygon(xy), points[:, 0], points[:, 1]) for xy in polygons])
    assert containing(polygons, points) == [set(np.flatnonzero(column).tolist()) for column in inside.T]


@pytest.mark.parametrize("name", SHAPES)
def test_containment_in_odd_polygons_equals_shapely(name: str) -> None:
    xy = np.asarray(SHAPES[name], dtype=np.float64)
    assert_contained_as_by_shapely([xy], points_around(xy, 0))
    assert_contained_as_by_shapely([xy[::-1]], points_around(xy, 1))


@pytest.mark.parametrize("seed", range(8))
def test_containment_in_random_polygons_equals_shapely(seed: int) -> None:
    """All in one index, where cells and slabs are shared; the shapes are mostly invalid to GEOS."""
    shapes = random_shapes(seed)
    assert sum(not shapely.Polygon(xy).is_valid for xy in shapes) >= 4
    for xy in shapes:
        assert_contained_as_by_shapely(shapes, points_around(xy, seed))


def test_the_middle_of_a_pentagram_is_outside_and_its_tips_are_inside() -> None:
    """Even-odd: the middle is surrounded twice. The tip at (10, 0) is thin, its axis is inside."""
    assert containing([STAR], np.array([[0.0, 0.0], [8.0, 0.0]])) == [set(), {0}]


@pytest.mark.parametrize("name", [*SHAPES, "random"])
def test_a_box_meets_an_odd_polygon_where_shapely_says_so(name: str) -> None:
    """Red connectors; boxes of the ego's size and small ones that fit into a polygon or into its hole."""
    rng = np.random.default_rng(3)
    met = 0
    for xy in random_shapes(5) if name == "random" else [np.asarray(SHAPES[name], dtype=np.float64)]:
        polygon = shapely.Polygon(xy)
        for k in range(60):
            x, y = np.round(rng.uniform(-6.0, 14.0, 2)) if k % 3 == 0 else rng.uniform(-6.0, 14.0, 2)
            angle = 0.0 if k % 3 == 0 else rng.uniform(-3.0, 3.0)
            half = [(2.588, 1.1485), (0.3, 0.2), (2.0, 1.0)][k % 3 - 1]
            box = shapely.Polygon(corners(x, y, angle, *half))
            got = polygon_touches_box(xy, x, y, math.cos(angle), math.sin(angle), *half)
            assert got == polygon.intersects(box)
            met += got
    assert met > 0


def corners(x: float, y: float, angle: float, half_length: float, half_width: float) -> np.ndarray:
    """``[4, 2]`` of a box."""
    local = np.array([[1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]]) * (half_length, half_width)
    cos, sin = math.cos(angle), math.sin(angle)
    return np.asarray(local @ np.array([[cos, sin], [-sin, cos]]) + (x, y))


@pytest.mark.parametrize("size", [(0.0, 0.0), (3.0, 0.0), (0.0, 2.0)], ids=["point", "length only", "width only"])
def test_boxes_of_no_size_are_met_where_shapely_says_so(size: tuple[float, float]) -> None:
    rng = np.random.default_rng(4)
    ego = shapely.Polygon(corners(0.0, 0.0, 0.3, 2.588, 1.1485))
    met = 0
    for x, y, angle in rng.uniform(-4.0, 4.0, (300, 3)):
        outline = shapely.Polygon(corners(x, y, angle, size[0] / 2, size[1] / 2))
        got = boxes_touch(
            0.0, 0.0, math.cos(0.3), math.sin(0.3), 2.588, 1.1485,
            x, y, math.cos(angle), math.sin(angle), size[0] / 2, size[1] / 2,
        )  # fmt: skip
        assert got == ego.intersects(outline)
        assert (outline.centroid.x, outline.centroid.y) == pytest.approx((x, y), abs=1e-9)
        met += got
    assert 30 < met < 270


def test_a_self_intersecting_road_is_off_the_road_in_its_middle() -> None:
    """A road block that winds twice around the ego: even-odd, so the ego stands in a hole, as GEOS has it."""
    twice: list[tuple[float, float]] = [(-50, -6), (150, -6), (150, 6), (-50, 6)] * 2
    blocks: list[Polygon] = [ROUTE_LANE, (MapLayer.ROADBLOCK, False, twice)]
    assert not shapely.Polygon(twice).contains(shapely.Point(0.0, 0.0))
    assert judge(polygons=blocks).dac[0] == 0.0
    assert judge(polygons=[*blocks, ROAD]).dac[0] == 1.0


def test_a_duplicated_lane_counts_twice() -> None:
    """NAVSIM counts polygons: a lane that is there twice is 'multiple lanes' for an ego half outside it."""
    states = straight_states(5.0, y=1.5)
    alone = judge(states=states, polygons=[ROUTE_LANE, ROAD]).areas[0]
    twice = judge(states=states, polygons=[ROUTE_LANE, ROUTE_LANE, ROAD]).areas[0]
    assert not (alone & MULTIPLE_LANES).any()
    assert (twice & MULTIPLE_LANES).all()
    inside = judge(states=straight_states(5.0), polygons=[ROUTE_LANE, ROUTE_LANE, ROAD, ROAD]).areas[0]
    assert not (inside & (MULTIPLE_LANES | NON_DRIVABLE)).any()


def test_polygons_without_area_change_nothing() -> None:
    """Two points, a line, one point: they contain nothing and are no lane. GEOS would not even build the first."""
    bad: list[Polygon] = [
        (MapLayer.LANE, True, [(0.0, 3.0), (9.0, 3.0)]),
        (MapLayer.LANE, True, [(0.0, 0.0), (5.0, 0.0), (9.0, 0.0)]),
        (MapLayer.INTERSECTION, False, [(3.0, 0.0)] * 4),
        (MapLayer.INTERSECTION, False, []),
    ]
    for states in (straight_states(10.0), straight_states(10.0, y=1.5)):
        for rules in (V1_RULES, V2_RULES):
            got = judge(Agent(x=60.0), states=states, polygons=[*bad, *TWO_LANES], rules=rules)
            expected = judge(Agent(x=60.0), states=states, polygons=TWO_LANES, rules=rules)
            np.testing.assert_array_equal(got.areas, expected.areas)
            assert (got.nc, got.ttc, got.ddc, got.lk) == (expected.nc, expected.ttc, expected.ddc, expected.lk)
