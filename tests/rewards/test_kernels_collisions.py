"""Who is at fault and who is too close, on states driven exactly along +x at 10 m/s: x of the rear axle is k metres."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from oracles.judge import judge, seen_once
from oracles.tiny_scene import (
    LEFT_LANE,
    ROAD,
    TWO_LANES,
    Agent,
    Polygon,
    make_reference,
    make_scene,
    rectangle,
    straight_states,
)

from rewards.kernels.score import V2_RULES, score_states
from rewards.prepare import prepare_agents, prepare_lights, prepare_road
from rlhf_drive.scenes import AgentType, MapLayer

WIDE_LANE: Polygon = (MapLayer.LANE, True, rectangle(-50, 150, -2, 6))
CROSSING: Polygon = (MapLayer.INTERSECTION, False, rectangle(-50, 150, -20, 20))
BESIDE = Agent(x=1.461, y=2.0, vx=10.0, length=2.0, width=2.0)
"""Beside the ego's box centre for the whole drive, overlapping its left side, away from its front bumper."""


def test_an_empty_road_is_free() -> None:
    metrics = judge()
    assert (metrics.nc[0], metrics.ttc[0], metrics.first_fault_step[0]) == (1.0, 1.0, np.inf)


def test_driving_into_a_slower_car_is_at_fault() -> None:
    """Front bumper 4.049 + k meets the rear 18 + 0.2 k when 0.8 k >= 13.951, so at k = 18."""
    metrics = judge(Agent(x=20.0, vx=2.0))
    assert (metrics.nc[0], metrics.first_fault_step[0]) == (0.0, 18.0)


def test_being_hit_from_behind_is_not_at_fault() -> None:
    """Not even between two lanes, where a contact from the side would be."""
    assert judge(Agent(x=-12.0, y=1.5, vx=20.0), states=straight_states(10.0, y=1.5)).nc[0] == 1.0


def test_behind_is_measured_from_the_rear_axle() -> None:
    """(-1.8, 1.6) lies 138 deg off the rear axle's heading but 154 deg off the box centre's: lateral, not rear."""
    rear_corner = seen_once(10, 10.0 - 1.8, 1.6 + 2.0, length=2.0)
    metrics = judge(rear_corner, states=straight_states(10.0, y=2.0))
    assert (metrics.nc[0], metrics.first_fault_step[0]) == (0.0, 10.0)


@pytest.mark.parametrize(
    ("polygons", "y", "expected"),
    [
        (TWO_LANES, 0.0, 1.0),
        (TWO_LANES, 1.5, 0.0),
        ([WIDE_LANE, LEFT_LANE, ROAD], 1.5, 1.0),
        ([WIDE_LANE, ROAD], -1.5, 0.0),
    ],
    ids=["inside one lane", "between two lanes", "one lane holds all corners", "off the road"],
)
def test_lateral_contact_is_at_fault_only_between_lanes_or_off_the_road(
    polygons: list[Polygon], y: float, expected: float
) -> None:
    beside = Agent(x=BESIDE.x, y=y + 2.0, vx=10.0, length=2.0, width=2.0)
    assert judge(beside, polygons=polygons, states=straight_states(10.0, y=y)).nc[0] == expected


def test_front_bumper_contact_is_at_fault_within_a_lane() -> None:
    ahead = Agent(x=4.5, y=2.0, vx=10.0, length=2.0, width=2.0)
    assert judge(ahead).nc[0] == 0.0


@pytest.mark.parametrize(
    ("kind", "speed", "expected"),
    [
        (AgentType.STATIC, 0.0, 0.5),
        (AgentType.STATIC, 3.0, 0.5),
        (AgentType.VEHICLE, 0.0, 0.0),
        (AgentType.PEDESTRIAN, 0.0, 0.0),
        (AgentType.BICYCLE, 0.0, 0.0),
    ],
)
def test_static_objects_cost_half_and_road_users_all(kind: AgentType, speed: float, expected: float) -> None:
    assert judge(Agent(x=25.0, kind=kind, first_speed=speed)).nc[0] == expected


