"""Resampling, tracker and bicycle against dense solutions and steps worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from oracles.tiny_scene import straight_plan, straight_reference

from rewards.kernels import simulate
from rewards.kernels.simulate import interpolate_poses, query_times_us, resample_plan, simulate_references

DT = 0.1


def ego(speed: float, **entries: float) -> np.ndarray:
    state = np.zeros(11)
    state[3] = speed
    for name, value in entries.items():
        state[{"ax": 5, "steering": 7}[name]] = value
    return state


def curved_reference() -> np.ndarray:
    t = DT * np.arange(41)
    heading = 0.3 * np.sin(t)
    speed = 6.0 + t
    step = np.stack([speed * np.cos(heading), speed * np.sin(heading)], axis=1)[:-1] * DT
    xy = np.concatenate([np.zeros((1, 2)), np.cumsum(step, axis=0)])
    return np.concatenate([xy, heading[:, None]], axis=1)


def dense_speed_profile(ref: np.ndarray) -> np.ndarray:
    """The regularised fit as stated: accelerations penalised one by one, a difference only in the last row."""
    u = np.array([(ref[k + 1, :2] - ref[k, :2]) @ (math.cos(ref[k, 2]), math.sin(ref[k, 2])) for k in range(40)])
    B = np.array([[DT if j == 0 else (DT * DT if j <= k else 0.0) for j in range(40)] for k in range(40)])
    R = np.zeros((38, 40))
    for i in range(38):
        R[i, i + 1] = -1.0
    R[37, 39] = 1.0
    z = np.linalg.lstsq(np.vstack([B, 1e-2 * R]), np.concatenate([u, np.zeros(38)]), rcond=None)[0]
    return np.asarray(z[0] + DT * np.concatenate([[0.0], np.cumsum(z[1:])]))


def dense_curvature_profile(ref: np.ndarray, v: np.ndarray) -> np.ndarray:
    y = np.diff(ref[:, 2])
    A = np.array([[v[k] * DT if j == 0 else (v[k] * DT * DT if j <= k else 0.0) for j in range(40)] for k in range(40)])
    Q = np.diag([1e-10] + [1e-2] * 39)
    w = np.linalg.solve(A.T @ A + Q, A.T @ y)
    return np.asarray(w[0] + DT * np.concatenate([[0.0], np.cumsum(w[1:])]))


def test_speed_profile_is_the_stated_regularised_fit() -> None:
    ref, speed = curved_reference(), np.empty(40)
    simulate._fit_speed(ref, np.stack([np.cos(ref[:40, 2]), np.sin(ref[:40, 2])], axis=1), speed)
    np.testing.assert_allclose(speed, dense_speed_profile(ref), atol=1e-9)


def test_curvature_profile_equals_the_dense_normal_equations() -> None:
    ref = curved_reference()
    v = dense_speed_profile(ref)
    curvature = np.empty(50)
    simulate._fit_curvature(ref, v, curvature, np.empty(40))
    np.testing.assert_allclose(curvature[:40], dense_curvature_profile(ref, v), atol=1e-9)
    assert (curvature[40:] == curvature[39]).all()


def dense_steering_rate(state: np.ndarray, pose: np.ndarray, accel: float, kappa: np.ndarray, step: int) -> float:
    A, B, g = np.eye(3), np.zeros(3), np.zeros(3)
    for k in range(10):
        vp = state[3] + accel * DT * k
        T = np.eye(3)
        T[0, 1], T[1, 2] = vp * DT, vp * DT / 3.089
        A = T @ A
        B = T @ B + np.array([0.0, 0.0, DT])
        g = T @ g + np.array([0.0, -vp * kappa[min(step + k, 39)] * DT, 0.0])
    dx, dy = state[:2] - pose[:2]
    lateral = -dx * math.sin(pose[2]) + dy * math.cos(pose[2])
    e = A @ np.array([lateral, state[2] - pose[2], state[7]]) + g
    Q = np.diag([1.0, 10.0, 0.0])
    return float(-(B @ Q @ e) / (B @ Q @ B + 1.0))


@pytest.mark.parametrize("step", [0, 33, 39])
def test_steering_rate_equals_the_dense_one_shot_regulator(step: int) -> None:
    rng = np.random.default_rng(step)
    state = np.concatenate([rng.normal(0, 0.3, 3), [7.0, 0, 0.4, 0, 0.05, 0, 0, 0]])
    pose, kappa = rng.normal(0, 0.2, 3), rng.normal(0, 0.05, 40)
    direction = np.array([np.cos(pose[2]), np.sin(pose[2])])
    got = simulate._steering_rate(state, pose, direction, -0.8, np.append(kappa, np.full(10, kappa[-1])), step)
    assert got == pytest.approx(dense_steering_rate(state, pose, -0.8, kappa, step), abs=1e-12)


def test_first_step_by_hand() -> None:
    """v = 5, target 10 m/s: accel = (10/11) 5; a' = a + (1/3)(accel - a); x moves with the old speed."""
    states = simulate_references(ego(5.0, ax=0.6, steering=0.1), straight_reference(10.0)[None])[0]
    target = dense_speed_profile(straight_reference(10.0))[10]
    a = 0.6 + (-(10 / 11) * (5.0 - target) - 0.6) / 3.0
    assert states[1, 0] == pytest.approx(0.5, abs=1e-12)
    assert states[1, 2] == pytest.approx(5.0 * math.tan(0.1) / 3.089 * DT, abs=1e-12)
    assert states[1, 5] == pytest.approx(a, abs=1e-9)
    assert states[1, 3] == pytest.approx(5.0 + DT * a, abs=1e-9)
    assert states[1, 7] == pytest.approx(0.1 + DT * states[1, 8], abs=1e-12)
    assert states[1, 9] == pytest.approx(states[1, 3] * math.tan(states[1, 7]) / 3.089, abs=1e-12)
    assert states[1, 10] == pytest.approx(states[1, 9] / DT, abs=1e-9)


