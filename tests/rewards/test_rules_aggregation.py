"""EPDMS from end to end: who is on the road, whose zeros are forgiven, what progress is measured by, the weights."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from oracles import filtered
from oracles.tiny_scene import (
    ROAD,
    ROUTE_LANE,
    TWO_LANES,
    Agent,
    Polygon,
    make_reference,
    rectangle,
    straight_plan,
)

from rewards.epdms import EpdmsResult, combine_epdms, prepare_epdms, score_epdms
from rlhf_drive.scenes import AgentType, MapLayer, SceneReference

CONE = Agent(x=30.0, kind=AgentType.STATIC, length=0.5, width=0.5)
OFF_ROAD: list[Polygon] = [ROUTE_LANE]
RED = [rectangle(35.0, 60.0, -2.0, 2.0)]
"""A red connector that the front of an ego at 10 m/s enters after 3.1 s."""
SLOW, FAST = straight_plan(5.0), straight_plan(10.0)
CROSSING: Polygon = (MapLayer.INTERSECTION, False, rectangle(-50, 150, -20, 20))
BESIDE = Agent(x=1.461, y=2.0, vx=10.0, length=2.0, seen=tuple(range(20, 51)))
"""From step 20 on at the left side of an ego at 10 m/s: no fault in a lane, but a failure of TTC in an intersection."""
COMPONENTS = ("nc", "dac", "ddc", "tlc", "ep", "ttc", "lk", "hc", "ec")


def scene(*, human: np.ndarray = FAST, **options: object) -> SceneReference:
    """A tiny scene whose PDM-Closed of v2 is that of v1, with a human plan."""
    reference = make_reference(**options)  # type: ignore[arg-type]
    return replace(reference, pdm_reference_v2=reference.pdm_reference_v1, human_poses=human)


def score(
    reference: SceneReference, plan: np.ndarray = FAST, previous: np.ndarray | None = None, *, human_filter: str = "on"
) -> EpdmsResult:
    before = None if previous is None else previous[None]
    return score_epdms(prepare_epdms(reference), plan[None], before, human_filter=human_filter)


def beside(y: float, speed: float = 10.0) -> np.ndarray:
    """A plan that swings `y` m to the left within the first pose and stays there."""
    return straight_plan(speed, y=y)


def test_a_plan_like_everybody_elses_scores_one() -> None:
    result = score(scene(), FAST, FAST)
    assert [getattr(result, name)[0] for name in COMPONENTS] == pytest.approx([1.0] * 9, abs=1e-9)
    assert result.epdms[0] == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize(("gap", "nc"), [(-1e-6, 1.0), (1e-6, 0.0)], ids=["touching", "apart"])
@pytest.mark.parametrize("kind", [AgentType.VEHICLE, AgentType.STATIC])
def test_who_touches_the_ego_at_t0_is_gone_for_the_whole_drive(gap: float, nc: float, kind: AgentType) -> None:
    """Rear bumper at 4.049 + gap: removed when it touches, run over (0, static 0.5) when it does not."""
    ahead = Agent(x=4.049 + gap + 2.0, vx=2.0, kind=kind)
    result = score(scene(agents=[ahead]), human_filter="off")
    expected = 0.5 if nc == 0.0 and kind == AgentType.STATIC else nc
    assert (result.nc[0], result.ttc[0]) == (expected, nc)


def test_who_comes_later_to_where_the_ego_stood_is_not_gone() -> None:
    """The box at the ego's place is seen from step 1 on only: at t=0 it is not there to overlap."""
    late = Agent(x=4.0, vx=2.0, seen=tuple(range(1, 51)))
    assert score(scene(agents=[late]), human_filter="off").nc[0] == 0.0


def test_the_reference_and_the_human_drive_in_the_same_traffic() -> None:
    """A car that overlaps at t=0 spoils neither: the reference keeps its 40 m, the human his collision score."""
    prepared = prepare_epdms(scene(agents=[Agent(x=5.0, vx=2.0)]))
    assert prepared.reference_progress_m == pytest.approx(40.0, abs=1e-3)
    assert prepared.human is not None
    assert prepared.human.nc == 1.0


def test_progress_of_the_plan_itself_is_not_masked() -> None:
    """NC .5: v1 would halve the own 40 m against the reference's 40 * .5; v2 takes 40 / max(20, 20), clipped to 1."""
    result = score(scene(agents=[CONE]), human_filter="off")
    assert (result.nc[0], result.ep[0]) == (0.5, 1.0)
    off_road = score(scene(polygons=OFF_ROAD, pdm_speed=10.0), SLOW, human_filter="off")
    assert (off_road.dac[0], off_road.ep[0]) == (0.0, 1.0)


