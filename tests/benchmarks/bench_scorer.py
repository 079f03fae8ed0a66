"""Candidates per second of the PDMS kernels, beside batched NumPy and shapely versions of the dominant parts.

Run: ``OMP_NUM_THREADS=1 python tests/benchmarks/bench_scorer.py FOLDER`` with a folder of ``<id>.scene.json/.npz``. The
references do less than the scorer (no comfort, progress, direction, fault rules), so the ratios are lower bounds.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

from rewards.kernels.boxes import EGO_HALF_LENGTH_M, EGO_HALF_WIDTH_M, REAR_AXLE_TO_CENTER_M
from rewards.kernels.simulate import resample_plan, simulate_references
from rewards.pdms import score_pdms
from rewards.prepare import PreparedScene, prepare_scene
from rlhf_drive.scenes import SceneReference, to_ego_frame
from rlhf_drive.scenes.importers.vectors import VectorScene, read_vectors

DT, WHEEL_BASE_M = 0.1, 3.089


def fit_profiles(refs: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Speed and curvature profiles by batched dense normal equations."""
    heading = refs[:, :-1, 2]
    along = (np.diff(refs[..., :2], axis=1) * np.stack([np.cos(heading), np.sin(heading)], axis=-1)).sum(axis=-1)
    to_profile = np.concatenate([np.ones((40, 1)), DT * np.tri(40, 39, -1)], axis=1)
    design = DT * to_profile
    penalty = -np.eye(38, 40, 1)
    penalty[-1, -1] = 1.0
    fit = np.linalg.pinv(design.T @ design + 1e-4 * penalty.T @ penalty) @ design.T
    speed = along @ fit.T @ to_profile.T
    design_B = speed[..., None] * design
    turns = np.diff(np.unwrap(refs[..., 2]), axis=1)
    cost = np.diag([1e-10] + [1e-2] * 39)
    normal = design_B.transpose(0, 2, 1) @ design_B + cost
    rates = np.linalg.solve(normal, design_B.transpose(0, 2, 1) @ turns[..., None])[..., 0]
    return speed, rates @ to_profile.T


