"""The order of the spatial index against GEOS' own tree."""

from __future__ import annotations

import numpy as np
import pytest
import shapely

from rewards.pdm_index_order import index_order


@pytest.mark.parametrize("count", [1, 2, 10, 11, 37, 100, 101, 135, 1234])
@pytest.mark.parametrize("heading", [0.0, 2.2])
def test_all_shapes_come_in_the_order_of_the_tree(count: int, heading: float) -> None:
    rng = np.random.default_rng(count)
    sizes = rng.integers(3, 6, count)
    offsets = np.cumsum([0, *sizes])
    vertices = np.concatenate([rng.uniform(-80.0, 80.0, 2) + rng.uniform(-3.0, 3.0, (size, 2)) for size in sizes])
    cos, sin = np.cos(heading), np.sin(heading)
    world = vertices @ np.array([[cos, sin], [-sin, cos]])
    tree = shapely.STRtree([shapely.Polygon(ring) for ring in np.split(world, offsets[1:-1])])
    everywhere = shapely.box(-200.0, -200.0, 200.0, 200.0)
    np.testing.assert_array_equal(index_order(vertices, offsets, heading), tree.query(everywhere))


def test_a_query_keeps_the_order_of_the_whole() -> None:
    rng = np.random.default_rng(5)
    centres = rng.uniform(-80.0, 80.0, (120, 2))
    vertices = (centres[:, None] + [[-1, -1], [1, -1], [1, 1], [-1, 1]]).reshape(-1, 2)
    tree = shapely.STRtree([shapely.Polygon(ring) for ring in vertices.reshape(-1, 4, 2)])
    found = tree.query(shapely.box(-30.0, -30.0, 40.0, 40.0), predicate="intersects")
    order = index_order(vertices, np.arange(0, 481, 4), 0.0)
    assert 20 < len(found) < 100
    np.testing.assert_array_equal(order[np.isin(order, found)], found)
