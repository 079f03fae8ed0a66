"""Situations on a street: bends, leaders, cut-ins, narrow passages, pedestrians, parked cars, obstacles, queues."""

from __future__ import annotations

import dataclasses

import numpy as np

from rlhf_drive.scenes.geometry import path_from_points
from rlhf_drive.scenes.model import AgentType
from rlhf_drive.scenes.roads import RoadMap, combine, crosswalk
from rlhf_drive.scenes.situations import (
    LIMITS_MPS,
    Street,
    draw_driver,
    lane_traffic,
    make_street,
    parked,
    pedestrian,
    vehicle,
    walkers,
)
from rlhf_drive.scenes.world import EGO_SIZE, Actor, Shift, World, Yield

__all__ = [
    "curve",
    "cut_in",
    "lead_braking",
    "oncoming_narrow",
    "parked_cars",
    "pedestrian_crossing",
    "static_obstacle",
    "stop_and_go",
]

HALF_EGO = 0.5 * EGO_SIZE[1]
CENTER = 1.461
"""Rear axle to box centre (m)."""


def _limit(rng: np.random.Generator, low: int, high: int) -> float:
    return float(LIMITS_MPS[int(rng.integers(low, high + 1))])


def _ambient(
    rng: np.random.Generator, street: Street, speed: float, *, skip: tuple[int, ...] = (), most: int = 3
) -> list[Actor]:
    """Vehicles on all lanes but the ego's and those in `skip`, and one behind the ego now and then."""
    actors: list[Actor] = []
    for lane, index in street.index.items():
        if lane == street.ego_lane or lane in skip:
            continue
        span = (-45.0, 80.0) if lane >= 0 else (-110.0, 30.0)
        pace = speed * float(rng.uniform(0.8, 1.1)) if lane >= 0 else street.limit * float(rng.uniform(0.7, 1.0))
        actors += lane_traffic(rng, index, span, max(pace, 3.0), most=most)
    if rng.random() < 0.5:
        behind = -1.5 * speed + CENTER - 5.2 - max(6.0, speed * float(rng.uniform(1.0, 2.2)))
        actors.append(vehicle(rng, 0, behind, speed, speed * 1.1))
    return actors


def _world(rng: np.random.Generator, street: Street, actors: list[Actor], speed: float, **more: object) -> World:
    """The street's world with a random driver who is not quite in the middle of the lane."""
    values: dict[str, object] = {
        "driver": draw_driver(rng, street.limit),
        "lateral": float(rng.uniform(-0.35, 0.35)),
        "heading_error": float(rng.uniform(-0.03, 0.03)),
        **more,
    }
    people = walkers(rng, street, 2)
    return World(street.map, street.paths, (*actors, *people)[:20], speed=speed, limit=street.limit, **values)  # type: ignore[arg-type]


def curve(rng: np.random.Generator) -> World:
    """A bend of 12 … 180 m radius ahead, sometimes an S; a free road or a leader."""
    forward, backward = int(rng.integers(1, 3)), int(rng.integers(0, 3))
    radius = float(np.exp(rng.uniform(np.log(12.0), np.log(180.0))))
    side = float(rng.choice([-1.0, 1.0]))
    width = float(rng.uniform(3.55, 3.8))
    reference_radius = radius + width * (forward if side < 0 else backward)
    first = float(rng.uniform(-8.0, 32.0))
    last = first + reference_radius * float(rng.uniform(0.6, 1.65))
    bends = [(first, last, side * reference_radius)]
    if rng.random() < 0.4:
        bends.append(
            (last + 8.0, last + 8.0 + reference_radius * float(rng.uniform(0.5, 1.2)), -1.3 * side * reference_radius)
        )
    top = float(np.sqrt(2.2 * radius))
    limit = float(min((v for v in LIMITS_MPS if v > 1.15 * top), default=LIMITS_MPS[-1]))
    street = make_street(
        rng,
        forward=forward,
        backward=backward,
        ego_lane=int(rng.integers(0, forward)),
        limit=limit,
        bends=bends,
        lane_width=width,
        shoulder=0.7,
    )
    speed = min(
        limit * float(rng.uniform(0.6, 0.95)),
        float(np.sqrt(top**2 + 2.2 * max(first - 4.0, 0.0))) * float(rng.uniform(0.75, 1.0)),
    )
    actors = _ambient(rng, street, min(speed, top), most=2)
    if rng.random() < 0.45:
        gap = 6.0 + speed * float(rng.uniform(0.9, 2.0))
        actors.append(vehicle(rng, 0, -1.5 * speed + 4.1 + gap, speed * float(rng.uniform(0.85, 1.0)), limit))
    return _world(rng, street, actors, speed)


