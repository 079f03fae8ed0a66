"""EPDMS on tiny scenes in which every score can be worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from oracles.tiny_epdms import COLUMNS, PLAN, prepared, reference
from oracles.tiny_scene import (
    LEFT_LANE,
    ROAD,
    ROUTE_LANE,
    TWO_LANES,
    Agent,
    Polygon,
    rectangle,
    straight_plan,
    straight_states,
)

from rewards.epdms import EpdmsResult, combine_epdms, score_epdms
from rewards.kernels.score import V2_RULES, score_states
from rewards.prepare import prepare_road
from rewards.prepare_epdms import PreparedEpdms, prepare_epdms
from rlhf_drive.scenes import AgentType, MapLayer


def with_line_at(scene: PreparedEpdms, y: float) -> PreparedEpdms:
    """The scene with its centreline moved sideways."""
    line = scene.road.centerline.copy()
    line[:, 1] = y
    return replace(scene, road=scene.road._replace(centerline=line))


def row(result: EpdmsResult, n: int = 0) -> dict[str, float]:
    return {name: float(getattr(result, name)[n]) for name in COLUMNS}


def test_a_plan_like_the_reference_scores_one() -> None:
    result = score_epdms(prepared(), PLAN, PLAN)
    assert row(result) == pytest.approx(dict.fromkeys(COLUMNS, 1.0), abs=1e-9)
    assert result.progress_m[0] == pytest.approx(40.0, abs=1e-4)
    assert result.ec_rms[0] == pytest.approx([0.0] * 4, abs=1e-9)
    assert result.previous_states.shape == (1, 41, 11)


def test_weights() -> None:
    """A column of 0 among ones takes its own weight away, or everything."""
    ones = {name: np.ones(1) for name in COLUMNS}
    for name, with_ec, without in (
        ("ep", 11 / 16, 9 / 14), ("ttc", 11 / 16, 9 / 14), ("lk", 14 / 16, 12 / 14), ("hc", 14 / 16, 12 / 14),
        ("ec", 14 / 16, 1.0), ("nc", 0.0, 0.0), ("dac", 0.0, 0.0), ("ddc", 0.0, 0.0), ("tlc", 0.0, 0.0),
    ):  # fmt: skip
        columns = {**ones, name: np.zeros(1)}
        assert combine_epdms(columns, with_ec=True)[0] == pytest.approx(with_ec, abs=1e-15), name
        assert combine_epdms(columns, with_ec=False)[0] == pytest.approx(without, abs=1e-15), name
    assert combine_epdms({**ones, "nc": np.full(1, 0.5), "ddc": np.full(1, 0.5)}, with_ec=True)[0] == 0.25


def test_without_a_previous_plan_ec_and_its_weight_are_left_out() -> None:
    """Braking, the ego covers 29.06 m, but at 3.1 s it would come as far as 29.41 m within another 0.9 s.
    A wall at 29.25 m from its front fails TTC alone: 9 of 14 without EC; EC, which fails too, makes it 9 of 16."""
    braking = straight_plan(10.0)[None]
    braking[0, :, 0] -= 0.75 * (0.5 * np.arange(1, 9)) ** 2
    scene = replace(prepared(agents=[Agent(x=29.25 + 4.049 + 2.0)]), reference_progress_m=10.0)
    alone = score_epdms(scene, braking, human_filter="off")
    assert np.isnan(alone.ec[0])
    assert np.isnan(alone.ec_rms).all()
    assert alone.previous_states.shape == (0, 41, 11)
    assert (alone.nc[0], alone.ttc[0], alone.hc[0], alone.ep[0]) == (1.0, 0.0, 1.0, 1.0)
    assert alone.epdms[0] == pytest.approx(9.0 / 14.0, abs=1e-12)
    both = score_epdms(scene, braking, PLAN, human_filter="off")
    assert (both.ec[0], both.epdms[0]) == (0.0, pytest.approx(9.0 / 16.0, abs=1e-12))


def off_road_human(**options: Any) -> PreparedEpdms:
    """A road of |y| < 2 that the human leaves to the right: DAC, DDC and LK 0."""
    human = straight_plan(10.0)
    human[:, 1] = [-1.0, -3.0, *[-5.0] * 6]
    return prepare_epdms(replace(reference(**options), human_poses=human))


def test_filter_forgives_what_the_human_fails() -> None:
    scene = off_road_human(polygons=[ROUTE_LANE, (MapLayer.ROADBLOCK, False, rectangle(-50, 150, -2, 2))])
    assert scene.human is not None
    assert (scene.human.nc, scene.human.dac, scene.human.ddc, scene.human.lk) == (1.0, 0.0, 0.0, 0.0)
    leaving = straight_plan(10.0)[None]
    leaving[0, :, 1] = [-1.0, -3.0, *[-5.0] * 6]
    off = score_epdms(scene, leaving, human_filter="off")
    assert (off.dac[0], off.lk[0], off.epdms[0]) == (0.0, 0.0, 0.0)
    on = score_epdms(scene, leaving)
    assert (on.dac[0], on.lk[0], on.ddc[0]) == (1.0, 1.0, 1.0)
    assert on.epdms[0] == combine_epdms({name: getattr(on, name) for name in COLUMNS}, with_ec=False)[0]
    assert {name: on.raw[name][0] for name in ("dac", "lk", "epdms")} == {"dac": 0.0, "lk": 0.0, "epdms": 0.0}
    before = score_epdms(scene, leaving, human_filter="pre_2025_09_29")
    assert (before.dac[0], before.lk[0], before.epdms[0]) == (1.0, 1.0, 0.0)


def test_filter_does_not_touch_comfort_or_progress() -> None:
    """A human who fails whatever can be failed: EP, HC and EC stay as they are."""
    scene = prepared()
    assert scene.human is not None
    scene = replace(scene, human=replace(scene.human, nc=0.0, dac=0.0, ddc=0.0, tlc=0.0, ttc=0.0, lk=0.0))
    braking, previous = straight_plan(2.0)[None], straight_plan(14.0)[None]
    on, off = (score_epdms(scene, braking, previous, human_filter=setting) for setting in ("on", "off"))
    assert (on.hc[0], on.ec[0]) == (off.hc[0], off.ec[0]) == (0.0, 0.0)
    assert on.ep[0] == off.ep[0]
    assert off.ep[0] < 0.5


def test_a_human_with_half_a_point_forgives_nothing() -> None:
    """A cone in the way gives the human NC .5 (and TTC 0): the plan keeps its own .5."""
    cone = Agent(x=30.0, kind=AgentType.STATIC, length=0.5, width=0.5)
    scene = prepared(agents=[cone])
    assert scene.human is not None
    assert (scene.human.nc, scene.human.ttc) == (0.5, 0.0)
    result = score_epdms(scene, PLAN)
    assert (result.nc[0], result.ttc[0]) == (0.5, 1.0)


def test_human_is_scored_without_history_and_progress() -> None:
    """Scored alone, HC and EP are 1 whatever came before, so neither is ever forgiven."""
    made = reference()
    jerky = made.past_states.copy()
    jerky[:, 5] = [0.0, -8.0, 8.0, 0.0]
    scene = prepare_epdms(replace(made, past_states=jerky, human_poses=straight_plan(3.0)))
    assert score_epdms(scene, PLAN).hc[0] == 0.0


def test_progress_is_the_plans_own_relative_to_the_masked_best() -> None:
    """NC .5 does not halve the plan's own 40 m (unmasked), but its 20 m cannot be the measure either."""
    cone = Agent(x=30.0, kind=AgentType.STATIC, length=0.5, width=0.5)
    scene = replace(prepared(agents=[cone]), reference_progress_m=80.0)
    assert score_epdms(scene, PLAN).nc[0] == 0.5
    assert score_epdms(scene, PLAN).ep[0] == pytest.approx(0.5, abs=1e-5)
    shorter = replace(scene, reference_progress_m=30.0)
    assert score_epdms(shorter, PLAN).ep[0] == 1.0
    slow = score_epdms(prepared(), straight_plan(6.0)[None])
    assert slow.ep[0] == pytest.approx(slow.progress_m[0] / 40.0, abs=1e-5)


