"""The whole planner: hand-made scenes, and NAVSIM's own references and intermediates where the vectors are present."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from oracles.straight_road import agent, rectangle, straight_road

from rewards.pdm_closed import PdmClosedPlan, attach_references, plan_pdm_closed
from rewards.pdm_scoring import Version
from rlhf_drive.errors import DataError
from rlhf_drive.scenes import Observation, Scene, SceneReference, to_ego_frame, wrap_angle
from rlhf_drive.scenes.importers.vectors import read_vector, read_vectors

VERSIONS: tuple[Version, ...] = ("v1", "v2")
# Here the ego stands beside a vertex of the centreline, equally far from both adjoining segments but for 5e-10 m of UTM
# rounding: the projection falls on either of them, 2.1e-5 m apart.
KNIFE_EDGES = {"pub_rear_probe_121": 2.2e-5}
INTERMEDIATES = ("intersection_left_turn_102", "lead_braking_104", "parked_cars_107", "red_light_108")
INTERMEDIATES += ("roundabout_merge_111", "static_obstacle_109")


def position_error(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> float:
    return float(np.hypot(*(ours - theirs)[..., :2].reshape(-1, 2).T).max())


def heading_error(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> float:
    return float(np.abs(wrap_angle((ours - theirs)[..., 2])).max())


def compare_references(folder: Path) -> Iterator[tuple[str, float, float]]:
    """Name, position and heading error of every reference of a folder, both versions."""
    for scene in read_vectors(folder):
        for version in VERSIONS:
            plan = plan_pdm_closed(scene.reference, version=version)
            expected = getattr(scene.reference, f"pdm_reference_{version}")
            yield scene.name, position_error(plan.reference, expected), heading_error(plan.reference, expected)


def test_references_of_the_synthetic_scenes(navsim_golden: Path) -> None:
    compared = list(compare_references(navsim_golden / "golden"))
    assert len(compared) == 30
    for name, metres, radians in compared:
        assert metres < KNIFE_EDGES.get(name, 1e-8), name
        assert radians < 1e-7, name


def test_references_of_the_recorded_scenes(recorded_scenes: Path) -> None:
    compared = list(compare_references(recorded_scenes / "golden"))
    assert len(compared) == 40
    for name, metres, radians in compared:
        assert metres < 1e-8, name
        assert radians < 1e-8, name


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", INTERMEDIATES)
def test_intermediates(navsim_golden: Path, name: str, version: Version) -> None:
    reference = read_vector(navsim_golden / "golden" / f"pub_{name}.scene.json").reference
    with np.load(navsim_golden / "golden_pdm_closed" / f"pub_{name}.pdm_closed.npz") as archive:
        expected = {key.removeprefix(f"{version}_"): archive[key] for key in archive.files if key.startswith(version)}
    plan = plan_pdm_closed(reference, version=version)
    np.testing.assert_allclose(plan.scores, expected["scores"], atol=1e-9)
    np.testing.assert_allclose(plan.idm[:, :41], expected["idm"][:, :41], atol=1e-8)
    np.testing.assert_allclose(plan.lead[:, :41], expected["lead"][:, :41], atol=1e-8)
    assert position_error(plan.proposals[:, :41], expected["proposals"][:, :41]) < 1e-8
    assert heading_error(plan.proposals[:, :41], expected["proposals"][:, :41]) < 1e-8
    assert position_error(plan.trajectory, expected["traj51"]) < 1e-8
    # Proposals behind the same queue may end up identical; then rounding decides which index is the first best.
    best = int(expected["best"])
    assert plan.best == best or position_error(plan.proposals[plan.best, :41], plan.proposals[best, :41]) < 1e-12
    np.testing.assert_array_equal(np.delete(plan.proposals[:, 41:], plan.best, axis=0), 0.0)
    if plan.best == best:
        np.testing.assert_allclose(plan.idm[best], expected["idm"][best], atol=1e-8)
        np.testing.assert_allclose(plan.lead[best], expected["lead"][best], atol=1e-8)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_free_road_is_driven_on_the_centreline_at_the_limit(version: Version) -> None:
    plan = plan_pdm_closed(straight_road(ego_speed=10.0, speed_limit=10.0), version=version)
    assert plan.best == 4
    np.testing.assert_allclose(plan.trajectory[:, 1:], 0.0, atol=1e-12)
    # The first 0.1 s always brakes at 3 m/s^2, though nothing is there.
    np.testing.assert_allclose(plan.trajectory[:3, 0], [0.0, 1.0, 1.97], atol=1e-12)
    assert plan.scores[4] == pytest.approx(1.0)


def test_the_reference_is_the_trajectory_at_truncated_times() -> None:
    t0_us = 1_630_753_888_518_125
    plan = plan_pdm_closed(replace(straight_road(), t0_us=t0_us), version="v1")
    early = np.array([int((0.1 * k + t0_us * 1e-6) * 1e6) - (t0_us + 100_000 * k) for k in range(41)])
    assert set(early[1:]) == {-1, 0}
    steps = np.diff(plan.trajectory[:41, 0], prepend=0.0) / 0.1
    np.testing.assert_allclose(plan.reference[:, 0], plan.trajectory[:41, 0] + early * 1e-6 * steps, atol=1e-12)


def test_a_car_parked_on_the_right_is_passed_on_the_left() -> None:
    # It blocks the centre corridor (its edge at -1 m) but not the one that starts at -0.1485 m.
    plan = plan_pdm_closed(straight_road([agent(25.0, -2.0)], ego_speed=8.0), version="v1")
    assert plan.best == 14
    np.testing.assert_allclose(plan.trajectory[:, 1], 1.0, atol=1e-12)


def test_inside_a_red_connector_v2_rates_all_zero_and_takes_the_first() -> None:
    scene = straight_road(red=[rectangle(-5.0, 20.0, -2.0, 2.0)])
    v2 = plan_pdm_closed(scene, version="v2")
    assert v2.best == 0
    np.testing.assert_array_equal(v2.scores, 0.0)
    assert plan_pdm_closed(scene, version="v1").best == 4


def test_the_recorded_future_is_not_read() -> None:
    scene = straight_road([agent(40.0, velocity=(5.0, 0.0))])
    rng = np.random.default_rng(0)
    pose = scene.agent_pose.copy()
    pose[:, 1:] += rng.normal(size=pose[:, 1:].shape)
    valid = scene.agent_valid.copy()
    valid[:, 1:] = False
    other = replace(scene, agent_pose=pose, agent_valid=valid, human_poses=scene.human_poses + 1.0)
    np.testing.assert_array_equal(
        plan_pdm_closed(scene, version="v1").trajectory, plan_pdm_closed(other, version="v1").trajectory
    )


def test_the_frame_of_the_world_plays_no_part() -> None:
    people = [agent(40.0, velocity=(5.0, 0.0)), agent(25.0, 2.5)]
    origin = (664_000.0, 3_998_000.0, 2.5)
    # The ego is at no vertex and no corridor ends at one, where rounding would decide.
    here = plan_pdm_closed(straight_road(people, spacing=0.7, speed_limit=10.3), version="v2")
    there = plan_pdm_closed(straight_road(people, spacing=0.7, speed_limit=10.3, origin=origin), version="v2")
    assert there.best == here.best
    np.testing.assert_allclose(to_ego_frame(there.trajectory, np.array(origin)), here.trajectory, atol=1e-7)


@pytest.mark.parametrize("speed", [8.0, -1.0])
def test_proposals_start_with_the_signed_longitudinal_speed(speed: float) -> None:
    scene = straight_road(ego_speed=speed)
    ego = scene.ego_init.copy()
    ego[4] = 3.0  # a sideways velocity plays no part
    plan = plan_pdm_closed(replace(scene, ego_init=ego), version="v1")
    np.testing.assert_array_equal(plan.idm[:, 0, 1], speed)


def test_an_ego_beside_the_road_is_steered_back_and_the_plan_starts_on_the_path() -> None:
    scene = straight_road()
    ego = scene.ego_init.copy()
    ego[1] = 0.7
    plan = plan_pdm_closed(replace(scene, ego_init=ego), version="v2")
    np.testing.assert_allclose(plan.proposals[::5, 0, 1], [0.0, -1.0, 1.0], atol=1e-12)
    assert plan.best == 4
    np.testing.assert_allclose(plan.trajectory[:, 1], 0.0, atol=1e-12)


def test_an_unknown_limit_means_15_mps() -> None:
    unknown = plan_pdm_closed(straight_road(speed_limit=float("nan")), version="v1")
    fifteen = plan_pdm_closed(straight_road(speed_limit=15.0), version="v1")
    np.testing.assert_array_equal(unknown.trajectory, fifteen.trajectory)


@pytest.mark.parametrize("limit", [0.0, -3.0, float("inf")])
def test_a_limit_that_is_not_positive_is_refused(limit: float) -> None:
    with pytest.raises(DataError, match="speed_limit must be positive"):
        plan_pdm_closed(straight_road(speed_limit=limit), version="v1")


def as_scene(reference: SceneReference) -> Scene:
    observation = Observation(
        ego_history=np.zeros((4, 8)),
        agents=np.zeros((0, 4, 5)),
        agents_valid=np.zeros((0, 4), dtype=np.bool_),
        agents_size=np.zeros((0, 2)),
        agents_type=np.zeros(0),
        map_xy=np.zeros((2, 2)),
        map_offsets=np.array([0, 2]),
        map_type=np.zeros(1),
        map_speed_limit=np.zeros(1),
        map_on_route=np.ones(1, dtype=np.bool_),
        map_red=np.zeros(1, dtype=np.bool_),
        route_xy=np.zeros((2, 2)),
        command=1,
    )
    return Scene("token", "straight", "cluster", False, observation, reference)


def test_attached_references_are_those_of_the_plans() -> None:
    reference = straight_road(red=[rectangle(-5.0, 20.0, -2.0, 2.0)])
    scene = attach_references(as_scene(reference))
    plans: list[PdmClosedPlan] = [plan_pdm_closed(reference, version=version) for version in VERSIONS]
    np.testing.assert_array_equal(scene.reference.pdm_reference_v1, plans[0].reference)
    np.testing.assert_array_equal(scene.reference.pdm_reference_v2, plans[1].reference)
    assert position_error(plans[0].reference, plans[1].reference) > 1.0