def test_progress_is_clipped_at_the_references() -> None:
    result = score(scene(pdm_speed=5.0), FAST, human_filter="off")
    assert result.ep[0] == 1.0
    slower = score(scene(pdm_speed=10.0), SLOW, human_filter="off")
    prepared = prepare_epdms(scene(pdm_speed=10.0))
    assert slower.ep[0] == pytest.approx(slower.progress_m[0] / prepared.reference_progress_m, abs=1e-12)
    assert 0.5 < slower.ep[0] < 0.8


@pytest.mark.parametrize(
    "options",
    [
        {"red": RED},
        {"polygons": [(MapLayer.LANE, False, rectangle(-50, 150, -2, 2)), ROAD]},
        {"polygons": [ROUTE_LANE, (MapLayer.ROADBLOCK, False, rectangle(-50, 36.0, -6, 6))]},
        {"agents": [Agent(x=40.0)]},
    ],
    ids=["TLC", "DDC", "DAC", "NC"],
)
def test_a_reference_that_fails_is_no_bar(options: dict[str, object]) -> None:
    """The reference drives 40 m and fails; a plan of 20 m is then compared with itself alone."""
    reference = scene(**options)
    assert prepare_epdms(reference).reference_progress_m == 0.0
    assert score(reference, SLOW, human_filter="off").ep[0] == 1.0


def test_progress_counts_from_5_m_on() -> None:
    """The reference gets 4.0 m: EP is 1, even off the road (v1 gives 0 there). 5.6 m: EP is the quotient."""
    crawl = straight_plan(0.2)
    assert score(scene(speed=1.0, pdm_speed=1.0), crawl, human_filter="off").ep[0] == 1.0
    off_road = score(scene(speed=1.0, pdm_speed=1.0, polygons=OFF_ROAD), crawl, human_filter="off")
    assert (off_road.dac[0], off_road.ep[0]) == (0.0, 1.0)
    farther = scene(speed=1.0, pdm_speed=1.4)
    bar = prepare_epdms(farther).reference_progress_m
    assert 5.0 < bar < 6.0
    result = score(farther, crawl, human_filter="off")
    assert result.ep[0] == pytest.approx(result.progress_m[0] / bar, abs=1e-12)
    assert result.ep[0] < 0.5


FAILING: dict[str, tuple[dict[str, object], np.ndarray]] = {
    "nc": ({"agents": [Agent(x=40.0)]}, FAST),
    "dac": ({"polygons": [ROUTE_LANE, (MapLayer.ROADBLOCK, False, rectangle(-50, 36.0, -6, 6))]}, FAST),
    "ddc": ({"polygons": [(MapLayer.LANE, False, rectangle(-50, 150, -2, 2)), ROAD]}, FAST),
    "tlc": ({"red": RED}, FAST),
    "ttc": ({"agents": [BESIDE], "polygons": [*TWO_LANES, CROSSING]}, FAST),
    "lk": ({}, beside(0.8)),
}
"""By sub-score: a scene and a plan that has 0 in it."""


@pytest.mark.parametrize("name", FAILING)
def test_what_the_human_fails_in_is_forgiven(name: str) -> None:
    """The human drives the same plan. Filter on: 1 instead of 0, in the aggregate too; a better human: it stays 0."""
    options, plan = FAILING[name]
    same, better = scene(human=plan, **options), scene(human=straight_plan(4.0), **options)
    raw = score(same, plan, plan, human_filter="off")
    forgiven = score(same, plan, plan)
    assert (getattr(raw, name)[0], getattr(forgiven, name)[0]) == (0.0, 1.0)
    assert forgiven.raw[name][0] == 0.0
    columns = {part: getattr(forgiven, part) for part in COMPONENTS}
    assert forgiven.epdms[0] == pytest.approx(combine_epdms(columns, with_ec=True)[0], abs=1e-15)
    assert forgiven.epdms[0] > raw.epdms[0]
    old = score(same, plan, plan, human_filter="pre_2025_09_29")
    assert (getattr(old, name)[0], old.epdms[0]) == (1.0, raw.epdms[0])
    if name != "ddc":  # on this road nobody drives on the route
        assert getattr(score(better, plan), name)[0] == 0.0


def test_half_a_collision_of_the_human_forgives_nothing() -> None:
    """Only an exact 0 does: NC .5 and DDC .5 stay."""
    hit = score(scene(agents=[CONE]))
    assert (hit.raw["nc"][0], hit.nc[0]) == (0.5, 0.5)
    off_route: list[Polygon] = [(MapLayer.LANE, True, rectangle(-50, 25.461, -2, 2)), ROAD]
    astray = score(scene(polygons=off_route, speed=4.0, human=straight_plan(4.0)), straight_plan(4.0))
    assert (astray.raw["ddc"][0], astray.ddc[0]) == (1.0, 1.0)
    short: list[Polygon] = [(MapLayer.LANE, True, rectangle(-50, 5.0, -2, 2)), ROAD]
    astray = score(scene(polygons=short, speed=4.0, human=straight_plan(4.0)), straight_plan(4.0))
    assert (astray.raw["ddc"][0], astray.ddc[0]) == (0.5, 0.5)


