"""Building blocks of the situations: the driver, road users of random size, traffic along a lane, the street."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rlhf_drive.scenes.expert import AXLE_TO_CENTER_M
from rlhf_drive.scenes.geometry import Path
from rlhf_drive.scenes.model import AgentType
from rlhf_drive.scenes.roads import EVERYWHERE, CrossSection, RoadMap, bending_road, corridor, lane_path
from rlhf_drive.scenes.world import Actor, Driver, World

__all__ = [
    "LIMITS_MPS",
    "Street",
    "ambient",
    "bystander",
    "draw_driver",
    "draw_limit",
    "gentle_bends",
    "lane_traffic",
    "make_street",
    "parked",
    "pedestrian",
    "street_world",
    "vehicle",
    "walkers",
]

LIMITS_MPS = (8.3, 11.1, 13.9, 16.7, 19.4)
"""30 … 70 km/h."""


def draw_driver(rng: np.random.Generator, limit: float) -> Driver:
    """A person; the desired speed, 0.75 … 1.0 of the limit, shows only in how the car has been driven so far."""
    return Driver(
        desired=limit * float(rng.uniform(0.75, 1.0)),
        headway=float(rng.uniform(1.2, 1.8)),
        min_gap=float(rng.uniform(2.2, 3.4)),
        accel=float(rng.uniform(1.2, 1.9)),
        decel=float(rng.uniform(1.6, 2.3)),
        lateral_accel=float(rng.uniform(2.1, 3.2)),
        reaction_steps=int(rng.integers(2, 5)),
        wander=float(rng.uniform(0.03, 0.15)),
        wander_length=float(rng.uniform(45.0, 120.0)),
        wander_phase=float(rng.uniform(0.0, 2 * np.pi)),
        bias=float(rng.uniform(-0.15, 0.15)),
    )


def vehicle(rng: np.random.Generator, path: int, s: float, speed: float, desired: float, **changes: object) -> Actor:
    """A car, sometimes a van or lorry, driven by somebody of random temper."""
    large = rng.random() < 0.08
    length, width = (
        (rng.uniform(6.5, 10.5), rng.uniform(2.2, 2.5)) if large else (rng.uniform(3.8, 5.1), rng.uniform(1.72, 2.02))
    )
    values: dict[str, object] = {
        "d": float(rng.normal(0.0, 0.12)),
        "length": float(length),
        "width": float(width),
        "headway": float(rng.uniform(0.9, 1.7)),
        "min_gap": float(rng.uniform(1.6, 3.0)),
        "accel": float(rng.uniform(1.0, 2.0)),
        "decel": float(rng.uniform(1.6, 2.6)),
    }
    return Actor(path=path, s=s, speed=float(speed), desired=float(desired), **{**values, **changes})  # type: ignore[arg-type]


def parked(rng: np.random.Generator, path: int, s: float, d: float, **changes: object) -> Actor:
    """A car that stands and stays."""
    return vehicle(rng, path, s, 0.0, 0.1, **{"d": d, "steady": True, **changes})


def pedestrian(rng: np.random.Generator, path: int, s: float, d: float, speed: float, start_s: float = -9.0) -> Actor:
    """Somebody who walks along `path`, from `start_s` on."""
    size = float(rng.uniform(0.5, 0.7))
    return Actor(path, s, d, speed, speed, size, size, AgentType.PEDESTRIAN, steady=True, start_s=start_s)


def lane_traffic(
    rng: np.random.Generator,
    path: int,
    span: tuple[float, float],
    speed: float,
    *,
    most: int,
    gaps: tuple[float, float] = (16.0, 50.0),
    keep_out: tuple[float, float] | None = None,
) -> list[Actor]:
    """Up to `most` vehicles along a path within `span`, bumper gaps drawn from `gaps`, none inside `keep_out`."""
    actors: list[Actor] = []
    at = span[0] + float(rng.uniform(0.0, gaps[1]))
    while at < span[1] and len(actors) < most:
        pace = speed * float(rng.uniform(0.85, 1.05))
        one = vehicle(rng, path, at, pace, pace * float(rng.uniform(1.0, 1.15)))
        if keep_out is None or not keep_out[0] - 0.5 * one.length < at < keep_out[1] + 0.5 * one.length:
            actors.append(one)
        at += one.length + 5.0 + float(rng.uniform(*gaps))
    return actors


@dataclass(frozen=True)
class Street:
    """A road without junctions. Path 0 is the ego's lane; `index[lane]` finds the others."""

    reference: Path
    section: CrossSection
    map: RoadMap
    paths: tuple[Path, ...]
    index: dict[int, int]
    limit: float
    ego_lane: int

    def on_route(self, s: float) -> float:
        """Arclength on the ego's path beside the reference's arclength `s`."""
        return self.paths[0].nearest(self.reference.pose(s, self.section.center(self.ego_lane))[:2])[0]

    @property
    def half_lane(self) -> float:
        """Half a lane's width."""
        return 0.5 * self.section.lane_width