def test_worst_contact_counts() -> None:
    cone = Agent(x=15.0, kind=AgentType.STATIC, length=0.5, width=0.5)
    assert judge(cone, Agent(x=30.0)).nc[0] == 0.0
    assert judge(cone, Agent(x=30.0)).first_fault_step[0] == 11.0


def test_speed_at_first_sighting_decides_what_is_stopped() -> None:
    """A car that runs into the ego from behind: moving when first seen, it is excused; parked when first seen, not."""
    assert judge(Agent(x=-12.0, vx=20.0, first_speed=0.06)).nc[0] == 1.0
    assert judge(Agent(x=-12.0, vx=20.0, first_speed=0.05)).nc[0] == 0.0
    late = Agent(x=-12.0, vx=20.0, seen=tuple(range(5, 51)), first_speed=0.0)
    assert judge(late).nc[0] == 0.0


def test_a_standing_ego_is_never_at_fault() -> None:
    approaching = Agent(x=20.0, vx=-8.0)
    standing = straight_states(0.0)
    standing[..., 3] = 0.05
    assert judge(approaching, states=standing).nc[0] == 1.0
    standing[..., 3] = 0.06
    assert judge(approaching, states=standing).nc[0] == 0.0


def test_only_the_first_contact_with_an_agent_is_judged() -> None:
    """Rear contact at step 5, then the same agent in front at step 20: forgotten after the first."""
    path = np.tile([500.0, 0.0, 0.0], (51, 1))
    path[5] = 5.0 - 2.0, 0.0, 0.0
    path[20] = 20.0 + 4.0, 0.0, 0.0
    assert judge(Agent(path=path, vx=10.0)).nc[0] == 1.0
    path[5] = 500.0, 0.0, 0.0
    assert judge(Agent(path=path, vx=10.0)).nc[0] == 0.0


def test_absent_agents_are_not_hit() -> None:
    assert judge(Agent(x=20.0, seen=(0, 1, 2))).nc[0] == 1.0


def test_ttc_looks_nine_tenths_of_a_second_ahead() -> None:
    """Bumper at 4.049 + k + 9 meets the wall at 48 from k = 35 on: too close without contact; v2 stops at 31."""
    wall = Agent(x=50.0, vx=0.0)
    metrics = judge(wall)
    assert (metrics.nc[0], metrics.ttc[0], metrics.first_ttc_step[0]) == (1.0, 0.0, 35.0)
    assert judge(wall, rules=V2_RULES).ttc[0] == 1.0


def test_ttc_at_constant_gap_is_fine() -> None:
    assert judge(Agent(x=10.0, vx=10.0)).ttc[0] == 1.0


def test_ttc_meets_agents_where_they_are_later() -> None:
    """Seen only at step 20, where the ego will then be: first found from step 11, 0.9 s before."""
    metrics = judge(seen_once(20, 20.0 + 4.0, length=1.0))
    assert metrics.first_ttc_step[0] == 11.0


def test_ttc_samples_every_third_step_only() -> None:
    """One step at 30 m/s jumps by 9 m per sample; a box between the samples at .3 and .6 s is not seen."""
    states = straight_states(0.0)
    states[0, 10, 3] = 30.0
    between, behind_it = Agent(x=15.0, length=1.0), Agent(x=17.5, length=1.0)
    assert judge(between, states=states).ttc[0] == 1.0
    assert judge(behind_it, states=states).first_ttc_step[0] == 10.0


def test_ttc_ignores_a_standing_ego() -> None:
    states = straight_states(0.0)
    states[..., 3] = 0.004
    inside = Agent(x=4.5)
    assert judge(inside, states=states).ttc[0] == 1.0
    states[..., 3] = 0.006
    assert judge(inside, states=states).ttc[0] == 0.0


def test_ttc_projects_a_reversing_ego_forwards() -> None:
    states = straight_states(0.0)
    states[..., 3] = -8.0
    assert judge(Agent(x=10.0), states=states).ttc[0] == 0.0


