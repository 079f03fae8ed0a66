"""Whom a proposal follows: corridor, order, and what is left standing in the leader vector."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from oracles.straight_road import ROAD_START_M, agent, rectangle, straight_road

from rewards.pdm_forecast import build_forecast
from rewards.pdm_leaders import Surroundings, find_surroundings, update_leader
from rewards.pdm_paths import build_paths
from rlhf_drive.scenes import SceneReference

EGO = -ROAD_START_M  # arclength of the ego's rear axle
FRONT = 1.461 + 2.588  # from the rear axle to the front bumper
ROAD_LENGTH = 500.0 - ROAD_START_M


def surroundings(scene: SceneReference) -> Surroundings:
    return find_surroundings(build_paths(scene.centerline), build_forecast(scene).shapes, scene.speed_limit)


def leader_of(
    around: Surroundings, at: float = EGO, before: Sequence[float] = (0.0, 0.0, 0.0), heading: float = 0.0
) -> NDArray[np.float64]:
    """Leader vector of the centre path at t=0 with the ego at arclength `at`, starting from `before`."""
    vector = np.array(before)
    pose = np.array([at - EGO, 0.0, heading])
    update_leader(vector, pose, at, ROAD_LENGTH, around.shapes, 0, around.in_corridor[0, 0], around.progress[0, 0])
    return vector


@pytest.mark.parametrize(
    ("y", "centre", "right", "left"),
    [
        (2.148, True, False, True),
        (2.149, False, False, True),
        (-2.148, True, True, False),
        (3.149, False, False, False),
    ],
)
def test_the_corridor_is_as_wide_as_the_ego(y: float, centre: bool, right: bool, left: bool) -> None:
    # A box 2 m wide touches the centre corridor while its axis is within 1 + 1.1485 m.
    around = surroundings(straight_road([agent(30.0, y)]))
    assert around.in_corridor[:, 0, 0].tolist() == [centre, right, left]


@pytest.mark.parametrize(("x", "inside"), [(53.148, True), (53.149, False), (-3.148, True), (-3.149, False)], ids=str)
def test_the_corridor_ends_after_five_seconds_plus_a_square_cap(x: float, inside: bool) -> None:
    # From 0 to 50 m at 10 m/s, 1.1485 m more at both ends; a box of 4 m touches 2 m earlier. At y = 2.1 a round cap
    # would end (1.1485 - sqrt(1.1485^2 - 1.1^2)) = 0.82 m before.
    around = surroundings(straight_road([agent(x, 2.1)]))
    assert bool(around.in_corridor[0, 0, 0]) is inside


def test_membership_follows_the_forecast() -> None:
    # A pedestrian crosses at 1 m/s from y = -5: its edge reaches -1.1485 when its centre is at -1.3985, after 3.6015 s.
    around = surroundings(straight_road([agent(20.0, -5.0, np.pi / 2, velocity=(0.0, 1.0), size=(0.5, 0.5))]))
    assert np.flatnonzero(around.in_corridor[0, :, 0])[0] == 19  # sample 19 is at 3.8 s
    assert around.progress[0, 19, 0] == pytest.approx(EGO + 20.0)


def test_who_overlaps_at_t0_leads_nobody() -> None:
    around = surroundings(straight_road([agent(5.0)]))
    assert not around.in_corridor.any()


def test_the_gap_is_from_bumper_to_bumper() -> None:
    around = surroundings(straight_road([agent(30.0, velocity=(6.0, 0.0))]))
    np.testing.assert_allclose(leader_of(around), [EGO + 28.0 - FRONT, 6.0, 0.0], atol=1e-12)


def test_ahead_is_decided_by_the_centroid() -> None:
    # Half of the truck is ahead of the ego, its centroid at 10 m is not ahead of 10.5 m.
    around = surroundings(straight_road([agent(10.0, size=(8.0, 2.0))]))
    assert leader_of(around, EGO + 9.5)[0] == pytest.approx(EGO + 9.5)
    assert leader_of(around, EGO + 10.5)[0] == pytest.approx(ROAD_LENGTH)


def test_the_nearest_outline_leads_not_the_nearest_centroid() -> None:
    truck, car = agent(30.0, velocity=(3.0, 0.0), size=(20.0, 2.0)), agent(25.0, velocity=(4.0, 0.0), size=(4.0, 2.0))
    np.testing.assert_allclose(leader_of(surroundings(straight_road([car, truck]))), [EGO + 20.0 - FRONT, 3.0, 0.0])


@pytest.mark.parametrize(("heading", "speed"), [(np.pi, -8.0), (np.pi / 3, 4.0)], ids=["oncoming", "turning"])
def test_the_leaders_speed_is_projected_on_the_path(heading: float, speed: float) -> None:
    velocity = (8.0 * np.cos(heading), 8.0 * np.sin(heading))
    around = surroundings(straight_road([agent(30.0, heading=heading, velocity=velocity)]))
    assert leader_of(around)[1] == pytest.approx(speed, abs=1e-9)


def test_a_red_light_leads_and_leaves_the_speed_alone() -> None:
    around = surroundings(straight_road(red=[rectangle(20.0, 40.0, -2.0, 2.0)]))
    np.testing.assert_allclose(leader_of(around, before=(1.0, 7.0, 2.588)), [EGO + 20.0 - FRONT, 7.0, 2.588])


def test_the_end_of_the_path_is_an_obstacle_that_leaves_the_speed_alone() -> None:
    around = surroundings(straight_road())
    np.testing.assert_allclose(leader_of(around, before=(1.0, 7.0, 0.0)), [ROAD_LENGTH, 7.0, 2.588])


def test_an_overlap_on_the_way_is_a_distance_of_zero() -> None:
    around = surroundings(straight_road([agent(20.0)]))
    assert leader_of(around, EGO + 16.0)[0] == pytest.approx(EGO + 16.0)


def test_of_two_overlaps_the_first_in_the_index_leads() -> None:
    # Few shapes stand in one node, listed by their middle's y in the world: the right one (y = -0.5) is the first; with
    # the world turned by half a circle the left one.
    left, right = (agent(20.0, y, velocity=(speed, 0.0), size=(1.0, 0.8)) for y, speed in ((0.5, 2.0), (-0.5, 1.0)))
    for people in ([left, right], [right, left]):
        assert leader_of(surroundings(straight_road(people)), EGO + 17.0)[1] == pytest.approx(1.0)
    scene = straight_road([left, right], origin=(5.0, 7.0, np.pi))
    shapes = build_forecast(scene).shapes
    around = find_surroundings(build_paths(straight_road().centerline), shapes, 10.0)
    assert leader_of(around, EGO + 17.0)[1] == pytest.approx(2.0)
