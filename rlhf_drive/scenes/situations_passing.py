"""Situations on a street in which the ego gives way or goes around what stands in its lane."""

from __future__ import annotations

import dataclasses

import numpy as np

from rlhf_drive.scenes.geometry import path_from_points
from rlhf_drive.scenes.model import AgentType
from rlhf_drive.scenes.roads import RoadMap, combine, crosswalk
from rlhf_drive.scenes.situations import (
    ambient,
    draw_limit,
    gentle_bends,
    lane_traffic,
    make_street,
    parked,
    pedestrian,
    street_world,
    vehicle,
)
from rlhf_drive.scenes.world import EGO_SIZE, Actor, Shift, World, Yield

__all__ = ["oncoming_narrow", "parked_cars", "pedestrian_crossing", "static_obstacle"]

HALF_EGO = 0.5 * EGO_SIZE[1]


def oncoming_narrow(rng: np.random.Generator) -> World:
    """A narrow street; cars stand on one side, and somebody comes the other way."""
    limit = draw_limit(rng, 0, 1)
    width = float(rng.uniform(3.0, 3.2))
    street = make_street(
        rng, forward=1, backward=1, ego_lane=0, limit=limit, lane_width=width, shoulder=float(rng.uniform(0.3, 0.5))
    )
    speed = limit * float(rng.uniform(0.55, 0.9))
    low = float(rng.uniform(16.0, 38.0))
    high = low + float(rng.uniform(5.0, 22.0))
    into = float(rng.uniform(0.75, 1.15))
    pace = limit * float(rng.uniform(0.55, 0.85))
    mine = rng.random() < 0.6
    index = 0 if mine else street.index[-1]
    actors = []
    for s in np.arange(low + 2.5, high + 2.5, 6.2):
        at = float(s) if mine else -float(s)
        wide = float(rng.uniform(1.72, 1.95))
        d = -street.half_lane + into - 0.5 * wide + float(rng.uniform(-0.08, 0.0))
        actors.append(parked(rng, index, at, d, width=wide, length=float(rng.uniform(4.0, 5.0))))
    meet = float(rng.uniform(0.4, 7.5))
    start = -low - pace * (meet + 1.5)
    count = 1 + int(rng.random() < 0.4)
    coming = [
        vehicle(rng, street.index[-1], start - 14.0 * k, pace, pace * 1.05, d=-0.1, length=4.5, width=1.85)
        for k in range(count)
    ]
    if mine:
        offset = -street.half_lane + into + 0.45 + HALF_EGO
        shift = Shift(low - 14.0, low - 4.5, high + 4.0, high + 16.0, offset, 6.5)
        zones = {"zone": (low - 6.0, high + 6.0), "other_zone": (-high - 5.0, -low + 7.0)}
        rules = tuple(
            Yield(0, low - 9.0, other=len(actors) + 1 + k, before=0.8, after=0.2, **zones) for k in range(count)
        )
    else:
        shift = Shift(low - 22.0, low - 10.0, high + 8.0, high + 20.0, -0.32, 6.0)
        reach = pace * 1.8
        around = into + 0.35 - street.half_lane + 0.925
        swerve = [(-high - 3.0 - reach - c.s) / pace - 1.5 for c in coming]
        coming = [
            dataclasses.replace(c, shift=(max(t, -1.4), reach, around)) for c, t in zip(coming, swerve, strict=True)
        ]
        rules = ()
    behind = lane_traffic(rng, 0, (-60.0, -1.5 * speed - 12.0), speed, most=1)
    return street_world(rng, street, [*actors, *coming, *behind], speed, shifts=(shift,), yields=rules)