@pytest.mark.parametrize(
    ("polygons", "y", "expected"),
    [
        (TWO_LANES, 0.0, 1.0),
        (TWO_LANES, 1.5, 0.0),
        ([WIDE_LANE, ROAD], -1.5, 0.0),
        ([*TWO_LANES, CROSSING], 0.0, 0.0),
    ],
    ids=["inside one lane", "between two lanes", "off the road", "in an intersection"],
)
def test_ttc_counts_agents_aside_only_where_the_ego_is_exposed(
    polygons: list[Polygon], y: float, expected: float
) -> None:
    beside = Agent(x=BESIDE.x, y=y + 2.0, vx=10.0, length=2.0, width=2.0)
    assert judge(beside, polygons=polygons, states=straight_states(10.0, y=y)).ttc[0] == expected


def test_ttc_excuses_agents_behind_even_in_an_intersection() -> None:
    """Seen at step 2 only, so that the contact is the real overlap (0 s ahead), from behind or from the side."""
    exposed = [*TWO_LANES, CROSSING]
    assert judge(seen_once(2, 2.0 - 2.0), polygons=exposed).ttc[0] == 1.0
    assert judge(seen_once(2, 2.0 - 2.0, 2.0), polygons=exposed).ttc[0] == 0.0


def test_ttc_judges_only_the_first_hit_with_an_agent() -> None:
    """Beside at step 2 (harmless), then the same agent in front of the bumper at step 20: forgotten."""
    path = np.tile([500.0, 0.0, 0.0], (51, 1))
    path[2] = 2.0 + 1.461, 2.0, 0.0
    path[20] = 20.0 + 4.5, 0.0, 0.0
    assert judge(Agent(path=path, vx=3.0, length=1.0)).ttc[0] == 1.0
    path[2] = 500.0, 0.0, 0.0
    assert judge(Agent(path=path, vx=3.0, length=1.0)).ttc[0] == 0.0


def test_agents_beyond_a_short_forecast_are_absent() -> None:
    reference = make_reference(agents=[Agent(x=45.0)])
    boxes = prepare_agents(
        reference.agent_pose[:, :30],
        reference.agent_velocity[:, :30],
        reference.agent_valid[:, :30],
        reference.agent_size,
        reference.agent_type,
        reference.ego_init[:3],
    )
    metrics = score_states(prepare_road(reference), boxes, straight_states(10.0))
    assert (metrics.nc[0], metrics.ttc[0]) == (1.0, 1.0)


def test_red_light_is_any_contact_while_it_is_red() -> None:
    connector = [rectangle(30, 40, -2, 2)]
    assert judge(red=connector).tlc[0] == 0.0
    assert judge(red=[rectangle(30, 40, 2, 6)]).tlc[0] == 1.0
    assert judge(red=[connector[0][:2]]).tlc[0] == 1.0
    assert judge(red=connector, states=straight_states(6.0)).tlc[0] == 1.0


def test_red_lights_count_on_the_route_and_while_they_last() -> None:
    """The front bumper is on the connector (30 … 40) from step 26, the rear leaves it after step 41."""
    first, second = rectangle(60, 70, 2, 6), rectangle(30, 40, -2, 2)
    reference = make_reference(red=[first, second])

    def compliance(active: slice, on_route: list[bool]) -> float:
        red = np.zeros((2, 51), dtype=bool)
        red[1, active] = True
        changed = replace(reference, red_active=red, red_on_route=np.array(on_route))
        road, nobody = prepare_road(changed), make_scene().agents
        return float(score_states(road, nobody, straight_states(10.0), lights=prepare_lights(changed)).tlc[0])

    assert compliance(slice(0, 26), [True, True]) == 1.0
    assert compliance(slice(0, 27), [True, True]) == 0.0
    assert compliance(slice(0, 51), [True, False]) == 1.0
    assert compliance(slice(0, 51), [False, True]) == 0.0
