"""Scenes and plans that are not as they should be: scored as they stand, or refused with token and reason."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from oracles.judge import judge, seen_once
from oracles.stand_in import make_scene
from oracles.straight_road import straight_road
from oracles.tiny_scene import Agent, make_reference, straight_plan

from rewards.carriers import Scores
from rewards.compose import RewardSpec, build_reward
from rewards.epdms import prepare_epdms, score_epdms
from rewards.pdm_closed import plan_pdm_closed
from rewards.pdms import score_pdms
from rewards.prepare import prepare_scene
from rewards.service import LocalRewardService
from rlhf_drive.errors import DataError
from rlhf_drive.scenes import Scene, SceneReference, Trajectories

FAST = straight_plan(10.0)
T0_US = 10_000_000


def scene_of(token: str, reference: SceneReference) -> Scene:
    """A scene that scorers can read; what a policy would see of it plays no part."""
    return replace(make_scene(token), reference=reference)


def scored(
    reference: SceneReference, plan: np.ndarray, previous: np.ndarray | None = None, *, scorer: str = "epdms"
) -> Scores:
    """Scores of two plans through the service: `plan` in a scene of its own, then a sound one in a sound scene."""
    sound = made()
    scenes = [scene_of("bad", reference), scene_of("sound", sound)]
    plans = np.stack([plan, straight_plan(10.0)])
    before = None if previous is None else Trajectories(np.stack([previous, straight_plan(10.0)]), np.arange(2), 0.5)
    with LocalRewardService(build_reward([RewardSpec(scorer)], scorer=scorer), workers=1) as service:
        return service.score(scenes, Trajectories(plans, np.arange(2), 0.5), before)


def made(**changes: object) -> SceneReference:
    """The tiny scene with both references of PDM-Closed."""
    reference = make_reference()
    return replace(reference, pdm_reference_v2=reference.pdm_reference_v1, **changes)


def assert_lost_alone(scores: Scores, kind: str, *words: str) -> None:
    """Row 0 has no number but a reason with the scene's token; row 1 is scored."""
    assert scores.valid.tolist() == [False, True]
    assert np.isnan(scores.total[0])
    assert scores.total[1] == pytest.approx(1.0, abs=1e-9)
    assert list(scores.failures) == [0]
    assert scores.failures[0].kind == kind
    for word in ("'bad'", *words):
        assert word in scores.failures[0].reason


def test_an_agent_valid_at_one_step_is_there_at_that_step_alone() -> None:
    """NAVSIM shows a track of one sighting at every step; it does so when it caches, so `agent_valid` says it already.

    The scorer takes presence as it is given: the same box counts at step 10 only, or throughout.
    """
    once, always = seen_once(10, 30.0, length=1.0), Agent(path=np.tile([30.0, 0.0, 0.0], (51, 1)), vx=3.0, length=1.0)
    assert judge(once).nc[0] == 1.0
    assert judge(always).nc[0] == 0.0
    assert judge(seen_once(26, 30.0, length=1.0)).first_fault_step[0] == 26.0  # the bumper is at 30.049


@pytest.mark.parametrize("agents", [[], [Agent(x=20.0, seen=(0,))]], ids=["nobody", "gone after t=0"])
def test_zero_agents(agents: list[Agent]) -> None:
    reference = make_reference(agents=agents)
    reference = replace(reference, pdm_reference_v2=reference.pdm_reference_v1)
    plan = straight_plan(10.0)[None]
    assert score_pdms(prepare_scene(reference), plan).pdms[0] == pytest.approx(1.0, abs=1e-9)
    assert score_epdms(prepare_epdms(reference), plan, plan).epdms[0] == pytest.approx(1.0, abs=1e-9)


def test_a_centreline_of_one_point_is_refused() -> None:
    with pytest.raises(DataError, match="centerline needs at least two points; got 1"):
        replace(make_reference(), centerline=make_reference().centerline[:1])


@pytest.mark.parametrize("scorer", ["pdms", "epdms"])
def test_a_centreline_in_one_place_costs_the_scene(scorer: str) -> None:
    line = np.repeat(make_reference().centerline[:1], 3, axis=0)
    assert_lost_alone(scored(made(centerline=line), FAST, scorer=scorer), "invalid_scene", "3 points in one place")
    with pytest.raises(DataError, match="3 points in one place"):
        plan_pdm_closed(made(centerline=line), version="v1")