def pedestrian_crossing(rng: np.random.Generator) -> World:
    """A zebra crossing ahead with people on it, at the kerb, or gone already."""
    limit = draw_limit(rng, 0, 2)
    forward, backward = int(rng.integers(1, 3)), int(rng.integers(1, 3))
    street = make_street(rng, forward=forward, backward=backward, ego_lane=int(rng.integers(0, forward)), limit=limit)
    speed = limit * float(rng.uniform(0.55, 0.95))
    section, at, wide = street.section, float(rng.uniform(14.0, 42.0)), float(rng.uniform(3.0, 4.5))
    across = street.reference.pose(at + 0.5 * wide, np.array([section.right_edge - 12.0, section.left_edge + 12.0]))[
        :, :2
    ]
    walk = path_from_points(across, section.right_edge - 12.0)
    back = walk.reverse()
    paths = (*street.paths, walk, back)
    mine = section.center(street.ego_lane)
    route_at = street.on_route(at)
    rules: list[Yield] = []
    actors = [a for a in ambient(rng, street, speed, most=2) if abs(abs(a.s) - at) > 9.0]
    cars = list(enumerate(actors, 1))
    for _ in range(int(rng.integers(1, 5))):
        pace, leftward = float(rng.uniform(0.9, 1.9)), rng.random() < 0.5
        index, target = (len(paths) - 2, mine) if leftward else (len(paths) - 1, -mine)
        edge = section.right_edge if leftward else -section.left_edge
        start_s = -9.0
        if rng.random() < 0.25:
            s, start_s = (
                edge - float(rng.uniform(0.4, 1.2)),
                float(rng.uniform(-1.3, -0.2) if rng.random() < 0.6 else 60.0),
            )
        else:
            s = max(target - pace * (float(rng.uniform(-1.0, 5.5)) + 1.5), edge - 6.0)
        number = len(actors) + 1
        actors.append(pedestrian(rng, index, s, float(rng.uniform(-0.4, 0.4)) * wide, pace, start_s))
        zone = (target - HALF_EGO - 0.7, target + HALF_EGO + 0.5)
        rules.append(
            Yield(0, route_at - 1.5, (route_at - 0.3, route_at + wide + 0.3), number, zone, before=2.2, after=0.2)
        )
        for who, car in cars:
            path = paths[car.path]
            stop = path.nearest(street.reference.pose(at)[:2])[0]
            lane = next((k for k, i in street.index.items() if i == car.path), 0)
            middle = section.center(lane) * (1.0 if leftward else -1.0)
            line = stop - 1.5 if lane >= 0 else stop - wide - 1.5
            rules.append(
                Yield(who, line, (line + 1.0, line + wide + 2.0), number, (middle - 2.0, middle + 1.6), 2.5, 0.2)
            )
    road = combine([street.map, RoadMap((), (), (), (crosswalk(street.reference, section, at, wide),))])
    street = dataclasses.replace(street, map=road, paths=paths)
    return street_world(rng, street, actors, speed, yields=tuple(rules))


def parked_cars(rng: np.random.Generator) -> World:
    """A row of parked cars, some standing into the lane; sometimes one pulls out."""
    limit = draw_limit(rng, 0, 2)
    width = float(rng.uniform(3.45, 3.8))
    forward = int(rng.integers(1, 3))
    street = make_street(
        rng,
        forward=forward,
        backward=1,
        ego_lane=forward - 1,
        limit=limit,
        lane_width=width,
        shoulder=0.3,
        parking=2.5,
        bends=gentle_bends(rng, 1.8 * limit),
    )
    speed = limit * float(rng.uniform(0.55, 0.9))
    actors = ambient(rng, street, speed, most=2)
    special = float(rng.uniform(12.0, 26.0)) + speed
    shifts: list[Shift] = []
    s = float(rng.uniform(-12.0, -4.0))
    while s < 78.0 and len(actors) < 17:
        wide, tall = float(rng.uniform(1.75, 2.0)), float(rng.uniform(3.9, 5.0))
        d = -street.half_lane - 0.6 - 0.5 * wide
        if s > special:
            special = 1e9
            if rng.random() < 0.4:
                actors.append(_pulling_out(rng, s, d, 0.7 * limit))
            else:
                into = float(rng.uniform(0.5, 0.9))
                d += 0.6 + into
                shifts.append(_around(s - 0.5 * tall, s + 0.5 * tall, speed, into - street.half_lane))
                actors.append(parked(rng, 0, s, d, width=wide, length=tall))
        elif rng.random() < 0.7:
            actors.append(parked(rng, 0, s, d, width=wide, length=tall))
        s += tall + float(rng.uniform(1.0, 4.0))
    return street_world(rng, street, actors, speed, shifts=tuple(shifts))


def _pulling_out(rng: np.random.Generator, s: float, d: float, desired: float) -> Actor:
    """A parked car that sets off into the lane about now."""
    shift = (-9.0, float(rng.uniform(8.0, 12.0)), -0.1)
    start = float(rng.uniform(-1.2, 0.3))
    return vehicle(rng, 0, s - 2.0, 0.0, desired, d=d, width=1.85, length=4.4, start_s=start, shift=shift)