def lead_braking(rng: np.random.Generator) -> World:
    """A leader that is braking already, or will have to for what stands ahead of it, or drives on."""
    limit = _limit(rng, 1, 4)
    forward = int(rng.integers(1, 4))
    street = make_street(
        rng, forward=forward, backward=int(rng.integers(0, 3)), ego_lane=int(rng.integers(0, forward)), limit=limit
    )
    speed = limit * float(rng.uniform(0.6, 0.95))
    actors = _ambient(rng, street, speed, most=3)
    gap = 4.0 + speed * float(rng.uniform(1.0, 2.0))
    s = -1.5 * speed + 4.1 + gap
    mode = rng.random()
    if mode < 0.55:
        brake = (
            float(rng.uniform(-1.3, -0.3)),
            float(rng.uniform(2.0, 4.5)),
            speed * float(rng.choice([0.0, 0.0, 0.3, 0.55])),
        )
        actors.append(vehicle(rng, 0, s, speed, speed, brake=brake))
    elif mode < 0.85:
        actors.append(vehicle(rng, 0, s, speed, speed * 1.05))
        rest = s + 1.5 * speed + float(rng.uniform(1.2, 2.2)) * speed + 8.0
        slow = limit * float(rng.choice([0.0, 0.0, 0.2]))
        actors += [vehicle(rng, 0, rest + 7.5 * k, slow, slow) for k in range(int(rng.integers(1, 4)))]
    else:
        late = (float(rng.uniform(0.3, 1.6)), float(rng.uniform(1.2, 2.6)), speed * float(rng.uniform(0.3, 0.9)))
        actors.append(vehicle(rng, 0, s, speed, speed * 1.05, brake=late if mode < 0.93 else None))
    return _world(rng, street, actors, speed)


def cut_in(rng: np.random.Generator) -> World:
    """Somebody in the next lane, slower and a little ahead, comes over; one time in five he stays where he is."""
    limit = _limit(rng, 1, 4)
    forward = int(rng.integers(2, 4))
    lane = int(rng.integers(0, forward))
    beside = lane + 1 if lane == 0 or (lane + 1 < forward and rng.random() < 0.5) else lane - 1
    street = make_street(rng, forward=forward, backward=int(rng.integers(0, 3)), ego_lane=lane, limit=limit)
    speed = limit * float(rng.uniform(0.6, 0.95))
    actors = _ambient(rng, street, speed, skip=(beside,), most=2)
    slower = speed * float(rng.uniform(0.7, 0.97))
    begins = float(rng.uniform(-1.2, 0.4))
    at_now = 6.5 + float(rng.uniform(3.0, 8.0)) + (speed - slower + 1.0) * (max(begins, 0.0) + 1.9)
    offset = street.section.lane_width * (1.0 if beside < lane else -1.0)
    shift = (begins, slower * float(rng.uniform(2.6, 4.2)), float(rng.normal(0.0, 0.12)))
    comes = rng.random() < 0.8
    s = at_now - 1.5 * slower
    actors.append(vehicle(rng, 0, s, slower, slower * 1.05, d=offset, shift=shift if comes else None))
    if rng.random() < 0.6:
        ahead = at_now + slower * float(rng.uniform(3.4, 5.0)) + 12.0
        actors += (
            [parked(rng, street.index[beside], ahead + 7.0 * k, 0.0) for k in range(int(rng.integers(1, 3)))]
            if comes
            else []
        )
    if rng.random() < 0.5:
        actors.append(vehicle(rng, 0, at_now + 30.0 + float(rng.uniform(0.0, 30.0)) - 1.5 * speed, speed, speed))
    actors += lane_traffic(rng, street.index[beside], (-60.0, s - 14.0 - 0.5 * speed), slower, most=2)
    return _world(rng, street, actors, speed)


