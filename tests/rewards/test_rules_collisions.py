"""Rules of NC and TTC that are easy to get nearly right. The ego drives along +x at 10 m/s: its rear axle is at k m."""

from __future__ import annotations

import math

import numpy as np
import pytest
from oracles import contacts
from oracles.judge import judge, seen_once
from oracles.tiny_scene import ROUTE_LANE, TWO_LANES, Agent, Polygon, rectangle, straight_states

from rewards.kernels.score import V1_RULES, V2_RULES, ScoreRules
from rlhf_drive.scenes import AgentType, MapLayer

VERSIONS = pytest.mark.parametrize("rules", [V1_RULES, V2_RULES], ids=["v1", "v2"])
CROSSING: Polygon = (MapLayer.INTERSECTION, False, rectangle(-50, 150, -20, 20))


@VERSIONS
def test_the_whole_bumper_is_the_front(rules: ScoreRules) -> None:
    """A pole of 0.2 m in the middle of the bumper at 10 + 4.049 touches no corner; its centroid is dead ahead.

    The ego is within its lane, so only a front contact can be its fault.
    """
    pole = seen_once(10, 14.1, length=0.2, width=0.2)
    metrics = judge(pole, rules=rules)
    assert (metrics.nc[0], metrics.first_fault_step[0]) == (0.0, 10.0)


@VERSIONS
def test_a_contact_behind_the_bumper_is_lateral(rules: ScoreRules) -> None:
    """The same pole 0.3 m behind the bumper: ahead of the rear axle but no front contact, so not at fault in a lane."""
    assert judge(seen_once(10, 13.749 - 0.1, length=0.2, width=0.2), rules=rules).nc[0] == 1.0


@VERSIONS
def test_an_intersection_does_not_make_a_lateral_collision_the_egos_fault(rules: ScoreRules) -> None:
    """It exposes the ego in TTC only: NC asks for several lanes or a corner off the road."""
    beside = Agent(x=1.461, y=2.0, vx=10.0, length=2.0)
    metrics = judge(beside, polygons=[*TWO_LANES, CROSSING], rules=rules)
    assert (metrics.nc[0], metrics.ttc[0]) == (1.0, 0.0)


@VERSIONS
def test_stopped_tracks_are_hit_at_fault_even_from_behind(rules: ScoreRules) -> None:
    """The order of the rules: a parked car that meets the ego's rear is not excused, a moving one is."""
    behind = np.tile([10.0 - 1.127 - 1.9, 0.0, 0.0], (51, 1))
    assert judge(Agent(path=behind, seen=(10,), vx=0.0), rules=rules).nc[0] == 0.0
    assert judge(Agent(path=behind, seen=(10,), vx=3.0), rules=rules).nc[0] == 1.0


@VERSIONS
def test_a_track_that_stands_now_but_moved_at_first_sight_is_not_a_stopped_track(rules: ScoreRules) -> None:
    """It drove at 3 m/s at step 0 and stands at step 10, where it touches the ego's left side: lateral, excused."""
    path = np.tile([500.0, 0.0, 0.0], (51, 1))
    path[10] = 10.0 + 1.461, 2.0, 0.0
    halted = Agent(path=path, vx=0.0, first_speed=3.0, length=2.0)
    assert judge(halted, rules=rules).nc[0] == 1.0
    assert judge(Agent(path=path, vx=3.0, first_speed=0.0, length=2.0), rules=rules).nc[0] == 0.0


@VERSIONS
@pytest.mark.parametrize(("x", "y", "ttc"), [(12.5, 1.6, 1.0), (14.0, 2.0, 0.0)], ids=["33 deg", "27 deg"])
def test_ahead_in_ttc_is_measured_from_the_rear_axle(rules: ScoreRules, x: float, y: float, ttc: float) -> None:
    """From the rear axle at x = 10: atan(1.6 / 2.5) = 32.6 deg and atan(2 / 4) = 26.6 deg, limit 30 deg.

    From the box centre at 11.461 both would be aside: 57 deg and 38 deg. The box is seen at step 10 only and overlaps
    the ego's left side (from 8.873 to 14.049, |y| < 1.1485), which is harmless unless it is ahead.
    """
    box = seen_once(10, x, y, length=0.6, width=2.0)
    # A standing start keeps the projections of earlier steps away: only step 10 has a speed.
    states = straight_states(10.0)
    states[0, :, 3] = 0.0
    states[0, 10, 3] = 0.1
    assert judge(box, states=states, rules=rules).ttc[0] == ttc