def test_repeated_points_of_the_centreline_change_nothing() -> None:
    """Joints of lanes repeat a vertex: progress, lane keeping and PDM-Closed are those of the clean line."""
    reference = make_reference()
    doubled = replace(reference, centerline=np.repeat(reference.centerline, 2, axis=0))
    plan = straight_plan(7.0, y=0.7)[None]
    one, other = (score_pdms(prepare_scene(r), plan) for r in (reference, doubled))
    assert (other.progress_m[0], other.pdms[0]) == (one.progress_m[0], one.pdms[0])
    road = straight_road()
    repeated = replace(road, centerline=np.repeat(road.centerline, 2, axis=0))
    np.testing.assert_allclose(
        plan_pdm_closed(repeated, version="v2").reference, plan_pdm_closed(road, version="v2").reference, atol=1e-9
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"agent_size": np.array([[-4.0, 2.0]])}, "agent_size must not be negative; got -4 m"),
        ({"agent_type": np.array([9])}, "agent_type holds 9, which is no AgentType"),
        ({"map_layer": np.array([0, 0, 12])}, "map_layer holds 12, which is no MapLayer"),
        (
            {"agent_pose": np.full((1, 51, 3), np.nan)},
            r"agent_pose holds a value that is not finite at index \[0, 0, 0\]",
        ),
        ({"map_xy": np.full((12, 2), np.inf)}, "map_xy holds a value that is not finite"),
        ({"agent_pose": np.zeros((1, 50, 3))}, r"agent_pose must have shape \[1, 51, 3\]; got \[1, 50, 3\]"),
        ({"human_poses": np.zeros((7, 3))}, r"human_poses must have shape \[8, 3\]"),
        ({"map_offsets": np.array([0, 8, 4, 12])}, "map_offsets must rise from 0 to 12"),
        (
            {"map_layer": np.zeros(0), "map_on_route": np.zeros(0), "map_xy": np.zeros((0, 2)), "map_offsets": [0]},
            "no map",
        ),
    ],
)
def test_scenes_that_cannot_be_meant_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        replace(make_reference(agents=[Agent(x=20.0)]), **changes)


@pytest.mark.parametrize(
    ("times_us", "words"),
    [
        ([8_500_000, 8_400_000, 9_500_000, 10_000_000], "past_times_us must rise; got [8500000, 8400000"),
        ([8_500_000, 9_000_000, 9_000_000, 10_000_000], "past_times_us must rise"),
        ([7_000_000, 7_500_000, 8_000_000, 8_500_000], "lead up to t0_us within 10 s; got [-3000000"),
        ([9_999_997, 9_999_998, 9_999_999, 10_000_000], "lead up to t0_us"),
        ([0, 500_000, 1_000_000, 10_000_000], "lead up to t0_us"),
    ],
    ids=["falling", "standing still", "another clock", "no past at all", "ten seconds"],
)
def test_past_times_that_do_not_match_cost_the_scene(times_us: list[int], words: str) -> None:
    """A past of 1.6e9 s, as times that were left at 0 would make it, would be sampled every 0.1 s."""
    assert_lost_alone(scored(made(past_times_us=np.array(times_us)), FAST), "invalid_scene", words)


def test_pdms_does_not_ask_for_the_past() -> None:
    scores = scored(made(past_times_us=np.array([3, 2, 1, 0])), FAST, scorer="pdms")
    assert scores.valid.all()


@pytest.mark.parametrize("gap_us", [-500_000, 0, 550_000, 5_000_000], ids=str)
def test_a_previous_frame_out_of_time_costs_rows_that_need_it(gap_us: int) -> None:
    """Later than t0, at the same time, 0.55 s ago and more: NAVSIM asserts 0 < dt < 0.55."""
    reference = made(prev_t0_us=T0_US - gap_us)
    assert_lost_alone(scored(reference, FAST, FAST), "raised", "prev_t0_us lies", "0.55 s")
    assert scored(reference, FAST).valid.all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("of_previous", [False, True])
def test_plans_that_are_not_finite_cost_their_row(value: float, of_previous: bool) -> None:
    bad = FAST.copy()
    bad[3, 1] = value
    scores = scored(made(), FAST, bad) if of_previous else scored(made(), bad, FAST)
    assert_lost_alone(scores, "invalid_plan", "not finite")


@pytest.mark.parametrize("scorer", ["pdms", "epdms"])
def test_plans_whose_simulation_overflows_cost_their_row(scorer: str) -> None:
    assert_lost_alone(scored(made(), straight_plan(1e300), scorer=scorer), "not_finite")


@pytest.mark.parametrize("speed", [1e4, 1e9, 1e100])
def test_huge_plans_are_scored_as_what_they_are_off_the_road(speed: float) -> None:
    scores = scored(made(), straight_plan(speed))
    assert scores.valid.all()
    assert scores.total[0] == 0.0


@pytest.mark.parametrize(
    ("poses", "dt_s", "message"),
    [
        (np.zeros((2, 7, 3)), 0.5, "must have 8 poses 0.5 s apart"),
        (np.zeros((2, 8, 3)), 0.4, "got 8 poses 0.4 s apart"),
        (np.zeros((2, 8, 2)), 0.5, r"\[\*, \*, 3\]|shape"),
        (np.zeros((8, 3)), 0.5, "shape"),
    ],
)
def test_plans_of_another_shape_are_refused(poses: np.ndarray, dt_s: float, message: str) -> None:
    with (
        LocalRewardService(build_reward([RewardSpec("pdms")]), workers=1) as service,
        pytest.raises(DataError, match=message),
    ):
        service.score([scene_of("a", made())], Trajectories(poses, np.zeros(2, dtype=np.int64), dt_s))


@pytest.mark.parametrize("scorer", ["pdms", "epdms"])
def test_scenes_without_their_progress_reference_are_refused(scorer: str) -> None:
    nothing = np.zeros((0, 3))
    bare = replace(made(), pdm_reference_v1=nothing, pdm_reference_v2=nothing)
    assert_lost_alone(scored(bare, FAST, scorer=scorer), "invalid_scene", "must be [41, 3]")


def test_a_human_plan_that_overflows_costs_the_scene() -> None:
    scores = scored(made(human_poses=straight_plan(1e300)), FAST)
    assert_lost_alone(scores, "invalid_scene", "human_poses leads to simulated states that are not finite")