def oncoming_narrow(rng: np.random.Generator) -> World:
    """A narrow street; cars stand on one side, and somebody comes the other way."""
    limit = _limit(rng, 0, 1)
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
    return _world(rng, street, [*actors, *coming, *behind], speed, shifts=(shift,), yields=rules)


def pedestrian_crossing(rng: np.random.Generator) -> World:
    """A zebra crossing ahead with people on it, at the kerb, or gone already."""
    limit = _limit(rng, 0, 2)
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
    actors = [a for a in _ambient(rng, street, speed, most=2) if abs(abs(a.s) - at) > 9.0]
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
    return _world(rng, street, actors, speed, yields=tuple(rules))


def parked_cars(rng: np.random.Generator) -> World:
    """A row of parked cars, some standing into the lane; sometimes one pulls out."""
    limit = _limit(rng, 0, 2)
    width = float(rng.uniform(3.3, 3.7))
    forward = int(rng.integers(1, 3))
    street = make_street(
        rng, forward=forward, backward=1, ego_lane=forward - 1, limit=limit, lane_width=width, shoulder=0.3, parking=2.3
    )
    speed = limit * float(rng.uniform(0.55, 0.9))
    actors = _ambient(rng, street, speed, most=2)
    edge = -street.half_lane
    bad = float(rng.uniform(12.0, 26.0)) + speed
    shifts, pulling = [], rng.random() < 0.4
    s = float(rng.uniform(-12.0, -4.0))
    while s < 78.0 and len(actors) < 17:
        wide, tall = float(rng.uniform(1.75, 2.0)), float(rng.uniform(3.9, 5.0))
        if bad is not None and s > bad:
            bad = 1e9
            if pulling:
                start = float(rng.uniform(-1.2, 0.3))
                shift = (-9.0, float(rng.uniform(8.0, 12.0)), -0.1)
                actors.append(
                    vehicle(
                        rng,
                        0,
                        s,
                        0.0,
                        limit * 0.7,
                        d=edge - 0.6 - 0.5 * wide,
                        width=wide,
                        length=tall,
                        start_s=start,
                        shift=shift,
                    )
                )
                s += 4.0
            else:
                into = float(rng.uniform(0.55, 1.05))
                actors.append(parked(rng, 0, s, edge + into - 0.5 * wide, width=wide, length=tall))
                ease = max(11.0, 1.7 * speed)
                full, leave = s - 0.5 * tall - 4.5 - 0.6 * speed, s + 0.5 * tall + 4.0
                shifts.append(Shift(full - ease, full, leave, leave + ease, edge + into + 0.5 + HALF_EGO, 7.5))
        elif rng.random() < 0.7:
            actors.append(parked(rng, 0, s, edge - 0.5 - 0.5 * wide, width=wide, length=tall))
        s += tall + float(rng.uniform(1.0, 4.0))
    return _world(rng, street, actors, speed, shifts=tuple(shifts))