def gentle_bends(rng: np.random.Generator, limit: float) -> list[tuple[float, float, float]]:
    """The course of an ordinary street: straight, or bending as tightly as its limit allows."""
    if rng.random() < 0.3:
        return []
    radius = float(rng.uniform(1.0, 3.5)) * max(limit**2 / 2.2, 35.0) * float(rng.choice([-1.0, 1.0]))
    first = float(rng.uniform(-50.0, 25.0))
    last = first + min(float(rng.uniform(40.0, 110.0)), 1.4 * abs(radius))
    bends = [(first, last, radius)]
    if rng.random() < 0.4:
        bends.append((last + 5.0, last + 5.0 + min(60.0, abs(radius)), -radius * float(rng.uniform(0.8, 1.5))))
    return bends


def make_street(
    rng: np.random.Generator,
    *,
    forward: int,
    backward: int,
    ego_lane: int,
    limit: float,
    bends: list[tuple[float, float, float]] | None = None,
    lane_width: float | None = None,
    shoulder: float | None = None,
    parking: float = 0.0,
) -> Street:
    """A street of random course; `ego_lane` counts from the middle of the road outwards."""
    course = gentle_bends(rng, limit) if bends is None else bends
    section = CrossSection(
        forward,
        backward,
        float(rng.uniform(3.2, 3.75)) if lane_width is None else lane_width,
        float(rng.uniform(0.3, 0.7)) if shoulder is None else shoulder,
        parking,
    )
    reference = bending_road(course, -90.0, 210.0)
    cut = float(rng.uniform(-75.0, -55.0))
    pieces = [cut + float(k) * float(rng.uniform(44.0, 56.0)) for k in range(5)]
    road = corridor(reference, section, limit, [*sorted(pieces), 195.0], forward_route=EVERYWHERE)
    lanes = [ego_lane] + [k for k in range(-backward, forward) if k != ego_lane]
    paths = tuple(lane_path(reference, section, k) for k in lanes)
    return Street(reference, section, road, paths, {k: i for i, k in enumerate(lanes)}, limit, ego_lane)


def bystander(rng: np.random.Generator, path: int, span: tuple[float, float], aside: float) -> Actor:
    """Somebody on foot or, one time in four, on a bicycle, beside the road, who matters to nobody."""
    s = float(rng.uniform(*span))
    if rng.random() < 0.25:
        pace = float(rng.uniform(2.5, 5.5))
        return Actor(path, s, aside, pace, pace, 1.8, 0.65, AgentType.BICYCLE, steady=True)
    return pedestrian(rng, path, s, aside, float(rng.uniform(0.0, 1.7)))


def walkers(rng: np.random.Generator, street: Street, least: int, most: int) -> list[Actor]:
    """Bystanders along both sides of the street."""
    actors = []
    for _ in range(int(rng.integers(least, most + 1))):
        right = rng.random() < 0.5 or street.section.backward == 0
        lane = street.section.forward - 1 if right else -street.section.backward
        edge = street.half_lane + street.section.shoulder + street.section.parking * right
        actors.append(bystander(rng, street.index[lane], (-20.0, 60.0), -edge - float(rng.uniform(1.3, 3.5))))
    return actors


def draw_limit(rng: np.random.Generator, low: int, high: int) -> float:
    return float(LIMITS_MPS[int(rng.integers(low, high + 1))])


def ambient(
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
        behind = -1.5 * speed + AXLE_TO_CENTER_M - 5.2 - max(6.0, speed * float(rng.uniform(1.0, 2.2)))
        actors.append(vehicle(rng, 0, behind, speed, speed * 1.1))
    return actors


def street_world(rng: np.random.Generator, street: Street, actors: list[Actor], speed: float, **more: object) -> World:
    """The street's world with a random driver who is not quite in the middle of the lane."""
    values: dict[str, object] = {
        "driver": draw_driver(rng, street.limit),
        "lateral": float(rng.uniform(-0.35, 0.35)),
        "heading_error": float(rng.uniform(-0.03, 0.03)),
        **more,
    }
    least = max(3 - len(actors), 0)
    people = walkers(rng, street, least, max(least, 2))
    return World(street.map, street.paths, (*actors, *people)[:20], speed=speed, limit=street.limit, **values)  # type: ignore[arg-type]
