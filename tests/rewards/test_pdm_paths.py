"""Lateral paths and corridors of PDM-Closed, worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import shapely

from rewards.pdm_paths import Path, build_corridors, build_paths, pose_at

HALF = 1.1485


def straight(*x: float) -> Path:
    vertices = np.array([[value, 0.0] for value in x])
    return Path(vertices, vertices[:, 0].copy(), np.zeros(len(x)))


def test_positive_offset_is_left_and_comes_last() -> None:
    north = np.array([[0.0, 0.0, np.pi / 2], [0.0, 10.0, np.pi / 2]])
    centre, right, left = build_paths(north)
    np.testing.assert_allclose(centre.xy[:, 0], 0.0, atol=1e-15)
    np.testing.assert_allclose(right.xy[:, 0], 1.0)
    np.testing.assert_allclose(left.xy[:, 0], -1.0)


def test_each_vertex_moves_across_its_own_heading() -> None:
    # The second vertex points north: its left neighbour lies at x - 1, so the left path measures sqrt(9^2 + 1^2).
    line = np.array([[0.0, 0.0, 0.0], [10.0, 0.0, np.pi / 2]])
    left = build_paths(line)[2]
    np.testing.assert_allclose(left.xy, [[0.0, 1.0], [9.0, 0.0]], atol=1e-15)
    assert left.arclength[-1] == pytest.approx(np.sqrt(82.0), abs=1e-12)


def test_pose_is_linear_between_vertices_and_turns_the_short_way() -> None:
    line = np.array([[0.0, 0.0, 3.0], [-10.0, 0.0, -3.0]])
    x, y, heading = pose_at(build_paths(line)[0], 5.0)
    assert (x, y) == pytest.approx((-5.0, 0.0))
    assert abs(heading) == pytest.approx(np.pi, abs=1e-12)


@pytest.mark.parametrize(("distance", "x"), [(-3.0, 1e-5), (0.0, 1e-5), (4.0, 4.0), (99.0, 10.0)])
def test_pose_is_clipped_to_the_path(distance: float, x: float) -> None:
    assert pose_at(straight(0.0, 10.0), distance)[0] == pytest.approx(x, abs=1e-15)


@pytest.mark.parametrize(
    ("start", "length", "low", "high"),
    [(3.0, 24.0, 10.0, 20.0), (12.0, 6.0, 12.0, 18.0), (10.0, 10.0, 10.0, 20.0), (0.0, 99.0, 0.0, 30.0)],
    ids=["vertices alone", "no vertex inside", "bounds count", "clipped"],
)
def test_corridor_runs_from_vertex_to_vertex(start: float, length: float, low: float, high: float) -> None:
    corridor = build_corridors([straight(0.0, 10.0, 20.0, 30.0)], np.array([start]), length)
    assert corridor.xy[:, 0].min() == pytest.approx(low - HALF, abs=1e-12)
    assert corridor.xy[:, 0].max() == pytest.approx(high + HALF, abs=1e-12)


def test_caps_are_square() -> None:
    corridor = build_corridors([straight(0.0, 10.0)], np.zeros(1), 10.0)
    area = shapely.Polygon(corridor.xy).area
    assert area == pytest.approx((10.0 + 2 * HALF) * 2 * HALF, abs=1e-9)


def test_joins_are_round_with_16_segments_a_quarter() -> None:
    bend = np.array([[0.0, 0.0], [10.0, 0.0], [10.0, 10.0]])
    path = Path(bend, np.array([0.0, 10.0, 20.0]), np.zeros(3))
    corridor = build_corridors([path], np.zeros(1), 20.0)
    on_arc = np.abs(np.hypot(*(corridor.xy - bend[1]).T) - HALF) < 1e-9
    assert on_arc.sum() == 17


def test_each_path_owns_its_rings() -> None:
    # A path that runs round a square block encloses a hole; the second is a plain strip.
    loop = np.array([[0.0, 0.0], [20.0, 0.0], [20.0, 20.0], [0.0, 20.0], [0.0, 0.5]])
    length = np.array([0.0, 20.0, 40.0, 60.0, 79.5])
    corridors = build_corridors([Path(loop, length, np.zeros(5)), straight(0.0, 10.0)], np.zeros(2), 100.0)
    assert corridors.first_ring.tolist() == [0, 2, 3]
    assert len(corridors.rings) == 4
    second = corridors.xy[corridors.rings[2] : corridors.rings[3]]
    np.testing.assert_allclose(np.abs(second[:, 1]), HALF)


def test_an_ego_past_the_end_keeps_a_square_of_its_own_width() -> None:
    corridor = build_corridors([straight(0.0, 10.0)], np.array([10.0]), 50.0)
    np.testing.assert_allclose(corridor.xy.min(axis=0), [10.0 - HALF, -HALF])
    np.testing.assert_allclose(corridor.xy.max(axis=0), [10.0 + HALF, HALF])