@VERSIONS
@pytest.mark.parametrize(
    ("patch", "ttc"),
    [((8.0, 11.0), 0.0), ((11.0, 14.0), 1.0)],
    ids=["under the rear axle", "under the box centre"],
)
def test_ttc_exposure_in_an_intersection_is_that_of_the_rear_axle(
    rules: ScoreRules, patch: tuple[float, float], ttc: float
) -> None:
    """At step 10 the rear axle is at 10.0 and the box centre at 11.461; a box beside is hit at that step alone."""
    crossing: Polygon = (MapLayer.INTERSECTION, False, rectangle(*patch, -1.0, 1.0))
    states = straight_states(10.0)
    states[0, :, 3] = 0.0
    states[0, 10, 3] = 0.1
    beside = seen_once(10, 11.461, 2.0, length=2.0, width=2.0)
    assert judge(beside, states=states, polygons=[*TWO_LANES, crossing], rules=rules).ttc[0] == ttc


@VERSIONS
def test_ttc_looks_at_0_3_6_and_9_tenths_and_nowhere_else(rules: ScoreRules) -> None:
    """At 20 m/s a look-ahead of f steps puts the bumper at 4.049 + 2 f and the rear at -1.127 + 2 f.

    A sign 1 m long, there at step f alone, centred 0.5 m before that bumper, is met only if f is looked at: at any
    other step it is absent.
    """
    states = straight_states(0.0)
    states[0, 0, 3] = 20.0
    met = [
        judge(seen_once(f, 4.049 + 2.0 * f - 0.5, length=1.0, width=1.0), states=states, rules=rules).ttc[0] == 0.0
        for f in range(12)
    ]
    assert np.flatnonzero(met).tolist() == [0, 3, 6, 9]


@VERSIONS
def test_ttc_steps_back_to_the_ego_of_the_start_step(rules: ScoreRules) -> None:
    """The bearing is from the ego at t to the agent at t + f, not from the ego moved there.

    At step 0 (10 m/s) the box of 0.9 s ahead reaches from 7.873 to 13.049. An agent at (10, 2), there at step 9 alone,
    is seen under atan(2 / 10) = 11 deg from the rear axle at 0: ahead. From the rear axle at 9 m it would be 63 deg.
    """
    states = straight_states(0.0)
    states[0, 0, 3] = 10.0
    assert judge(seen_once(9, 10.0, 2.0, length=1.0, width=2.0), states=states, rules=rules).ttc[0] == 0.0


@VERSIONS
def test_ttc_excuses_nobody_for_standing(rules: ScoreRules) -> None:
    """Overlapping a parked car at 0.04 m/s is no at-fault collision (the ego stands), but a failure of TTC."""
    states = straight_states(0.0)
    states[0, :, 3] = 0.04
    metrics = judge(Agent(x=6.0, vx=0.0), states=states, rules=rules)
    assert (metrics.nc[0], metrics.ttc[0]) == (1.0, 0.0)


@pytest.mark.parametrize(("rules", "last"), [(V1_RULES, 40), (V2_RULES, 31)], ids=["v1", "v2"])
def test_last_start_step_of_ttc(rules: ScoreRules, last: int) -> None:
    """Only step `last` (and, in the second case, only the one after) has a speed that counts."""
    wall = Agent(x=6.0)

    def fails(step: int) -> bool:
        states = straight_states(0.0)
        states[0, step, 3] = 0.1
        return bool(judge(wall, states=states, rules=rules).first_ttc_step[0] == step)

    assert fails(last)
    assert last == 40 or not fails(last + 1)


