"""The shortcuts of the kernels against plain loops, on shapes and points chosen to break them: equal to a bit."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rewards.kernels.boxes import EGO_HALF_LENGTH_M, EGO_HALF_WIDTH_M, boxes_touch
from rewards.kernels.collisions import AgentBoxes, RedLights, collision_score, light_bounds, light_score, ttc_score
from rewards.kernels.polygons import build_polygon_index, locate, polygon_touches_box
from rewards.kernels.progress import arclengths, near_segment, nearest, project, segment_groups
from rewards.kernels.windows import agent_windows, plan_windows


def polylines(rng: np.random.Generator) -> list[np.ndarray]:
    """Roads, tangles, standing points, doubled-back lines, lines of two points, lines far from the origin."""
    road = np.cumsum(np.stack([np.ones(250), np.sin(np.arange(250) / 20.0)], axis=1), axis=0)
    tangle = rng.uniform(-20.0, 20.0, (120, 2))
    standing = np.repeat(rng.integers(-5, 5, (12, 2)).astype(float), 4, axis=0)
    there = np.stack([np.arange(40.0), np.zeros(40)], axis=1)
    back = np.concatenate([there, there[::-1]])
    square = np.array([[0.0, 0.0], [4.0, 0.0], [4.0, 4.0], [0.0, 4.0], [0.0, 0.0]])
    return [road, tangle, standing, back, square, np.array([[1.0, 1.0], [1.0, 1.0]]), road + np.array([6.6e5, 4.0e6])]


def test_nearest_point_of_a_polyline_equals_the_plain_loop() -> None:
    rng = np.random.default_rng(5)
    ties = 0
    for xy in polylines(rng):
        length, groups = arclengths(xy), segment_groups(xy)
        points = np.concatenate(
            [
                rng.uniform(xy.min(axis=0) - 30.0, xy.max(axis=0) + 30.0, (400, 2)),
                xy,
                0.5 * (xy[1:] + xy[:-1]),
                np.round(rng.uniform(xy.min(axis=0) - 3.0, xy.max(axis=0) + 3.0, (200, 2))),
            ]
        )
        for x, y in points:
            assert nearest(xy, length, groups, x, y) == project(xy, length, x, y)
        at = {
            project(xy, length, x, y)[0] != project(xy[::-1].copy(), length[-1] - length[::-1], x, y)[0] for x, y in xy
        }
        ties += True in at
    assert ties >= 2  # The doubled-back line and the standing points do have ties.


@pytest.mark.parametrize("limit", [0.5, 0.0, 4.0])
def test_a_near_segment_is_found_exactly_where_the_polyline_is_near(limit: float) -> None:
    rng = np.random.default_rng(6)
    near = 0
    for xy in polylines(rng):
        length, groups = arclengths(xy), segment_groups(xy)
        hint = -1
        for x, y in np.concatenate(
            [rng.uniform(xy.min(axis=0) - 5.0, xy.max(axis=0) + 5.0, (300, 2)), xy + np.array([0.0, 0.5]), xy]
        ):
            hint = near_segment(xy, groups, x, y, limit, hint)
            assert (hint >= 0) == (project(xy, length, x, y)[1] <= limit)
            near += hint >= 0
    assert near > 100


def even_odd(polygon: np.ndarray, x: float, y: float) -> bool:
    """Containment by crossing every edge; a point on the boundary is outside."""
    odd = False
    for (ax, ay), (bx, by) in zip(np.roll(polygon, 1, axis=0), polygon, strict=True):
        if (ay > y) != (by > y):
            side = (bx - ax) * (y - ay) - (by - ay) * (x - ax)
            if side == 0.0:
                return False
            odd ^= (side > 0.0) == (by > ay)
        elif ay == y and (x == ax or (by == y and min(ax, bx) <= x <= max(ax, bx))):
            return False
    return bool(odd)


def rings(rng: np.random.Generator) -> list[np.ndarray]:
    """Crossing, doubled, flat, pointed and comb-like rings, half of them with vertices on the corners of cells."""
    tangled = [rng.uniform(-9.0, 9.0, (int(n), 2)) for n in rng.integers(3, 30, 8)]
    snapped = [2.0 * rng.integers(-4, 5, (int(n), 2)).astype(float) for n in rng.integers(3, 12, 8)]
    teeth = np.stack([np.arange(-8.0, 8.5, 0.5), np.tile([-7.0, 7.0], 17)[:33]], axis=1)
    comb = np.concatenate([teeth, [[9.0, -9.0], [-9.0, -9.0]]])
    slope = np.arange(-9.0, 9.0, 0.75)
    ribbon = np.concatenate([np.stack([slope, 0.1 * slope], 1), np.stack([slope, 0.1 * slope + 3.5], 1)[::-1]])
    flat = np.array([[-3.0, 1.0], [5.0, 1.0], [2.0, 1.0]])
    doubled = np.repeat(snapped[0], 2, axis=0)
    return [*tangled, *snapped, comb, ribbon, ribbon[:, ::-1], flat, doubled, flat[:2]]


def test_located_polygons_equal_crossing_every_edge() -> None:
    rng = np.random.default_rng(7)
    polygons = rings(rng)
    offsets = np.cumsum([0, *(len(p) for p in polygons)])
    index = build_polygon_index(np.concatenate(polygons), offsets, np.zeros(len(polygons), dtype=np.uint8))
    vertices = np.concatenate(polygons)
    grid = np.stack(np.meshgrid(np.arange(-10.0, 10.5), np.arange(-10.0, 10.5)), axis=-1).reshape(-1, 2)
    middles = np.concatenate([0.5 * (p + np.roll(p, 1, axis=0)) for p in polygons])
    heights = np.stack([rng.uniform(-10.0, 10.0, len(vertices)), vertices[:, 1]], axis=1)
    borders = index.origin + index.cell_m * rng.integers(0, 9, (100, 2))
    points = np.concatenate([rng.uniform(-10.0, 10.0, (1500, 2)), vertices, grid, middles, heights, borders])
    found = np.empty((len(points), index.depth), dtype=np.int64)
    count = np.empty(len(points), dtype=np.int64)
    locate(index, points, found, count)
    for (x, y), row, n in zip(points, found, count, strict=True):
        inside = {p for p, ring in enumerate(polygons) if len(ring) > 2 and even_odd(ring, x, y)}
        assert set(row[:n].tolist()) == inside
    assert count.sum() > 5000


def test_a_very_large_map_gets_larger_cells() -> None:
    """The grid stays within 65,536 cells: a 2 km square in cells of 8 m, where cells of 2 m would be 1,002,001."""
    square = np.array([[0.0, 0.0], [2000.0, 0.0], [2000.0, 2000.0], [0.0, 2000.0]])
    index = build_polygon_index(square, np.array([0, 4]), np.zeros(1, dtype=np.uint8))
    assert index.cell_m == 8.0
    assert len(index.cell_first) == 251 * 251 + 1
    found, count = np.empty((3, 1), dtype=np.int64), np.empty(3, dtype=np.int64)
    locate(index, np.array([[0.5, 0.5], [1999.5, 3.0], [2000.5, 3.0]]), found, count)
    assert count.tolist() == [1, 1, 0]


def crowd(rng: np.random.Generator, agents: int, steps: int) -> AgentBoxes:
    start, speed = rng.uniform(-25.0, 45.0, (agents, 1, 2)), rng.normal(0.0, 5.0, (agents, 1, 2))
    xy = start + speed * 0.1 * np.arange(steps)[:, None]
    heading = rng.uniform(-3.0, 3.0, (agents, 1)) + np.zeros((1, steps))
    pose = np.ascontiguousarray(np.concatenate([xy, np.cos(heading)[..., None], np.sin(heading)[..., None]], axis=-1))
    half_size = rng.uniform(0.0, 3.0, (agents, 2))
    first = rng.integers(0, steps, agents)
    valid = np.ascontiguousarray(np.arange(steps) >= first[:, None])
    windows = agent_windows(pose, half_size, valid)
    bounds = np.concatenate([windows[..., :2].min(axis=1), windows[..., 2:].max(axis=1)], axis=1)
    return AgentBoxes(pose, half_size, valid, rng.random(agents) < 0.7, rng.random(agents) < 0.3, bounds, windows)


def plan(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    states = np.zeros((41, 11))
    states[:, 3] = np.abs(rng.normal(7.0, 5.0))
    states[:, 2] = rng.uniform(-3.0, 3.0) + rng.normal(0.0, 0.02) * np.arange(41)
    direction = np.stack([np.cos(states[:, 2]), np.sin(states[:, 2])], axis=1)
    states[:, :2] = np.cumsum(0.1 * states[:, 3:4] * direction, axis=0)
    return states, np.concatenate([states[:, :2] + 1.461 * direction, direction], axis=1), states[:, 3].copy()


def test_windows_never_change_a_collision_or_a_time_to_collision() -> None:
    """Beside agents whose windows admit everything, which makes every step and look-ahead be looked at."""
    rng = np.random.default_rng(8)
    contacts, hits = 0, 0
    for trial in range(60):
        steps = 51 if trial % 2 else 41
        agents, (states, boxes, speed) = crowd(rng, 20, steps), plan(rng)
        areas = rng.integers(0, 4, 41).astype(np.uint8)
        wide = np.tile([-np.inf, -np.inf, np.inf, np.inf], (20, agents.windows.shape[1], 1))
        everywhere = agents._replace(bounds=wide[:, 0].copy(), windows=wide)
        windows = plan_windows(boxes, speed)
        nc = collision_score(agents, states, boxes, areas, windows)
        assert nc == collision_score(everywhere, states, boxes, areas, windows)
        ttc = ttc_score(agents, states, boxes, speed, areas, windows, 41)
        assert ttc == ttc_score(everywhere, states, boxes, speed, areas, windows, 41)
        contacts, hits = contacts + (nc[1] < np.inf), hits + (ttc[1] < np.inf)
    assert contacts > 10
    assert hits > 10


def test_first_contact_with_an_agent_lies_in_a_window_that_admits_it() -> None:
    """A thin agent that is touched at one step only, for every step of the plan."""
    states = np.zeros((41, 11))
    states[:, 0], states[:, 3] = np.arange(41) - 1.461, 10.0
    boxes = np.stack([np.arange(41.0), np.zeros(41), np.ones(41), np.zeros(41)], axis=1)
    windows = plan_windows(boxes, states[:, 3].copy())
    for k in range(41):
        pose = np.full((1, 51, 4), 500.0)
        pose[0, k] = (k + EGO_HALF_LENGTH_M, 0.0, 1.0, 0.0)
        half, valid = np.full((1, 2), 0.1), np.ones((1, 51), dtype=np.bool_)
        seen = agent_windows(pose, half, valid)
        agents = AgentBoxes(
            pose, half, valid, np.ones(1, dtype=np.bool_), np.zeros(1, dtype=np.bool_), seen[:, 0], seen
        )
        agents = agents._replace(bounds=np.array([[-600.0, -600.0, 600.0, 600.0]]))
        assert collision_score(agents, states, boxes, np.zeros(41, dtype=np.uint8), windows) == (0.0, float(k))


def test_light_bounds_never_change_a_red_light() -> None:
    rng = np.random.default_rng(9)
    crossed = 0
    for _ in range(200):
        corner, (_, boxes, _) = rng.uniform(-30.0, 30.0, 2), plan(rng)
        ring = corner + np.array([[0.0, 0.0], [rng.uniform(0.1, 9.0), 0.5], [2.0, rng.uniform(1.0, 9.0)]])
        active = np.ascontiguousarray(rng.random((1, 51)) < 0.6)
        lights = RedLights(ring, np.array([0, 3]), active)
        touched = any(
            active[0, k] and polygon_touches_box(ring, *boxes[k], EGO_HALF_LENGTH_M, EGO_HALF_WIDTH_M)
            for k in range(41)
        )
        assert light_score(lights, light_bounds(lights), boxes) == (0.0 if touched else 1.0)
        crossed += touched
    assert 10 < crossed < 180


def test_a_box_that_touches_with_its_corner_is_within_the_radius() -> None:
    """The windows hold boxes by their circumscribed circle: the farthest touching box is at the sum of the radii."""
    radius = math.hypot(EGO_HALF_LENGTH_M, EGO_HALF_WIDTH_M)
    boxes = np.array([[0.0, 0.0, EGO_HALF_LENGTH_M / radius, -EGO_HALF_WIDTH_M / radius]])
    far = 2.0 * radius - 1e-12
    pose = np.array([[[far, 0.0, EGO_HALF_LENGTH_M / radius, -EGO_HALF_WIDTH_M / radius]]])
    half = np.array([[EGO_HALF_LENGTH_M, EGO_HALF_WIDTH_M]])
    assert boxes_touch(*boxes[0], *half[0], *pose[0, 0], *half[0])
    seen, windows = agent_windows(pose, half, np.ones((1, 1), dtype=np.bool_)), plan_windows(boxes, np.zeros(1))
    agents = AgentBoxes(
        pose,
        half,
        np.ones((1, 1), dtype=np.bool_),
        np.ones(1, dtype=np.bool_),
        np.ones(1, dtype=np.bool_),
        seen[:, 0],
        seen,
    )
    states = np.zeros((1, 11))
    states[0, 3] = 5.0
    assert collision_score(agents, states, boxes, np.zeros(1, dtype=np.uint8), windows) == (0.0, 0.0)
