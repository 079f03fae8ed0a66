"""PDMS against the official values, and its own rules on tiny scenes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from oracles.tiny_scene import ROUTE_LANE, Agent, make_reference, make_scene, rectangle, straight_plan, straight_states

from rewards.kernels.lanes import MULTIPLE_LANES, NON_DRIVABLE, ONCOMING
from rewards.kernels.score import V2_RULES, score_states
from rewards.pdms import PdmsResult, score_pdms
from rewards.prepare import PreparedScene, ReferencePlan, prepare_lights, prepare_scene
from rlhf_drive.errors import DataError
from rlhf_drive.scenes import AgentType, MapLayer
from rlhf_drive.scenes.importers.vectors import VectorScene, read_vectors

DISCRETE = ("nc", "dac", "ttc", "c", "ddc")


def official(scene: VectorScene, folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / f"{scene.name}.golden.npz", allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def assert_official(scene: VectorScene, golden: dict[str, np.ndarray]) -> None:
    """Every number of one vector scene: discrete metrics, score, progress, steps, areas, states."""
    prepared = prepare_scene(scene.reference)
    result = score_pdms(prepared, scene.candidates)
    assert result.valid.all()
    fragile = golden.get("v1_fragile_1e3", np.zeros((len(result.nc), len(DISCRETE)), dtype=bool))
    for i, name in enumerate(DISCRETE):
        differs = (getattr(result, name) != golden[f"v1_{name}"]) & ~fragile[:, i]
        assert not differs.any(), (scene.name, name, np.flatnonzero(differs))
    still = np.array([tag == "stand_still" for tag in scene.tags])
    assert (np.abs(result.pdms - golden["v1_pdms"]) <= np.where(still, 1e-3, 1e-6)).all(), scene.name
    assert (np.abs(result.ep - golden["v1_ep"]) <= np.where(still, 1e-3, 1e-6)).all(), scene.name
    sure = np.logical_not(fragile.any(axis=1))
    np.testing.assert_array_equal(result.first_fault_step[sure], golden["v1_t_col"][sure])
    np.testing.assert_array_equal(result.first_ttc_step[sure], golden["v1_t_ttc"][sure])
    np.testing.assert_array_equal(result.comfort[sure], golden["v1_comfort6"][sure])
    assert_official_states(prepared, result, golden, still, sure)
    pdm = prepared.reference
    assert pdm.progress_m == pytest.approx(golden["v1_pdm_progress_raw"].ravel()[0], abs=1e-6)
    assert [pdm.nc, pdm.dac] == golden["v1_pdm_multi"].reshape(-1, 2)[0].tolist()


def assert_official_states(
    prepared: PreparedScene,
    result: PdmsResult,
    golden: dict[str, np.ndarray],
    still: NDArray[np.bool_],
    sure: NDArray[np.bool_],
) -> None:
    x, y, heading = prepared.origin
    cos, sin = math.cos(heading), math.sin(heading)
    world_x = x + cos * result.states[..., 0] - sin * result.states[..., 1]
    world_y = y + sin * result.states[..., 0] + cos * result.states[..., 1]
    error = np.hypot(world_x - golden["sim"][..., 0], world_y - golden["sim"][..., 1]).max(axis=1)
    assert (error <= np.where(still, 0.05, 1e-4)).all()
    areas = score_states(prepared.road, prepared.agents, result.states).areas
    bits = np.stack([areas & bit != 0 for bit in (MULTIPLE_LANES, NON_DRIVABLE, ONCOMING)], axis=-1)
    assert (bits != golden["ego_areas"])[sure].sum() <= 2


def test_official_vectors(navsim_golden: Path) -> None:
    folder = navsim_golden / "golden"
    scenes = list(read_vectors(folder))
    assert len(scenes) == 15
    assert sum(len(scene.candidates) for scene in scenes) == 960
    for scene in scenes:
        assert_official(scene, official(scene, folder))


def test_official_vectors_on_recordings(recorded_scenes: Path) -> None:
    folder = recorded_scenes / "golden"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    scenes = list(read_vectors(folder))
    assert sum(len(scene.candidates) for scene in scenes) == 640
    for scene in scenes:
        assert_official(scene, official(scene, folder))


def test_v2_rules_that_need_no_history(navsim_golden: Path) -> None:
    folder = navsim_golden / "golden"
    for scene in read_vectors(folder):
        golden = official(scene, folder)
        prepared = prepare_scene(scene.reference)
        states = score_pdms(prepared, scene.candidates).states
        lights = prepare_lights(scene.reference)
        metrics = score_states(prepared.road, prepared.agents, states, rules=V2_RULES, lights=lights)
        fragile = golden["v2_fragile_1e3"]
        for name, column in (("tlc", 2), ("ddc", 3), ("lk", 5)):
            differs = (getattr(metrics, name) != golden[f"v2_raw_{name}"]) & ~fragile[:, column]
            assert not differs.any(), (scene.name, name)


def test_a_plan_like_the_reference_scores_one() -> None:
    result = score_pdms(make_scene(), straight_plan(10.0)[None])
    assert result.pdms[0] == pytest.approx(1.0, abs=1e-9)
    assert result.progress_m[0] == pytest.approx(40.0, abs=1e-4)


def test_weights_of_the_sub_scores() -> None:
    """EP 1 and comfortable, but 0.9 s from a wall: (5 + 0 + 2) / 12."""
    scene = make_scene(agents=[Agent(x=50.0)])
    result = score_pdms(scene, straight_plan(10.0)[None])
    assert (result.nc[0], result.ttc[0], result.c[0]) == (1.0, 0.0, 1.0)
    assert result.pdms[0] == pytest.approx(7.0 / 12.0, abs=1e-9)


def test_half_collision_counts_twice() -> None:
    """NC .5 halves the own progress (EP .5) and multiplies the sum: .5 (2.5 + 0 + 2) / 12 if TTC fails too."""
    cone = Agent(x=30.0, kind=AgentType.STATIC, length=0.5, width=0.5)
    scene = replace(make_scene(agents=[cone]), reference=ReferencePlan(40.0, 1.0, 1.0))
    result = score_pdms(scene, straight_plan(10.0)[None])
    assert (result.nc[0], result.ttc[0], result.c[0]) == (0.5, 0.0, 1.0)
    assert result.ep[0] == pytest.approx(0.5, abs=1e-5)
    assert result.pdms[0] == pytest.approx(0.5 * (2.5 + 2.0) / 12.0, abs=1e-5)


def test_a_failing_reference_does_not_count() -> None:
    scene = replace(make_scene(), reference=ReferencePlan(80.0, 0.0, 1.0))
    assert score_pdms(scene, straight_plan(10.0)[None]).ep[0] == 1.0
    half = replace(make_scene(), reference=ReferencePlan(160.0, 0.5, 1.0))
    assert score_pdms(half, straight_plan(10.0)[None]).ep[0] == pytest.approx(0.5, abs=1e-5)


def test_low_progress_counts_as_full_unless_the_plan_fails() -> None:
    """Below 5 m for both, EP is 1; a plan off the road gets 0."""
    crawling = make_scene(speed=1.0, pdm_speed=1.0)
    assert score_pdms(crawling, straight_plan(0.2)[None]).ep[0] == 1.0
    off_road = make_scene(speed=1.0, pdm_speed=1.0, polygons=[ROUTE_LANE])
    result = score_pdms(off_road, straight_plan(0.2)[None])
    assert (result.dac[0], result.ep[0]) == (0.0, 0.0)
    above = replace(crawling, reference=ReferencePlan(5.01, 1.0, 1.0))
    assert score_pdms(above, straight_plan(0.2)[None]).ep[0] < 0.5
    at = replace(crawling, reference=ReferencePlan(5.0, 1.0, 1.0))
    assert score_pdms(at, straight_plan(0.2)[None]).ep[0] == 1.0


def test_progress_is_never_normalised_over_the_batch() -> None:
    scene = make_scene()
    fast, slow = straight_plan(14.0), straight_plan(6.0)
    together = score_pdms(scene, np.stack([fast, slow]))
    assert together.ep[0] == 1.0
    assert together.ep[1] == score_pdms(scene, slow[None]).ep[0]
    own = together.progress_m[1] / scene.reference.progress_m
    assert together.ep[1] == pytest.approx(own, abs=1e-12)
    assert together.ep[1] > together.progress_m[1] / together.progress_m[0] + 0.1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e308])
def test_a_plan_that_is_not_finite_is_invalid_alone(value: float) -> None:
    plans = np.stack([straight_plan(10.0)] * 3)
    plans[1, 3, 0] = value
    result = score_pdms(make_scene(agents=[Agent(x=60.0)]), plans)
    assert result.valid.tolist() == [True, False, True]
    for name in ("nc", "dac", "ep", "ttc", "c", "ddc", "pdms", "progress_m"):
        assert np.isnan(getattr(result, name)).tolist() == [False, True, False], name
    assert result.pdms[0] == result.pdms[2]


def test_absurd_but_finite_plans_are_scored() -> None:
    result = score_pdms(make_scene(), np.stack([straight_plan(1e6), straight_plan(10.0, y=1e6)]))
    assert result.valid.all()
    assert result.dac.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("shape", [(8, 3), (2, 7, 3), (2, 8, 2)])
def test_plans_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"Plans must be \[B, 8, 3\]"):
        score_pdms(make_scene(), np.zeros(shape))


def test_no_plans_give_no_scores() -> None:
    assert score_pdms(make_scene(), np.zeros((0, 8, 3))).pdms.shape == (0,)


def test_a_scene_without_a_progress_reference_is_refused() -> None:
    reference = replace(make_reference(), pdm_reference_v1=np.zeros((0, 3)))
    with pytest.raises(DataError, match=r"pdm_reference_v1 must be \[41, 3\].*got shape \[0, 3\]"):
        prepare_scene(reference)


def test_degenerate_polygons_do_not_disturb() -> None:
    sound = make_scene(agents=[Agent(x=60.0)])
    layers = [ROUTE_LANE, (MapLayer.ROADBLOCK, False, rectangle(-50, 150, -2, 6))]
    broken = make_scene(
        agents=[Agent(x=60.0)],
        polygons=[
            *layers,
            (MapLayer.LANE, True, [(0.0, 3.0), (9.0, 3.0)]),
            (MapLayer.INTERSECTION, False, []),
            (MapLayer.CARPARK_AREA, False, [(0.0, 0.0), (5.0, 0.0), (9.0, 0.0)]),
        ],
    )
    plans = np.stack([straight_plan(10.0), straight_plan(8.0, y=2.0)])
    np.testing.assert_array_equal(score_pdms(broken, plans).pdms, score_pdms(sound, plans).pdms)
    assert score_pdms(make_scene(polygons=[layers[0], (MapLayer.ROADBLOCK, False, [])]), plans).dac.tolist() == [
        0.0,
        0.0,
    ]


def test_agents_of_no_size_and_agents_never_seen() -> None:
    point = Agent(x=20.0, length=0.0, width=0.0)
    never = Agent(x=20.0, seen=(0,))
    scene = make_scene(agents=[point])
    assert score_states(scene.road, scene.agents, straight_states(10.0)).first_fault_step[0] == 16.0
    gone = scene.agents._replace(valid=np.zeros_like(scene.agents.valid))
    assert score_states(scene.road, gone, straight_states(10.0)).nc[0] == 1.0
    scene = make_scene(agents=[never])
    assert score_states(scene.road, scene.agents, straight_states(10.0)).nc[0] == 1.0


def test_result_does_not_depend_on_where_the_world_is() -> None:
    reference = make_reference(agents=[Agent(x=25.0, y=1.0, vx=3.0)])
    shift = np.array([660_000.0, 4_000_000.0])

    def moved(array: np.ndarray) -> np.ndarray:
        out = array.copy()
        out[..., :2] += shift
        return out

    far = replace(
        reference,
        ego_init=moved(reference.ego_init),
        centerline=moved(reference.centerline),
        map_xy=moved(reference.map_xy),
        agent_pose=moved(reference.agent_pose),
        pdm_reference_v1=moved(reference.pdm_reference_v1),
    )
    plans = np.stack([straight_plan(v, y) for v, y in ((10.0, 0.3), (4.0, 1.0), (13.0, -0.2))])
    near_result, far_result = score_pdms(prepare_scene(reference), plans), score_pdms(prepare_scene(far), plans)
    np.testing.assert_allclose(far_result.pdms, near_result.pdms, atol=1e-7)
    np.testing.assert_array_equal(far_result.first_ttc_step, near_result.first_ttc_step)