@VERSIONS
def test_agents_of_five_seconds_are_met_up_to_4_9_s_in_v1_and_4_0_s_in_v2(rules: ScoreRules) -> None:
    """There at step 49 alone, ahead at 0.9 s: only start step 40 reaches it, which v2 does not have."""
    states = straight_states(0.0)
    states[..., 3] = 0.1
    expected = 0.0 if rules is V1_RULES else 1.0
    assert judge(seen_once(49, 4.5), states=states, rules=rules).ttc[0] == expected


@VERSIONS
def test_an_agent_excused_once_is_forgotten_but_others_are_not(rules: ScoreRules) -> None:
    """Being touched from behind at step 5 excuses that agent at step 20, and only that one."""
    path = np.tile([500.0, 0.0, 0.0], (51, 1))
    path[5], path[20] = (5.0 - 2.0, 0.0, 0.0), (20.0 + 4.0, 0.0, 0.0)
    excused = Agent(path=path, vx=3.0)
    assert judge(excused, rules=rules).nc[0] == 1.0
    assert judge(excused, seen_once(20, 24.0), rules=rules).nc[0] == 0.0


@VERSIONS
def test_off_the_road_at_another_step_does_not_count(rules: ScoreRules) -> None:
    """The areas are those of the contact's step: off the road at step 30, touched from the side at step 10."""
    states = straight_states(10.0)
    states[0, 30, 1] = 50.0
    beside = seen_once(10, 11.461, 2.0, length=2.0)
    assert judge(beside, states=states, polygons=[ROUTE_LANE, TWO_LANES[2]], rules=rules).nc[0] == 1.0
    states[0, 30, 1], states[0, 10, 1] = 0.0, -1.5
    beside = seen_once(10, 11.461, 0.5, length=2.0)
    assert judge(beside, states=states, polygons=[ROUTE_LANE, TWO_LANES[2]], rules=rules).nc[0] == 0.0


def random_traffic(rng: np.random.Generator) -> list[Agent]:
    """Road users, bent paths and gaps in sight, around where an ego at 10 m/s drives."""
    agents = []
    for _ in range(int(rng.integers(1, 8))):
        t = 0.1 * np.arange(51)
        heading = rng.uniform(-math.pi, math.pi) * (rng.random() < 0.4) + rng.uniform(-0.2, 0.2) * t
        speed = float(rng.choice([0.0, 0.04, 5.0, 9.0, 14.0]))
        step = 0.1 * speed * np.stack([np.cos(heading), np.sin(heading)], axis=1)
        xy = rng.uniform((-15.0, -4.0), (45.0, 6.0)) + np.cumsum(step, axis=0) - step[0]
        start = int(rng.integers(0, 51)) if rng.random() < 0.3 else 0
        agents.append(
            Agent(
                path=np.concatenate([xy, heading[:, None]], axis=1),
                vx=speed,
                first_speed=speed,
                seen=tuple(range(start, int(rng.integers(start + 1, 52)))),
                kind=AgentType(int(rng.integers(0, 4))),
                length=rng.uniform(0.2, 8.0),
                width=rng.uniform(0.2, 2.5),
            )
        )
    return agents


@pytest.mark.parametrize("seed", range(60))
def test_first_contacts_suffice(seed: int) -> None:
    """Against the plain walk through all steps and tokens that keeps a list of the ignored ones, with shapely."""
    rng = np.random.default_rng(seed)
    agents = random_traffic(rng)
    states = straight_states(float(rng.choice([0.0, 4.0, 10.0])), y=rng.uniform(-1.5, 3.0))
    states[0, :, 2] = rng.uniform(-0.3, 0.3) * np.sin(0.1 * np.arange(41))
    states[0, :, 3] *= rng.choice([1.0, -1.0])
    patch: Polygon = (MapLayer.INTERSECTION, False, rectangle(15, 30, -20, 20))
    polygons = [*TWO_LANES, patch] if seed % 2 else TWO_LANES
    for rules, steps in ((V1_RULES, 41), (V2_RULES, 32)):
        metrics = judge(*agents, states=states, polygons=polygons, rules=rules)
        got = (metrics.nc[0], metrics.first_fault_step[0])
        assert got == contacts.collisions(states[0], metrics.areas[0], agents)
        assert (metrics.ttc[0], metrics.first_ttc_step[0]) == contacts.times_to_collision(
            states[0], metrics.areas[0], agents, steps
        )