def test_the_human_forgives_neither_discomfort_nor_changes_of_mind() -> None:
    """A jolting human is not asked for HC (no past is passed for him), and EC is never filtered."""
    jolt = straight_plan(10.0)
    jolt[1::2, 0] += 2.0
    result = score(scene(human=jolt), jolt, SLOW)
    assert (result.hc[0], result.ec[0]) == (0.0, 0.0)


def test_progress_is_not_normalised_anew_after_forgiving() -> None:
    """Everybody is off the road: the reference's masked progress is 0, so a plan of half the way has EP 1, forgiven
    or not. With the forgiven multipliers it would be 0.5."""
    reference = scene(polygons=OFF_ROAD)
    assert score(reference, SLOW, human_filter="off").ep[0] == 1.0
    forgiven = score(reference, SLOW)
    assert (forgiven.dac[0], forgiven.ep[0]) == (1.0, 1.0)


def test_weights_with_and_without_the_previous_frame() -> None:
    """nc .5, dac 1, ddc .5, tlc 1; ep .3, ttc 1, lk 0, hc 1, ec 0: .25 (1.5 + 5 + 0 + 2 + 0) / 16, or / 14."""
    values = {"nc": 0.5, "dac": 1.0, "ddc": 0.5, "tlc": 1.0, "ep": 0.3, "ttc": 1.0, "lk": 0.0, "hc": 1.0, "ec": 0.0}
    columns = {name: np.array([value]) for name, value in values.items()}
    assert combine_epdms(columns, with_ec=True)[0] == pytest.approx(0.25 * 8.5 / 16.0, abs=1e-15)
    assert combine_epdms(columns, with_ec=False)[0] == pytest.approx(0.25 * 8.5 / 14.0, abs=1e-15)


@pytest.mark.parametrize(("name", "weight"), [("ep", 5.0), ("ttc", 5.0), ("lk", 2.0), ("hc", 2.0), ("ec", 2.0)])
def test_weight_of_each_sub_score(name: str, weight: float) -> None:
    columns = {part: np.ones(1) for part in COMPONENTS} | {name: np.zeros(1)}
    assert combine_epdms(columns, with_ec=True)[0] == pytest.approx(1.0 - weight / 16.0, abs=1e-15)
    without = 1.0 if name == "ec" else 1.0 - weight / 14.0
    assert combine_epdms(columns, with_ec=False)[0] == pytest.approx(without, abs=1e-15)


@pytest.mark.parametrize("name", ["nc", "dac", "ddc", "tlc"])
def test_multipliers(name: str) -> None:
    columns = {part: np.ones(1) for part in COMPONENTS} | {name: np.full(1, 0.5)}
    assert combine_epdms(columns, with_ec=True)[0] == 0.5


@pytest.mark.parametrize(("gap_us", "offset"), [(500_000, 5), (499_990, 5), (300_000, 3), (549_999, 5)])
def test_frames_overlap_by_the_time_between_them(gap_us: int, offset: int) -> None:
    """EC of a braking and swerving plan against another one, from the simulated states of both."""
    reference = scene()
    prepared = prepare_epdms(replace(reference, prev_t0_us=reference.t0_us - gap_us))
    plan, previous = straight_plan(8.0, y=1.0), straight_plan(11.0)
    previous[:, 2] = 0.1
    result = score_epdms(prepared, plan[None], previous[None])
    expected = filtered.frame_rms(result.states[0], result.previous_states[0], offset)
    np.testing.assert_allclose(result.ec_rms[0], expected, atol=1e-6)
    assert (expected > 1e-3).all()


@pytest.mark.parametrize(("part", "limit"), [(0, 0.7), (1, 0.5), (2, 0.1), (3, 0.1)])
def test_each_difference_between_frames_has_its_limit(part: int, limit: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Acceleration, jerk, yaw rate, yaw acceleration; each may reach its limit and not pass it."""

    def ec_at(value: float) -> float:
        def differences(states: object, previous: object, offset: int, rms: np.ndarray) -> None:
            rms[:] = 0.0
            rms[:, part] = value

        monkeypatch.setattr("rewards.epdms.frame_differences", differences)
        return float(score(scene(), FAST, FAST).ec[0])

    assert (ec_at(limit), ec_at(limit + 1e-9)) == (1.0, 0.0)


def test_the_previous_plan_starts_from_the_previous_ego() -> None:
    """The same two plans, 10 m/s: with an ego that drove 6 m/s half a second ago they differ, with 10 m/s hardly."""
    steady = score(scene(), FAST, FAST)
    before = make_reference().prev_ego_init.copy()
    before[3] = 6.0
    faster = score(replace(scene(), prev_ego_init=before), FAST, FAST)
    assert steady.ec[0] == 1.0
    assert faster.ec[0] == 0.0
    assert faster.previous_states[0, 0, 3] == 6.0
