"""Boxes, polygons and polylines against shapely and against points on the boundary."""

from __future__ import annotations

import math

import numpy as np
import pytest
import shapely
from shapely.affinity import rotate, translate

from rewards.kernels.boxes import boxes_touch, segment_touches_box
from rewards.kernels.polygons import build_polygon_index, locate, polygon_touches_box
from rewards.kernels.progress import arclengths, project


def shapely_box(x: float, y: float, angle: float, hl: float, hw: float) -> shapely.Polygon:
    return translate(rotate(shapely.box(-hl, -hw, hl, hw), angle, origin=(0, 0), use_radians=True), x, y)


def star(rng: np.random.Generator, vertices: int, centre: np.ndarray, size: float) -> np.ndarray:
    angle = np.sort(rng.uniform(0, 2 * np.pi, vertices))
    radius = size * rng.uniform(0.3, 1.0, vertices)
    return centre + np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def containing(polygons: list[np.ndarray], points: np.ndarray) -> list[set[int]]:
    offsets = np.cumsum([0, *(len(p) for p in polygons)])
    index = build_polygon_index(np.concatenate(polygons), offsets, np.zeros(len(polygons), dtype=np.uint8))
    found = np.empty((len(points), index.depth), dtype=np.int64)
    count = np.empty(len(points), dtype=np.int64)
    locate(index, np.asarray(points, dtype=np.float64), found, count)
    return [set(found[m, : count[m]].tolist()) for m in range(len(points))]


def test_box_contact_equals_shapely() -> None:
    rng = np.random.default_rng(1)
    touched = 0
    for _ in range(500):
        (x, y), a, b = rng.uniform(-5, 5, 2), *rng.uniform(-4, 4, 2)
        (l1, w1), (l2, w2) = rng.uniform(0.2, 3, (2, 2))
        expected = shapely_box(0, 0, a, l1, w1).intersects(shapely_box(x, y, b, l2, w2))
        got = boxes_touch(0, 0, math.cos(a), math.sin(a), l1, w1, x, y, math.cos(b), math.sin(b), l2, w2)
        assert got == expected
        touched += expected
    assert 100 < touched < 400


def test_touching_boxes_count_and_a_gap_does_not() -> None:
    assert boxes_touch(0, 0, 1, 0, 2, 1, 4, 0, 1, 0, 2, 1)
    assert not boxes_touch(0, 0, 1, 0, 2, 1, 4 + 1e-9, 0, 1, 0, 2, 1)
    assert boxes_touch(0, 0, 1, 0, 2, 1, 4, 2, 1, 0, 2, 1)


def test_segment_contact_equals_shapely() -> None:
    rng = np.random.default_rng(2)
    for _ in range(500):
        ax, ay, bx, by = rng.uniform(-4, 4, 4)
        angle, hl, hw = rng.uniform(-3, 3), *rng.uniform(0.2, 2, 2)
        expected = shapely_box(0.5, -0.5, angle, hl, hw).intersects(shapely.LineString([(ax, ay), (bx, by)]))
        assert segment_touches_box(ax, ay, bx, by, 0.5, -0.5, math.cos(angle), math.sin(angle), hl, hw) == expected


def test_located_polygons_equal_shapely_containment() -> None:
    rng = np.random.default_rng(3)
    polygons = [star(rng, int(rng.integers(3, 60)), rng.uniform(-40, 40, 2), rng.uniform(1, 40)) for _ in range(25)]
    points = rng.uniform(-60, 60, (4000, 2))
    shapes = [shapely.Polygon(p) for p in polygons]
    got = containing(polygons, points)
    for point, inside in zip(points, got, strict=True):
        assert inside == {p for p, shape in enumerate(shapes) if shape.contains(shapely.Point(point))}
    assert sum(map(len, got)) > 1000


def test_points_on_edges_and_corners_are_outside() -> None:
    square = np.array([[0.0, 0.0], [4.0, 0.0], [4.0, 4.0], [0.0, 4.0]])
    diamond = np.array([[10.0, -2.0], [12.0, 0.0], [10.0, 2.0], [8.0, 0.0]])
    neighbour = square + np.array([4.0, 0.0])
    clockwise = diamond[::-1]
    points = np.array(
        [[4, 1], [2, 0], [2, 4], [0, 2], [4, 4], [0, 0], [11, 1], [9, -1], [9, 1], [11, -1], [2, 2], [10, 0]]
    )
    assert containing([square, diamond, neighbour, clockwise], points) == [set()] * 10 + [{0}, {1, 3}]


def test_ray_through_a_vertex_is_counted_once() -> None:
    diamond = np.array([[10.0, -2.0], [12.0, 0.0], [10.0, 2.0], [8.0, 0.0]])
    assert containing([diamond], np.array([[7.0, 0.0], [9.0, 0.0], [13.0, 0.0]])) == [set(), {0}, set()]


def test_degenerate_polygons_and_points_contain_nothing() -> None:
    square = np.array([[0.0, 0.0], [4.0, 0.0], [4.0, 4.0], [0.0, 4.0]])
    line, flat, empty = square[:2], np.array([[0.0, 1.0], [2.0, 1.0], [4.0, 1.0]]), np.zeros((0, 2))
    points = np.array([[1.0, 1.0], [np.nan, 1.0], [1e300, 0.0], [-np.inf, 2.0]])
    assert containing([line, flat, empty, square], points) == [{3}, set(), set(), set()]
    assert containing([line], np.array([[1.0, 0.0]])) == [set()]


def test_polygon_contact_equals_shapely() -> None:
    rng = np.random.default_rng(4)
    touched = 0
    for _ in range(300):
        polygon = star(rng, int(rng.integers(3, 12)), rng.uniform(-8, 8, 2), rng.uniform(1, 9))
        angle = rng.uniform(-3, 3)
        expected = shapely.Polygon(polygon).intersects(shapely_box(0, 0, angle, 2.588, 1.1485))
        assert polygon_touches_box(polygon, 0, 0, math.cos(angle), math.sin(angle), 2.588, 1.1485) == expected
        touched += expected
    assert 60 < touched < 270


def test_box_inside_a_polygon_touches_it() -> None:
    square = 10.0 * np.array([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])
    assert polygon_touches_box(square, 0, 0, 1, 0, 2, 1)
    assert not polygon_touches_box(square, 13, 0, 1, 0, 2, 1)


def test_projection_equals_shapely() -> None:
    rng = np.random.default_rng(5)
    line = np.cumsum(rng.normal(0, 3, (30, 2)), axis=0)
    length = arclengths(line)
    shape = shapely.LineString(line)
    for point in rng.uniform(line.min(0) - 5, line.max(0) + 5, (200, 2)):
        along, distance = project(line, length, *point)
        assert along == pytest.approx(shape.line_locate_point(shapely.Point(point)), abs=1e-9)
        assert distance == pytest.approx(shape.distance(shapely.Point(point)), abs=1e-9)


def test_projection_clamps_and_prefers_the_first_of_equal_segments() -> None:
    line = np.array([[0.0, 0.0], [10.0, 0.0], [10.0, 0.0], [10.0, 10.0], [0.0, 10.0], [0.0, -5.0]])
    length = arclengths(line)
    assert project(line, length, -3.0, 0.0) == (0.0, 3.0)
    assert project(line, length, 0.0, 0.0) == (0.0, 0.0)
    assert project(line, length, 0.0, 1.0) == (39.0, 0.0)
    assert project(line, length, 0.0, -9.0) == (45.0, 4.0)