def simulate_numpy(ego_init: NDArray[np.float64], refs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Tracker and bicycle, vectorised over plans."""
    speed, curvature = fit_profiles(refs)
    states = np.zeros((len(refs), 41, 11))
    states[:, 0] = ego_init
    for i in range(40):
        s = states[:, i]
        target = speed[:, min(i + 10, 39)]
        stop = (target <= 0.2) & (s[:, 3] <= 0.2)
        accel = np.where(stop, 0.5, 10.0 / 11.0) * (target - s[:, 3])
        A, B, g = np.tile(np.eye(3), (len(s), 1, 1)), np.zeros((len(s), 3)), np.zeros((len(s), 3))
        for k in range(10):
            step = np.tile(np.eye(3), (len(s), 1, 1))
            travel = (s[:, 3] + accel * DT * k) * DT
            step[:, 0, 1], step[:, 1, 2] = travel, travel / WHEEL_BASE_M
            A, B, g = step @ A, (step @ B[..., None])[..., 0], (step @ g[..., None])[..., 0]
            B[:, 2] += DT
            g[:, 1] -= travel * curvature[:, min(i + k, 39)]
        d, angle = s[:, :2] - refs[:, i, :2], refs[:, i, 2]
        lateral = -d[:, 0] * np.sin(angle) + d[:, 1] * np.cos(angle)
        error = np.stack([lateral, (s[:, 2] - angle + np.pi) % (2 * np.pi) - np.pi, s[:, 7]], axis=1)
        e = (A @ error[..., None])[..., 0] + g
        e[:, 1] = (e[:, 1] + np.pi) % (2 * np.pi) - np.pi
        weight = B * [1.0, 10.0, 0.0]
        rate = np.where(stop, 0.0, -(weight * e).sum(axis=1) / ((weight * B).sum(axis=1) + 1.0))
        n = states[:, i + 1]
        n[:, 0] = s[:, 0] + s[:, 3] * np.cos(s[:, 2]) * DT
        n[:, 1] = s[:, 1] + s[:, 3] * np.sin(s[:, 2]) * DT
        n[:, 2] = (s[:, 2] + s[:, 3] * np.tan(s[:, 7]) / WHEEL_BASE_M * DT + np.pi) % (2 * np.pi) - np.pi
        n[:, 5] = s[:, 5] + (accel - s[:, 5]) / 3.0
        n[:, 3] = s[:, 3] + n[:, 5] * DT
        n[:, 8] = rate * 2.0 / 3.0
        n[:, 7] = np.clip(s[:, 7] + n[:, 8] * DT, -np.pi / 3, np.pi / 3)
    return states


def boxes(
    x: NDArray[Any], y: NDArray[Any], cos: NDArray[Any], sin: NDArray[Any], half_length: Any, half_width: Any
) -> NDArray[Any]:
    """Shapely boxes, any batch shape."""
    signs = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]], dtype=float)
    along, across = signs[:, 0] * np.asarray(half_length)[..., None], signs[:, 1] * np.asarray(half_width)[..., None]
    corner_x = x[..., None] + along * cos[..., None] - across * sin[..., None]
    corner_y = y[..., None] + along * sin[..., None] + across * cos[..., None]
    return np.asarray(shapely.polygons(np.stack([corner_x, corner_y], axis=-1)))


def contacts_shapely(prepared: PreparedScene, states: NDArray[np.float64]) -> int:
    """Contacts of the ego boxes of all steps and look-aheads with the agents of that time, one STR-tree a step."""
    agents = prepared.agents
    half = agents.half_size[:, None, :]
    pose = agents.pose
    shapes = boxes(pose[..., 0], pose[..., 1], pose[..., 2], pose[..., 3], half[..., 0], half[..., 1])
    trees = [shapely.STRtree(shapes[agents.valid[:, t], t]) for t in range(shapes.shape[1])]
    cos, sin = np.cos(states[..., 2]), np.sin(states[..., 2])
    speed = np.hypot(states[..., 3], states[..., 4])
    found = 0
    for ahead in (0, 3, 6, 9):
        reach = REAR_AXLE_TO_CENTER_M + ahead * DT * speed
        ego = boxes(
            states[..., 0] + reach * cos, states[..., 1] + reach * sin, cos, sin, EGO_HALF_LENGTH_M, EGO_HALF_WIDTH_M
        )
        for k in range(41):
            found += trees[k + ahead].query(ego[:, k], predicate="intersects").shape[1]
    return found


def areas_shapely(polygons: NDArray[Any], states: NDArray[np.float64]) -> int:
    """Polygons that contain each ego corner, centre and rear axle, through one STR-tree."""
    cos, sin = np.cos(states[..., 2]), np.sin(states[..., 2])
    along = REAR_AXLE_TO_CENTER_M + EGO_HALF_LENGTH_M * np.array([1, -1, -1, 1, 0])
    across = EGO_HALF_WIDTH_M * np.array([1, 1, -1, -1, 0])
    x = states[..., :1] + along * cos[..., None] - across * sin[..., None]
    y = states[..., 1:2] + along * sin[..., None] + across * cos[..., None]
    points = shapely.points(
        np.concatenate([x.ravel(), states[..., 0].ravel()]), np.concatenate([y.ravel(), states[..., 1].ravel()])
    )
    return int(shapely.STRtree(polygons).query(points, predicate="within").shape[1])


def map_polygons(reference: SceneReference) -> NDArray[Any]:
    flat = np.concatenate([reference.map_xy, np.zeros((len(reference.map_xy), 1))], axis=1)
    xy = to_ego_frame(flat, reference.ego_init[:3])[:, :2]
    return np.array([shapely.Polygon(p) for p in np.split(xy, reference.map_offsets[1:-1]) if len(p) > 2])


def seconds(function: Callable[[], object], repeats: int) -> float:
    """Median processor time of a call in this thread, so that other processes do not count."""
    function()
    times = []
    for _ in range(repeats):
        start = time.thread_time()
        function()
        times.append(time.thread_time() - start)
    return float(np.median(times))


def measure(scenes: list[VectorScene], batch: int, repeats: int) -> tuple[float, NDArray[np.float64]]:
    """Seconds per candidate of our scorer and of the three reference parts, averaged over scenes."""
    ours, parts = [], []
    for scene in scenes:
        prepared, polygons = prepare_scene(scene.reference), map_polygons(scene.reference)
        plans = np.resize(scene.candidates, (batch, 8, 3))
        refs = resample_plan(prepared.ego_init, prepared.t0_us, plans)
        states = simulate_references(prepared.ego_init, refs)
        assert np.abs(simulate_numpy(prepared.ego_init, refs) - states)[..., :2].max() < 0.05
        ours.append(seconds(partial(score_pdms, prepared, plans), repeats) / batch)
        reference: list[Callable[[], object]] = [
            partial(simulate_numpy, prepared.ego_init, refs),
            partial(areas_shapely, polygons, states),
            partial(contacts_shapely, prepared, states),
        ]
        parts.append([seconds(part, max(repeats // 5, 2)) / batch for part in reference])
    return float(np.mean(ours)), np.mean(np.array(parts), axis=0)


def main(folder: Path) -> None:
    scenes = list(read_vectors(folder))
    prepared_ms = [1e3 * seconds(partial(prepare_scene, s.reference), 5) for s in scenes]
    print(f"{len(scenes)} scenes; prepare_scene {np.mean(prepared_ms):.2f} ms (max {np.max(prepared_ms):.2f})")
    print("    B   scorer/s   simulate   areas   contacts (reference candidates/s)   scorer faster by")
    for batch in (1, 16, 64):
        ours, parts = measure(scenes[::3], batch, repeats=10)
        rates = "   ".join(f"{1 / part:8.0f}" for part in parts)
        print(f"{batch:5d}   {1 / ours:8.0f}   {rates}   {parts.sum() / ours:6.0f} x")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