def static_obstacle(rng: np.random.Generator) -> World:
    """Something stands in the lane: pass beside it, change lanes around it, or stop behind it."""
    limit = _limit(rng, 0, 3)
    forward = int(rng.integers(1, 4))
    lane = int(rng.integers(0, forward))
    street = make_street(rng, forward=forward, backward=int(rng.integers(0, 2)), ego_lane=lane, limit=limit)
    speed = limit * float(rng.uniform(0.5, 0.9))
    at = float(rng.uniform(14.0, 26.0)) + 1.5 * speed
    half, mode = street.half_lane, rng.random()
    skip: tuple[int, ...] = ()
    shifts: tuple[Shift, ...] = ()
    if forward == 1 or mode < 0.45:
        side = -1.0 if lane == forward - 1 or rng.random() < 0.5 else 1.0
        into = float(rng.uniform(0.6, 1.15))
        things = _things(rng, at, side * (half - into), side)
        shifts = (_pass(at, 12.0, speed, side * (half - into - 0.5 - HALF_EGO), 8.0),)
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
    actors = things + _ambient(rng, street, speed, skip=skip, most=2)
    if len(skip) and mode < 0.82 and rng.random() < 0.5:
        actors.append(vehicle(rng, street.index[skip[0]], float(rng.uniform(25.0, 60.0)), limit * 0.9, limit * 0.95))
    return _world(rng, street, actors, speed, shifts=shifts)


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


def stop_and_go(rng: np.random.Generator) -> World:
    """Dense traffic on every lane: a queue that dissolves, one that the ego runs into, or a slow crawl."""
    limit = _limit(rng, 2, 4)
    forward = int(rng.integers(1, 4))
    street = make_street(
        rng, forward=forward, backward=int(rng.integers(0, 2)), ego_lane=int(rng.integers(0, forward)), limit=limit
    )
    mode = int(rng.choice([0, 1, 1, 2]))
    speed = (float(rng.uniform(0.0, 1.5)), float(rng.uniform(4.5, 9.0)), float(rng.uniform(2.0, 5.5)))[mode]
    speed = 0.0 if speed < 0.6 else speed
    actors: list[Actor] = []
    for lane in range(forward):
        index, pace = street.index[lane], speed * float(rng.uniform(0.85, 1.15))
        s = (
            -1.5 * speed
            + 4.1
            + (
                2.0 + speed * float(rng.uniform(0.8, 1.5))
                if lane == street.ego_lane
                else float(rng.uniform(-16.0, 4.0))
            )
        )
        first = len(actors)
        for _ in range(int(rng.integers(3, 6))):
            one = vehicle(
                rng,
                index,
                s,
                pace,
                limit * float(rng.uniform(0.6, 0.8)),
                width=1.85,
                length=float(rng.uniform(4.0, 5.0)),
            )
            actors.append(dataclasses.replace(one, s=s + 0.5 * one.length))
            s += one.length + 2.2 + pace * float(rng.uniform(0.8, 1.3)) * (1.0 if mode else 0.3)
        actors[first:] = _wave(rng, actors[first:], mode, pace)
        if lane != street.ego_lane or rng.random() < 0.7:
            back = actors[first].s - 15.0 - speed * 1.2 if lane != street.ego_lane else -1.5 * speed - 1.2 - 5.0 - speed
            actors.append(vehicle(rng, index, back, pace, max(pace, 2.0), length=4.6))
    return _world(rng, street, actors, speed)


def _wave(rng: np.random.Generator, queue: list[Actor], mode: int, pace: float) -> list[Actor]:
    """What the head of a queue does: it drives off (0), stands (1), or crawls on unevenly (2)."""
    if mode == 0:
        begins = float(rng.uniform(-2.5, 1.5))
        count = len(queue)
        return [
            dataclasses.replace(a, speed=0.0, start_s=begins + 0.7 * (count - 1 - k))
            if pace < 0.6
            else dataclasses.replace(a, start_s=-9.0)
            for k, a in enumerate(queue)
        ]
    if mode == 1:
        stands = int(rng.integers(1, 3))
        return [
            dataclasses.replace(a, s=a.s + float(rng.uniform(2.0, 9.0)), speed=0.0, desired=0.1)
            if k >= len(queue) - stands
            else a
            for k, a in enumerate(queue)
        ]
    head = dataclasses.replace(
        queue[-1],
        desired=max(pace, 1.0),
        brake=(float(rng.uniform(-1.3, 1.0)), float(rng.uniform(1.0, 2.5)), pace * float(rng.choice([0.0, 0.4, 1.0]))),
    )
    return [*queue[:-1], head]
