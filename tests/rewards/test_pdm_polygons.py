"""Polygon geometry of the planner against shapely and against cases worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import shapely
from numpy.typing import NDArray

from rewards.pdm_polygons import box_corners, point_in_rings, polygon_centroid, polygon_distance, polygons_intersect

SQUARE = np.array([[0.0, 0.0], [2.0, 0.0], [2.0, 2.0], [0.0, 2.0]])
WHOLE = np.array([0, 4])


def star(rng: np.random.Generator) -> NDArray[np.float64]:
    """A simple, mostly concave polygon: random radii at rising angles."""
    angles = np.sort(rng.uniform(0.0, 2.0 * np.pi, 7))
    radii = rng.uniform(0.5, 3.0, 7)
    ring = np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)
    return ring + rng.uniform(-3.0, 3.0, 2)


def test_intersection_and_distance_agree_with_shapely() -> None:
    rng = np.random.default_rng(7)
    met = 0
    for _ in range(400):
        first, second = star(rng), star(rng)
        a, b = shapely.Polygon(first), shapely.Polygon(second)
        if not (a.is_valid and b.is_valid):
            continue
        touches = a.intersects(b)
        met += touches
        assert polygons_intersect(first, second, np.array([0, 7])) == touches
        assert polygon_distance(first, second) == pytest.approx(a.distance(b), abs=1e-12)
        assert polygon_centroid(first) == pytest.approx((a.centroid.x, a.centroid.y), abs=1e-9)
    assert 50 < met < 350


@pytest.mark.parametrize(
    ("shift", "touches"),
    [((2.0, 0.0), True), ((2.0, 2.0), True), ((2.0 + 1e-9, 0.0), False), ((0.5, 0.5), True)],
    ids=["shared edge", "shared corner", "apart", "overlap"],
)
def test_touching_counts_as_intersecting(shift: tuple[float, float], touches: bool) -> None:
    assert polygons_intersect(SQUARE + shift, SQUARE, WHOLE) is touches


def test_a_polygon_inside_another_intersects_it_either_way() -> None:
    small = SQUARE * 0.1 + 0.5
    assert polygons_intersect(small, SQUARE, WHOLE)
    assert polygons_intersect(SQUARE, small, WHOLE)
    assert polygon_distance(small, SQUARE) == 0.0


def test_a_region_is_only_the_rings_it_names() -> None:
    # Two squares in one vertex array; the region is the second. A shape around the first is not in it.
    vertices = np.concatenate([SQUARE, SQUARE + 10.0])
    around_the_first = (SQUARE - 1.0) * 2.0 + 1.0
    assert not polygons_intersect(around_the_first, vertices, np.array([4, 8]))
    assert polygons_intersect(around_the_first, vertices, np.array([0, 4]))


def test_a_hole_is_outside() -> None:
    vertices = np.concatenate([SQUARE * 5.0, SQUARE + 4.0])  # 10 x 10 with a hole from 4 to 6
    rings = np.array([0, 4, 8])
    assert not point_in_rings(5.0, 5.0, vertices, rings)
    assert point_in_rings(3.0, 5.0, vertices, rings)
    assert not polygons_intersect(SQUARE * 0.25 + 4.75, vertices, rings)


def test_distance_is_between_an_edge_and_a_corner() -> None:
    # A square turned by 45 degrees: its corner at (3, 1) faces the edge x = 2, 1 m away.
    diamond = np.array([[3.0, 1.0], [4.0, 0.0], [5.0, 1.0], [4.0, 2.0]])
    assert polygon_distance(SQUARE, diamond) == pytest.approx(1.0, abs=1e-15)
    assert polygon_distance(diamond, SQUARE) == pytest.approx(1.0, abs=1e-15)


def test_corners_run_front_left_to_front_right() -> None:
    # Heading +y: the front is up, the left is towards -x.
    expected = [[9.0, 22.0], [9.0, 18.0], [11.0, 18.0], [11.0, 22.0]]
    np.testing.assert_allclose(box_corners(10.0, 20.0, np.pi / 2, 2.0, 1.0), expected, atol=1e-12)
