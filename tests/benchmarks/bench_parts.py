"""Where the time of a score goes, part by part beside the plain scorer, and how far it is from the floor."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import reference_comfort
import reference_scorer
from numba import njit
from numpy.typing import NDArray
from reference_simulation import interpolate_numpy, simulate_numpy

from rewards.kernels.boxes import REAR_AXLE_TO_CENTER_M
from rewards.kernels.collisions import collision_score, light_bounds, light_score, ttc_score
from rewards.kernels.comfort import comfort_tests
from rewards.kernels.comfort_v2 import frame_differences, history_comfort
from rewards.kernels.lanes import CENTER_IN_INTERSECTION, direction_score, ego_areas, ego_points, keeps_lane
from rewards.kernels.polygons import locate
from rewards.kernels.progress import nearest, segment_groups
from rewards.kernels.simulate import resample_plan, simulate_references
from rewards.kernels.windows import plan_windows

if TYPE_CHECKING:
    from bench_scorer import Case

Array = NDArray[Any]


@njit(nogil=True)
def _boxes(states: Array, boxes: Array, speed: Array) -> None:
    for b in range(len(states)):
        for k in range(41):
            cos, sin = math.cos(states[b, k, 2]), math.sin(states[b, k, 2])
            boxes[b, k, 0] = states[b, k, 0] + REAR_AXLE_TO_CENTER_M * cos
            boxes[b, k, 1] = states[b, k, 1] + REAR_AXLE_TO_CENTER_M * sin
            boxes[b, k, 2], boxes[b, k, 3] = cos, sin
            speed[b, k] = math.hypot(states[b, k, 3], states[b, k, 4])


@njit(nogil=True)
def _areas(road: Any, states: Array, boxes: Array, areas: Array) -> None:
    points = np.empty((246, 2))
    found = np.empty((246, road.polygons.depth), dtype=np.int64)
    count = np.empty(246, dtype=np.int64)
    corners = np.zeros(len(road.polygons.flags), dtype=np.int64)
    for b in range(len(states)):
        ego_points(states[b], boxes[b], points)
        locate(road.polygons, points, found, count)
        ego_areas(road.polygons.flags, found, count, corners, areas[b])


@njit(nogil=True)
def _collisions(agents: Any, states: Array, boxes: Array, speed: Array, areas: Array) -> float:
    total = 0.0
    for b in range(len(states)):
        total += collision_score(agents, states[b], boxes[b], areas[b], plan_windows(boxes[b], speed[b]))[0]
    return total


@njit(nogil=True)
def _ttc(agents: Any, states: Array, boxes: Array, speed: Array, areas: Array, windows: Array, steps: int) -> float:
    total = 0.0
    for b in range(len(states)):
        total += ttc_score(agents, states[b], boxes[b], speed[b], areas[b], windows[b], steps)[0]
    return total


@njit(nogil=True)
def _windows(boxes: Array, speed: Array, windows: Array) -> None:
    for b in range(len(boxes)):
        windows[b] = plan_windows(boxes[b], speed[b])


@njit(nogil=True)
def _direction(boxes: Array, areas: Array, ignored: int) -> float:
    total = 0.0
    for b in range(len(boxes)):
        total += direction_score(boxes[b], areas[b], ignored)
    return total


@njit(nogil=True)
def _lights(lights: Any, boxes: Array) -> float:
    total, bounds = 0.0, light_bounds(lights)
    for b in range(len(boxes)):
        total += light_score(lights, bounds, boxes[b])
    return total


@njit(nogil=True)
def _lane(road: Any, boxes: Array, areas: Array) -> int:
    total, groups = 0, segment_groups(road.centerline)
    for b in range(len(boxes)):
        total += keeps_lane(boxes[b], areas[b], road.centerline, groups)
    return total


@njit(nogil=True)
def _progress(road: Any, boxes: Array) -> float:
    total, groups = 0.0, segment_groups(road.centerline)
    for b in range(len(boxes)):
        for k in (0, 40):
            total += nearest(road.centerline, road.arclength, groups, boxes[b, k, 0], boxes[b, k, 1])[0]
    return total


@njit(nogil=True)
def _comfort(states: Array, passed: Array) -> None:
    for b in range(len(states)):
        comfort_tests(states[b], passed[b])


def kernel_parts(case: Case, version: str) -> dict[str, Callable[[], object]]:
    """Calls that do one part of the work each for all plans."""
    road, v1 = case.v1.road, version == "v1"
    agents = case.v1.agents if v1 else case.v2.agents
    refs = resample_plan(case.v1.ego_init, case.v1.t0_us, case.plans)
    states = simulate_references(case.v1.ego_init, refs)
    rows = len(states)
    boxes, speed, areas = np.empty((rows, 41, 4)), np.empty((rows, 41)), np.zeros((rows, 41), dtype=np.uint8)
    windows, passed = np.empty((rows, 6, 4)), np.zeros((rows, 6), dtype=np.bool_)
    _boxes(states, boxes, speed)
    _areas(road, states, boxes, areas)
    _windows(boxes, speed, windows)
    steps, ignored = (41, 0) if v1 else (32, CENTER_IN_INTERSECTION)
    parts: dict[str, Callable[[], object]] = {
        "resample": partial(resample_plan, case.v1.ego_init, case.v1.t0_us, case.plans),
        "simulate": partial(simulate_references, case.v1.ego_init, refs),
        "areas": lambda: (_boxes(states, boxes, speed), _areas(road, states, boxes, areas)),
        "NC": partial(_collisions, agents, states, boxes, speed, areas),
        "TTC": partial(_ttc, agents, states, boxes, speed, areas, windows, steps),
        "DDC": partial(_direction, boxes, areas, ignored),
        "EP": partial(_progress, road, boxes),
    }
    if v1:
        return parts | {"C": partial(_comfort, states, passed)}
    frame, rms = case.v2.previous, np.empty((rows, 4))
    assert frame is not None

    def frames() -> None:
        before = simulate_references(frame.ego_init, resample_plan(frame.ego_init, frame.t0_us, case.previous))
        frame_differences(states, before, 5, rms)

    return parts | {
        "TLC": partial(_lights, case.v2.lights, boxes),
        "LK": partial(_lane, road, boxes, areas),
        "HC": partial(history_comfort, case.v2.history, states, passed),
        "EC": frames,
    }


def plain_parts(case: Case, version: str) -> dict[str, Callable[[], object]]:
    """The same for the plain scorer."""
    scene, plain = reference_scorer.PlainScene.of(case.reference), reference_scorer
    refs = interpolate_numpy(case.v1.ego_init, case.plans)
    states = simulate_numpy(case.v1.ego_init, refs)
    ego = plain.ego_areas(scene, states)
    parts: dict[str, Callable[[], object]] = {
        "resample": partial(interpolate_numpy, case.v1.ego_init, case.plans),
        "simulate": partial(simulate_numpy, case.v1.ego_init, refs),
        "areas": partial(plain.ego_areas, scene, states),
        "NC": partial(plain.collisions, scene, ego, version),
        "TTC": partial(plain.time_to_collision, scene, ego, version),
        "DDC": partial(plain.direction, ego, version),
        "EP": partial(plain.progress, scene, ego),
    }
    if version == "v1":
        return parts | {"C": partial(reference_comfort.comfort_v1, states)}
    assert case.v2.previous is not None
    return parts | {
        "TLC": partial(plain.lights, scene, ego),
        "LK": partial(plain.lane_keeping, scene, ego),
        "HC": partial(reference_comfort.comfort_v2, case.v2.history, states),
        "EC": partial(reference_comfort.frames, case.v2.previous.ego_init, states, case.previous),
    }


def print_parts(cases: Sequence[Case]) -> None:
    """Microseconds per candidate of every part, and what is left: arrays, columns, Python."""
    from bench_scorer import seconds

    for version, metric in (("v1", "pdms"), ("v2", "epdms+ec")):
        ours: dict[str, list[float]] = {}
        plain: dict[str, list[float]] = {}
        for case in cases[:4]:
            for table, parts in ((ours, kernel_parts(case, version)), (plain, plain_parts(case, version))):
                for name, part in parts.items():
                    table.setdefault(name, []).append(1e6 * seconds(part, 0.05) / len(case.plans))
        whole = np.mean([1e6 * seconds(c.score(metric, len(c.plans))) / len(c.plans) for c in cases[:4]])
        print(f"\nreal size, {metric}: us per candidate at B=64")
        for name, values in ours.items():
            ratio = np.mean(plain[name]) / np.mean(values)
            print(f"  {name:10}{np.mean(values):8.2f}   plain {np.mean(plain[name]):8.1f}   {ratio:6.0f}x")
        rest = whole - sum(np.mean(values) for values in ours.values())
        print(f"  {'rest':10}{rest:8.2f}\n  {'all':10}{whole:8.2f}")


@njit(nogil=True)
def _multiply_add(x: Array, y: Array, rounds: int) -> None:
    for r in range(rounds):
        for i in range(len(x)):
            y[i] += x[i] * (1.0 + r)


@njit(nogil=True)
def _multiply_add_one_by_one(x: Array, rounds: int) -> float:
    a, b, c, d = 0.0, 0.0, 0.0, 0.0
    for _ in range(rounds):
        for i in range(0, len(x), 4):
            a = a * 0.999 + x[i]
            b = b * 0.999 + x[i + 1]
            c = c * 0.999 + x[i + 2]
            d = d * 0.999 + x[i + 3]
    return a + b + c + d


@njit(nogil=True)
def _copy(x: Array, y: Array) -> None:
    for i in range(len(x)):
        y[i] = x[i]


def _operations(case: Case) -> dict[str, float]:
    """Floating-point operations per candidate; a sine counts 20, geometry by what the scene needs."""
    index, refs = case.v1.road.polygons, resample_plan(case.v1.ego_init, case.v1.t0_us, case.plans)
    states = simulate_references(case.v1.ego_init, refs)
    rows, agents = len(states), case.v1.agents
    boxes, speed, windows = np.empty((rows, 41, 4)), np.empty((rows, 41)), np.empty((rows, 6, 4))
    _boxes(states, boxes, speed)
    _windows(boxes, speed, windows)
    points = np.empty((rows, 246, 2))
    for b in range(rows):
        ego_points(states[b], boxes[b], points[b])
    cell = ((points - index.origin) / index.cell_m).astype(int) @ np.array([index.shape[1], 1])
    cell = np.clip(cell, 0, len(index.cell_first) - 2)
    edges = (index.item_first[index.cell_first[cell + 1]] - index.item_first[index.cell_first[cell]]).mean()
    own, other = windows[:, None, :5], agents.windows[None, :, :5]
    near = ((own[..., :2] <= other[..., 2:]) & (own[..., 2:] >= other[..., :2])).all(axis=-1).sum(axis=(1, 2)).mean()
    simulate = 40 * (40 + 6 + 12 + 10 * 12 + 30) + 40 * (60 + 35) + 2 * 40 * 40
    return {
        "resample": 41 * 12,
        "simulate": simulate,
        "areas": 41 * (40 + 6 * 8) + 246 * (6 + 12 * edges),
        "NC and TTC": 41 * 12 + 60 * 8 + near * 9 * (8 + 4 * 10),
        "DDC": 41 * (8 + 11),
        "EP": 2 * (16 * 8 + 24 * 14),
        "C (v1.1)": 41 * (4 * (3 + 3 + 2 + 2) + 2 * 2 * 5),
        "TLC, LK (v2.2)": 41 * (6 + 16),
        "HC (v2.2)": 55 * 2 * (8 + 8 + 8 + 15 + 15 + 5 + 5),
        "EC (v2.2)": 41 * 12 + simulate + 2 * 36 * 2 * (8 + 15 + 5 + 5),
    }


def print_floor(cases: Sequence[Case]) -> None:
    """Operations and bytes per candidate against what this core does in simple loops."""
    from bench_scorer import seconds

    x, y, large = np.ones(1024), np.ones(1024), np.ones(8_000_000)
    wide = 2 * 1000 * len(x) / seconds(partial(_multiply_add, x, y, 1000))
    single = 2 * 1000 * len(x) / seconds(partial(_multiply_add_one_by_one, x, 1000))
    copied = 2 * large.nbytes / seconds(partial(_copy, large, np.empty_like(large)))
    counts = [_operations(case) for case in cases[:4]]
    mean = {name: float(np.mean([c[name] for c in counts])) for name in counts[0]}
    print(f"\nfloor: {wide / 1e9:.1f} GFLOP/s in vectors, {single / 1e9:.1f} one by one, copy {copied / 1e9:.1f} GB/s")
    for name, value in mean.items():
        print(f"  {name:16}{value / 1e3:7.1f} kFLOP")
    for metric, left_out in (("pdms", "v2.2"), ("epdms", "EC v1.1"), ("epdms+ec", "v1.1")):
        skipped = ("(v2.2)",) if left_out == "v2.2" else ("(v1.1)", "EC") if left_out.startswith("EC") else ("(v1.1)",)
        work = sum(v for name, v in mean.items() if not any(word in name for word in skipped))
        written = (41 * 3 + 41 * 11) * 8 * (2 if metric == "epdms+ec" else 1)
        whole = np.mean([1e6 * seconds(c.score(metric, len(c.plans))) / len(c.plans) for c in cases[:4]])
        low, usual, moved = 1e6 * work / wide, 1e6 * work / single, 1e6 * written / copied
        print(f"  {metric:10}{work / 1e3:6.1f} kFLOP, {written / 1e3:.1f} kB written, {moved:.2f} us to move;", end=" ")
        print(f"{low:.1f} us in vectors, {usual:.1f} us one by one;", end=" ")
        print(f"takes {whole:.1f} us: {whole / low:.0f} and {whole / usual:.1f} times as long")