def test_low_progress_counts_as_full_even_off_the_road() -> None:
    off_road = prepared(speed=1.0, pdm_speed=1.0, polygons=[ROUTE_LANE])
    result = score_epdms(off_road, straight_plan(0.2)[None], human_filter="off")
    assert (result.dac[0], result.ep[0]) == (0.0, 1.0)
    crawling = prepared(speed=1.0, pdm_speed=1.0)
    at, above = (replace(crawling, reference_progress_m=most) for most in (5.0, 5.01))
    assert score_epdms(at, straight_plan(0.2)[None]).ep[0] == 1.0
    assert score_epdms(above, straight_plan(0.2)[None]).ep[0] < 0.5


def test_a_failing_reference_is_no_measure() -> None:
    """PDM-Closed drives 40 m into a red light, or off the road, or the wrong way: nothing of it counts."""
    assert prepared().reference_progress_m == pytest.approx(40.0, abs=1e-4)
    assert prepared(red=[rectangle(20.0, 30.0, -2.0, 2.0)]).reference_progress_m == 0.0
    assert prepared(polygons=[ROUTE_LANE]).reference_progress_m == 0.0
    wrong_way = (MapLayer.LANE, False, ROUTE_LANE[2])
    assert prepared(polygons=[wrong_way, LEFT_LANE, ROAD]).reference_progress_m == 0.0
    assert prepared(agents=[Agent(x=30.0)]).reference_progress_m == 0.0
    assert prepared(polygons=[wrong_way, LEFT_LANE, ROAD], pdm_speed=3.0, speed=3.0).reference_progress_m == (
        pytest.approx(6.0, abs=0.01)
    )


