"""Situations on a street in which the ego follows: bends, leaders that brake, cut-ins, queues."""

from __future__ import annotations

import dataclasses

import numpy as np

from rlhf_drive.scenes.situations import (
    LIMITS_MPS,
    ambient,
    draw_limit,
    lane_traffic,
    make_street,
    parked,
    street_world,
    vehicle,
)
from rlhf_drive.scenes.world import Actor, World

__all__ = ["curve", "cut_in", "lead_braking", "stop_and_go"]


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
    actors = ambient(rng, street, min(speed, top), most=2)
    if rng.random() < 0.45:
        gap = 6.0 + speed * float(rng.uniform(0.9, 2.0))
        actors.append(vehicle(rng, 0, -1.5 * speed + 4.1 + gap, speed * float(rng.uniform(0.85, 1.0)), limit))
    return street_world(rng, street, actors, speed)


def lead_braking(rng: np.random.Generator) -> World:
    """A leader that is braking already, or will have to for what stands ahead of it, or drives on."""
    limit = draw_limit(rng, 1, 4)
    forward = int(rng.integers(1, 4))
    street = make_street(
        rng, forward=forward, backward=int(rng.integers(0, 3)), ego_lane=int(rng.integers(0, forward)), limit=limit
    )
    speed = limit * float(rng.uniform(0.6, 0.95))
    actors = ambient(rng, street, speed, most=3)
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
    return street_world(rng, street, actors, speed)


def cut_in(rng: np.random.Generator) -> World:
    """Somebody in the next lane, slower and a little ahead, comes over; one time in five he stays where he is."""
    limit = draw_limit(rng, 1, 4)
    forward = int(rng.integers(2, 4))
    lane = int(rng.integers(0, forward))
    beside = lane + 1 if lane == 0 or (lane + 1 < forward and rng.random() < 0.5) else lane - 1
    street = make_street(rng, forward=forward, backward=int(rng.integers(0, 3)), ego_lane=lane, limit=limit)
    speed = limit * float(rng.uniform(0.6, 0.95))
    actors = ambient(rng, street, speed, skip=(beside,), most=2)
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
    return street_world(rng, street, actors, speed)


def stop_and_go(rng: np.random.Generator) -> World:
    """Dense traffic on every lane: a queue that dissolves, one that the ego runs into, or a slow crawl."""
    limit = draw_limit(rng, 2, 4)
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
    return street_world(rng, street, actors, speed)


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