def _around(low: float, high: float, speed: float, edge: float) -> Shift:
    """Detour to the left of a car between two arclengths whose left side is at offset `edge`."""
    ease = max(14.0, 2.4 * speed)
    full, leave = low - 4.5 - 0.6 * speed, high + 4.0
    return Shift(full - ease, full, leave, leave + 1.5 * ease, edge + 0.5 + HALF_EGO, 6.5)


def static_obstacle(rng: np.random.Generator) -> World:
    """Something stands in the lane: pass beside it, change lanes around it, or stop behind it."""
    limit, forward = draw_limit(rng, 0, 3), int(rng.integers(1, 4))
    lane, backward = int(rng.integers(0, forward)), int(rng.integers(0 if forward > 1 else 1, 2))
    bends = gentle_bends(rng, 1.5 * limit)
    street = make_street(rng, forward=forward, backward=backward, ego_lane=lane, limit=limit, bends=bends)
    speed = limit * float(rng.uniform(0.5, 0.9))
    at = float(rng.uniform(14.0, 26.0)) + 1.5 * speed
    half, mode = street.half_lane, rng.random()
    skip: tuple[int, ...] = ()
    shifts: tuple[Shift, ...] = ()
    if forward == 1 or mode < 0.45:
        room = [-1.0] * (lane > 0 or backward > 0) + [1.0] * (lane < forward - 1)
        side = float(rng.choice(room))
        into = float(rng.uniform(0.6, 1.15))
        things = _things(rng, at, side * (half - into), side)
        shifts = (_pass(at, 12.0, speed, side * (half - into - 0.65 - HALF_EGO), 7.5),)
    else:
        beside = lane + 1 if lane == 0 or (lane + 1 < forward and rng.random() < 0.5) else lane - 1
        offset = street.section.lane_width * (1.0 if beside < lane else -1.0)
        things = [parked(rng, 0, at + 3.0, float(rng.uniform(-0.3, 0.3)))] if rng.random() < 0.6 else _barrier(rng, at)
        if mode < 0.82:
            shifts, skip = (_pass(at, 60.0, speed, offset, limit),), (beside,)
        else:
            pace = max(0.9 * speed, 4.0)
            things += [vehicle(rng, street.index[beside], -26.0 + 13.0 * k - 1.5 * pace, pace, pace) for k in range(5)]
            skip = (beside,)
    actors = things + ambient(rng, street, speed, skip=skip, most=2)
    if len(skip) and mode < 0.82 and rng.random() < 0.5:
        actors.append(vehicle(rng, street.index[skip[0]], float(rng.uniform(25.0, 60.0)), limit * 0.9, limit * 0.95))
    return street_world(rng, street, actors, speed, shifts=shifts)


def _pass(at: float, length: float, speed: float, offset: float, cap: float) -> Shift:
    """Detour around what stands from arclength `at` on."""
    ease = max(12.0, 2.0 * speed) * (1.0 if abs(offset) < 2.0 else 1.3)
    full = at - 5.0 - 0.6 * speed
    return Shift(full - ease, full, at + length, at + length + ease, offset, cap)


def _things(rng: np.random.Generator, at: float, edge: float, side: float) -> list[Actor]:
    """Cones or a box whose edge towards the middle of the lane lies at offset `edge`."""
    if rng.random() < 0.5:
        size = float(rng.uniform(0.35, 0.5))
        d = edge + side * 0.5 * size
        spots = range(int(rng.integers(3, 6)))
        return [
            Actor(0, at + 2.0 * k, d + side * 0.35 * max(0, 1 - k), 0.0, 0.1, size, size, AgentType.STATIC, steady=True)
            for k in spots
        ]
    length, width = float(rng.uniform(1.0, 4.0)), float(rng.uniform(0.8, 2.0))
    return [
        Actor(0, at + 0.5 * length, edge + side * 0.5 * width, 0.0, 0.1, length, width, AgentType.STATIC, steady=True)
    ]


def _barrier(rng: np.random.Generator, at: float) -> list[Actor]:
    """A barrier across the lane."""
    return [
        Actor(
            0,
            at + 0.5,
            float(rng.uniform(-0.2, 0.2)),
            0.0,
            0.1,
            0.8,
            float(rng.uniform(2.2, 2.8)),
            AgentType.STATIC,
            steady=True,
        )
    ]