def test_boxes_that_touch_the_ego_at_the_start_are_dropped() -> None:
    """The ego's front is at 4.049 m: a 4 m car centred at 6.048 touches it, one at 6.050 does not."""
    touching, apart = prepared(agents=[Agent(x=6.048)]), prepared(agents=[Agent(x=6.050)])
    assert (len(touching.agents.pose), len(apart.agents.pose)) == (0, 1)
    assert score_epdms(touching, PLAN).nc[0] == 1.0
    assert score_epdms(apart, PLAN, human_filter="off").nc[0] == 0.0
    cone = Agent(x=2.0, kind=AgentType.STATIC, length=0.5, width=0.5)
    assert len(prepared(agents=[cone]).agents.pose) == 0
    assert len(prepared(agents=[Agent(x=-1.0, y=2.0, length=2.0, width=2.0)]).agents.pose) == 0
    assert len(prepared(agents=[Agent(x=-1.0, y=2.2, length=2.0, width=2.0)]).agents.pose) == 1


def test_only_an_overlap_at_the_very_start_is_dropped() -> None:
    """The same car, first seen 0.1 s later, stays; one never seen in 4 s is left out."""
    later = prepared(agents=[Agent(x=6.048, seen=tuple(range(1, 51)))])
    assert len(later.agents.pose) == 1
    assert score_epdms(later, PLAN, human_filter="off").nc[0] == 0.0
    assert len(prepared(agents=[Agent(x=6.048, seen=tuple(range(41, 51)))]).agents.pose) == 0


def test_the_log_is_read_for_four_seconds() -> None:
    scene = prepared(agents=[Agent(x=60.0)])
    assert scene.agents.pose.shape[1] == scene.agents.valid.shape[1] == 41


