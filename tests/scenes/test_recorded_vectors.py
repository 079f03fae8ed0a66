"""Imported scenes against the reference conversion of 20 recorded starts."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import shapely
from numpy.typing import NDArray

from rlhf_drive.scenes import MapLayer, Scene, SceneReference, wrap_angle
from rlhf_drive.scenes.importers.recorded import import_recording
from rlhf_drive.scenes.importers.vectors import VectorScene, read_vectors

LANES = (MapLayer.LANE, MapLayer.LANE_CONNECTOR)
POLYGON_TOLERANCE_M2 = 0.04
"""Vertices of simplified rings hang on the order of union operations; one polygon differs by at most this."""
UNKNOWN_ROUTE_LANES = 7
"""Turning lanes beside the route that the reference counts to it and the written rule does not, in all 20 scenes."""


@cache
def _pairs(folder: Path) -> tuple[tuple[VectorScene, Scene], ...]:
    pairs = []
    for vector in read_vectors(folder / "golden"):
        items = import_recording(folder / f"{vector.name.rsplit('__', 1)[0]}.json", "all")
        pairs += [(vector, item) for item in items if isinstance(item, Scene) and item.token == vector.name]
    return tuple(pairs)


@pytest.fixture(scope="module")
def pairs(recorded_scenes: Path) -> tuple[tuple[VectorScene, Scene], ...]:
    return _pairs(recorded_scenes)


def _polygons(reference: SceneReference, index: NDArray[np.int64]) -> list[shapely.Polygon]:
    offsets = reference.map_offsets
    return [shapely.Polygon(reference.map_xy[offsets[i] : offsets[i + 1]]) for i in index]


def test_every_start_is_imported_under_its_name_and_kind(pairs: tuple[tuple[VectorScene, Scene], ...]) -> None:
    assert len(pairs) == 20
    assert all(scene.kind == vector.kind for vector, scene in pairs)


@pytest.mark.parametrize(
    "name",
    ["ego_init", "prev_ego_init", "past_states", "past_times_us", "centerline", "speed_limit", "t0_us", "prev_t0_us"],
)
def test_ego_and_route_equal_the_reference(pairs: tuple[tuple[VectorScene, Scene], ...], name: str) -> None:
    for vector, scene in pairs:
        np.testing.assert_allclose(
            getattr(scene.reference, name), getattr(vector.reference, name), rtol=0, atol=1e-9, err_msg=vector.name
        )


def test_human_plan_equals_the_reference_to_float32(pairs: tuple[tuple[VectorScene, Scene], ...]) -> None:
    for vector, scene in pairs:
        error = np.abs(scene.reference.human_poses - vector.reference.human_poses)
        assert error.max() < 4e-6, vector.name


def test_agents_equal_the_reference(pairs: tuple[tuple[VectorScene, Scene], ...]) -> None:
    for vector, scene in pairs:
        mine, theirs = scene.reference, vector.reference
        np.testing.assert_array_equal(mine.agent_valid, theirs.agent_valid)
        np.testing.assert_array_equal(mine.agent_type, theirs.agent_type)
        np.testing.assert_allclose(mine.agent_size, theirs.agent_size, atol=1e-6)
        there = theirs.agent_valid
        np.testing.assert_allclose(mine.agent_pose[there][:, :2], theirs.agent_pose[there][:, :2], atol=1e-6)
        np.testing.assert_allclose(wrap_angle(mine.agent_pose[there] - theirs.agent_pose[there])[:, 2], 0, atol=1e-6)
        np.testing.assert_allclose(mine.agent_velocity[there], theirs.agent_velocity[there], atol=1e-6)


@pytest.mark.parametrize("layer", [*LANES, MapLayer.INTERSECTION, MapLayer.DRIVABLE_AREA])
def test_polygons_equal_the_reference(pairs: tuple[tuple[VectorScene, Scene], ...], layer: MapLayer) -> None:
    total = exact = 0
    for vector, scene in pairs:
        mine = _polygons(scene.reference, np.flatnonzero(scene.reference.map_layer == layer))
        theirs = _polygons(vector.reference, np.flatnonzero(vector.reference.map_layer == layer))
        assert len(mine) == len(theirs), vector.name
        for polygon in theirs:
            difference = min(polygon.symmetric_difference(other).area for other in mine)
            assert difference < POLYGON_TOLERANCE_M2, vector.name
            total, exact = total + 1, exact + (difference < 1e-3)
    assert exact >= 0.9 * total


def test_lanes_on_the_route_are_the_references_but_for_turning_lanes(
    pairs: tuple[tuple[VectorScene, Scene], ...],
) -> None:
    missing = 0
    for vector, scene in pairs:
        mine = _polygons(scene.reference, np.flatnonzero(scene.reference.map_on_route))
        theirs = _polygons(vector.reference, np.flatnonzero(vector.reference.map_on_route))
        for polygon in mine:
            near = min(polygon.symmetric_difference(other).area for other in theirs)
            assert near < POLYGON_TOLERANCE_M2, f"{vector.name}: a lane that is not on the route"
        missing += len(theirs) - len(mine)
    assert missing <= UNKNOWN_ROUTE_LANES


def test_red_lights_equal_the_reference(pairs: tuple[tuple[VectorScene, Scene], ...]) -> None:
    seen = 0
    for vector, scene in pairs:
        np.testing.assert_array_equal(scene.reference.red_active, vector.reference.red_active)
        np.testing.assert_array_equal(scene.reference.red_xy, vector.reference.red_xy)
        seen += len(scene.reference.red_on_route)
    assert seen == 27