def test_stopping_uses_half_gain_and_no_steering() -> None:
    """Reference and ego below 0.2 m/s: accel = -0.5 (v - v_ref), steering rate 0 although the ego is 1 m beside."""
    still = np.zeros((1, 41, 3))
    still[..., 1] = 1.0
    states = simulate_references(ego(0.2), still)[0]
    assert states[1, 5] == pytest.approx(-0.5 * 0.2 / 3.0, abs=1e-12)
    assert not states[:, 7].any()
    moving = simulate_references(ego(0.3), still)[0]
    assert moving[1, 5] == pytest.approx(-(10 / 11) * 0.3 / 3.0, abs=1e-9)
    assert moving[1, 8] > 0.0


def test_reversing_plans_are_never_steered() -> None:
    reference = curved_reference() * [-1.0, -1.0, 1.0]
    states = simulate_references(ego(0.0), reference[None])[0]
    assert states[-1, 3] < -1.0
    assert not states[:, 7].any()


def test_steering_is_clipped_at_60_degrees() -> None:
    turn = straight_reference(3.0)
    turn[:, 2] = np.linspace(0.0, 30.0, 41)
    states = simulate_references(ego(3.0), turn[None])
    assert np.abs(states[..., 7]).max() == pytest.approx(math.pi / 3, abs=1e-15)


def test_rows_are_independent_of_their_batch() -> None:
    rng = np.random.default_rng(0)
    refs = np.stack([curved_reference() * rng.uniform(0.5, 1.5) for _ in range(5)])
    together = simulate_references(ego(6.0), refs)
    alone = np.concatenate([simulate_references(ego(6.0), ref[None]) for ref in refs])
    np.testing.assert_array_equal(together, alone)


def test_headings_turn_the_shorter_way() -> None:
    knots = np.array([[[0.0, 0.0, 3.0], [2.0, 4.0, -3.0]]])
    poses = interpolate_poses(np.array([0, 1000]), knots, np.array([-5, 500, 2000]))[0]
    assert poses[1, :2].tolist() == [1.0, 2.0]
    assert abs(poses[1, 2]) == pytest.approx(math.pi, abs=1e-12)
    np.testing.assert_allclose(poses[[0, 2]], knots[0], atol=1e-12)


def test_query_times_are_truncated_not_rounded() -> None:
    t0 = 1_600_000_000_123_457
    assert query_times_us(t0).tolist() == [int((0.1 * k + t0 * 1e-6) * 1e6) for k in range(41)]
    assert (query_times_us(t0) < t0 + 100_000 * np.arange(41)).any()


def test_resampling_follows_the_ego_into_the_world() -> None:
    pose = np.array([5.0, -3.0, 2.0])
    local = resample_plan(np.zeros(3), 10_000_000, straight_plan(8.0, y=1.0)[None])[0]
    world = resample_plan(pose, 10_000_000, straight_plan(8.0, y=1.0)[None])[0]
    c, s = math.cos(2.0), math.sin(2.0)
    np.testing.assert_allclose(world[:, :2], local[:, :2] @ np.array([[c, s], [-s, c]]) + pose[:2], atol=1e-12)
    np.testing.assert_allclose(local[:, 0], 0.8 * np.arange(41), atol=1e-4)
    assert local[5].tolist() == [4.0, 1.0, 0.0]