def test_ttc_looks_ahead_in_steps_of_three() -> None:
    """Start steps end at 31. At step 39 somebody stands 0.8 s ahead of step 31 (which is not looked at) and out of
    reach of step 30 with 0.9 s: the ego has become faster in between."""
    states = straight_states(10.0)
    states[0, 31:, 3] = 13.0
    states[0, 31:, 0] += 0.3 * np.arange(10)
    front = 4.049
    reach_30, reach_31 = 30.0 + 0.9 * 10.0 + front, 31.0 + 0.8 * 13.0 + front
    assert reach_30 < reach_31 - 2.0
    agent = Agent(x=reach_30 + 1.0 + 2.0, seen=(39,))
    scene = prepared(agents=[agent])
    metrics = score_states(scene.road, scene.agents, states, rules=V2_RULES)
    assert metrics.ttc[0] == 1.0
    sooner = prepared(agents=[replace(agent, seen=(40,))])
    assert score_states(sooner.road, sooner.agents, states, rules=V2_RULES).first_ttc_step[0] == 31.0


def test_driving_against_the_route_is_forgiven_in_intersections() -> None:
    """Ten metres a second on a lane off the route are 0; with an intersection under all but 1.9 m of it, 1."""
    wrong_way: Polygon = (MapLayer.LANE, False, ROUTE_LANE[2])
    crossing: Polygon = (MapLayer.INTERSECTION, False, rectangle(1.461 + 0.5, 1.461 + 39.5, -2, 6))
    for polygons, expected in (([wrong_way, ROAD], 0.0), ([wrong_way, ROAD, crossing], 1.0)):
        assert score_epdms(prepared(polygons=polygons), PLAN, human_filter="off").ddc[0] == expected


def test_only_red_lights_on_the_route_count() -> None:
    made = reference(red=[rectangle(20.0, 30.0, -2.0, 2.0)])
    assert score_epdms(prepare_epdms(made), PLAN, human_filter="off").tlc[0] == 0.0
    elsewhere = replace(made, red_on_route=np.zeros(1, dtype=bool))
    assert score_epdms(prepare_epdms(elsewhere), PLAN, human_filter="off").tlc[0] == 1.0
    late = np.zeros((1, 51), dtype=bool)
    late[0, 41:] = True
    assert score_epdms(prepare_epdms(replace(made, red_active=late)), PLAN, human_filter="off").tlc[0] == 1.0


def keeps_lane(*spans: tuple[float, float]) -> float:
    """LK of a drive at 10 m/s a metre beside the centreline, with intersections over these x of the box centre."""
    crossings: list[Polygon] = [
        (MapLayer.INTERSECTION, False, rectangle(1.461 + a, 1.461 + b, -2, 6)) for a, b in spans
    ]
    scene = with_line_at(prepared(polygons=[*TWO_LANES, *crossings]), 1.0)
    return float(score_epdms(scene, PLAN, human_filter="off").lk[0])


def test_lane_keeping_skips_intersections_without_starting_over() -> None:
    """The centre is at k metres (from its start) at step k. Steps 0-14 away, 15-19 in the intersection, then away
    again: the twentieth step away is step 24, unless a second intersection begins before it."""
    assert keeps_lane((14.5, 19.5)) == 0.0
    assert keeps_lane((14.5, 19.5), (24.5, 99.0)) == 0.0
    assert keeps_lane((14.5, 19.5), (23.5, 99.0)) == 1.0
    assert keeps_lane((-9.0, 20.5)) == 0.0
    assert keeps_lane((-9.0, 21.5)) == 1.0


def test_a_shared_road_gives_the_same_scores() -> None:
    made = reference(agents=[Agent(x=25.0, y=1.0, vx=3.0)])
    road = prepare_road(made)
    shared = prepare_epdms(made, road=road)
    assert shared.road is road
    assert row(score_epdms(shared, PLAN, PLAN)) == row(score_epdms(prepare_epdms(made), PLAN, PLAN))
