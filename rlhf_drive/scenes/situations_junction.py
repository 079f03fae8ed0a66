"""Situations at junctions: turning through cross traffic, traffic lights, roundabouts."""

from __future__ import annotations

import dataclasses

import numpy as np

from rlhf_drive.scenes.geometry import Path, contact_zone, path_from_points
from rlhf_drive.scenes.junctions import Junction, crossroads, roundabout
from rlhf_drive.scenes.roads import CrossSection
from rlhf_drive.scenes.situations import LIMITS_MPS, bystander, draw_driver, lane_traffic, pedestrian, vehicle
from rlhf_drive.scenes.world import STEPS, Actor, Driver, StopLine, World, Yield

__all__ = ["intersection_turn", "red_light", "roundabout_entry"]

EGO, CROSS, ALWAYS = 0, 1, 2
"""Light groups: the ego's axis, the crossing one, and a line that never opens."""
NOSE = 4.05
"""Rear axle to front bumper (m)."""


@dataclasses.dataclass
class _Draft:
    """A junction world in the making."""

    junction: Junction
    paths: list[Path]
    index: dict[tuple[int, int, int], int]
    stop: float
    """Distance of the stop lines from the junction."""
    actors: list[Actor] = dataclasses.field(default_factory=list)
    lines: list[StopLine] = dataclasses.field(default_factory=list)
    rules: list[Yield] = dataclasses.field(default_factory=list)

    def way(self, a: int, b: int, lane: int = 0) -> int:
        """Index of the path from arm a to arm b; every path but the ego's has s=0 at the junction."""
        key = (a, b, lane)
        if key not in self.index:
            self.index[key] = len(self.paths)
            self.paths.append(self.junction.way(a, b, lane))
        return self.index[key]

    def add(self, actors: list[Actor], group: int | None = None) -> list[int]:
        """Add users and, with a light group, the stop line of each; returns their numbers."""
        numbers = []
        for actor in actors:
            if len(self.actors) >= 18:
                break
            self.actors.append(actor)
            numbers.append(len(self.actors))
            if group is not None and actor.s + 0.5 * actor.length < -self.stop + 0.5:
                self.lines.append(StopLine(len(self.actors), -self.stop, group))
        return numbers

    def ego_yields(
        self, numbers: list[int], line: float, *, clearance: float = 2.7, longest: float = 1e3, before: float = 1.2
    ) -> None:
        """The ego waits at `line`, or before the conflict if that comes later, for these users."""
        for number in numbers:
            other = self.paths[self.actors[number - 1].path]
            zone = contact_zone(self.paths[0], other, clearance, longest)
            if zone is not None:
                wait = max(line, zone[0] - 3.0)
                self.rules.append(Yield(0, wait, zone[:2], number, zone[2:], before, 0.4))


def _draft(junction: Junction, target: int, lane: int, ahead: float, stop: float) -> _Draft:
    """Path 0 is the ego's way, with s=0 where the ego is now, `ahead` metres before the junction."""
    way = junction.way(0, target, lane)
    return _Draft(junction, [dataclasses.replace(way, start=way.start + ahead)], {}, stop)


def _angles(rng: np.random.Generator, drop: int | None = None) -> list[float]:
    """Directions of the arms from the ego's (pi) on; `drop` leaves out one of the arms 1 (right), 2, 3 (left)."""
    jitter = rng.uniform(-0.14, 0.14, 3)
    angles = [np.pi] + [np.pi * (1.0 + 0.5 * k) + float(jitter[k - 1]) for k in (1, 2, 3)]
    return [a for k, a in enumerate(angles) if k != drop]


def _finish(
    rng: np.random.Generator, draft: _Draft, limit: float, speed: float, red: np.ndarray, driver: Driver
) -> World:
    aside = draft.junction.section.right_edge - float(rng.uniform(1.5, 3.0))
    while len(draft.actors) < 3:
        draft.add([bystander(rng, 0, (-45.0, -8.0), aside)])
    return World(
        draft.junction.map,
        tuple(draft.paths),
        tuple(draft.actors),
        driver,
        speed,
        limit,
        lateral=float(rng.uniform(-0.3, 0.3)),
        heading_error=float(rng.uniform(-0.03, 0.03)),
        stop_lines=tuple(draft.lines),
        yields=tuple(draft.rules),
        red=red,
    )


def _same_lane(rng: np.random.Generator, speed: float, limit: float, ahead: float, chance: float) -> list[Actor]:
    """A leader and a follower on the ego's way."""
    actors = []
    if rng.random() < chance:
        s = -1.5 * speed + NOSE + 5.5 + speed * float(rng.uniform(0.8, 1.6))
        actors.append(vehicle(rng, 0, s, speed * float(rng.uniform(0.9, 1.0)), limit))
    if rng.random() < 0.5:
        actors.append(vehicle(rng, 0, -1.5 * speed - 7.0 - speed * float(rng.uniform(0.9, 1.6)), speed, limit))
    return actors


def _outbound(rng: np.random.Generator, draft: _Draft, arms: list[tuple[int, int]], limit: float) -> None:
    """Vehicles that have left the junction already."""
    for a, b in arms:
        if rng.random() < 0.5:
            length = draft.junction.length(a, b)
            draft.add([vehicle(rng, draft.way(a, b), length + float(rng.uniform(4.0, 40.0)), limit * 0.6, limit * 0.9)])


def intersection_turn(rng: np.random.Generator) -> World:
    """Left, right or straight over a junction with cross traffic; with lights at green, or right of way."""
    limit = float(LIMITS_MPS[int(rng.integers(0, 3))])
    lanes = int(rng.integers(1, 3))
    turn = int(rng.choice([0, 0, 1, 1, 2]))
    drop = None if rng.random() < 0.5 else int(rng.choice({0: [1, 2, 2], 1: [2, 2, 3], 2: [1, 3]}[turn]))
    angles = _angles(rng, drop)
    full = [k for k in (0, 1, 2, 3) if k != drop]
    target = full.index({0: 3, 1: 1, 2: 2}[turn])
    signals = drop is None and rng.random() < 0.6
    section = CrossSection(lanes, lanes, float(rng.uniform(3.2, 3.7)), float(rng.uniform(0.3, 0.6)))
    walks = 3.0 if rng.random() < 0.5 else 0.0
    corner = float(rng.uniform(5.5, 9.0))
    junction = crossroads(angles, section, corner=corner, limit=limit, route=target, signals=signals, walks=walks)
    lane = {0: 0, 1: lanes - 1, 2: int(rng.integers(0, lanes))}[turn]
    ahead = float(rng.uniform(-3.0, 34.0 if turn == 2 else 17.0))
    lane = 0 if turn != 2 else lane
    draft = _draft(junction, target, lane, ahead, walks + 2.0)
    driver = draw_driver(rng, limit)
    speed = min(
        driver.desired * float(rng.uniform(0.7, 1.0)), float(np.sqrt(20.0 + 2.6 * max(ahead + 2.0, 0.0)))
    ) * float(rng.uniform(0.75, 1.0))
    draft.add(_same_lane(rng, speed, limit, ahead, 0.35))
    minor = not signals and rng.random() < 0.6
    if 2 in full:
        _oncoming(rng, draft, full, limit, turn, ahead)
    for a, b in ((1, 3), (3, 1)):
        if a in full and b in full:
            _crossing(rng, draft, (full.index(a), full.index(b)), limit, minor, ahead, lanes)
    if walks > 0 and turn == 1 and rng.random() < 0.6:
        _walkers(rng, draft, section, target, ahead)
    _outbound(rng, draft, [(full.index(a), 0) for a in full if a != 0], limit)
    red = np.zeros((3, STEPS), dtype=bool)
    red[CROSS], red[ALWAYS] = True, True
    return _finish(rng, draft, limit, speed, red, driver)


def _oncoming(rng: np.random.Generator, draft: _Draft, full: list[int], limit: float, turn: int, ahead: float) -> None:
    """Traffic from the opposite arm, which has the right of way over a left turn."""
    way = draft.way(full.index(2), 0)
    cars = lane_traffic(
        rng, way, (-75.0, 20.0), limit * float(rng.uniform(0.6, 0.9)), most=int(rng.integers(0, 4)), gaps=(14.0, 40.0)
    )
    numbers = draft.add(cars)
    if turn == 0:
        draft.ego_yields(numbers, ahead)


def _crossing(
    rng: np.random.Generator, draft: _Draft, way: tuple[int, int], limit: float, minor: bool, ahead: float, lanes: int
) -> None:
    """Traffic across the ego's axis: it waits, unless the ego is on the minor road."""
    lane = int(rng.integers(0, lanes)) if len(draft.junction.curves[way]) > 1 else 0
    index = draft.way(*way, lane)
    if minor:
        cars = lane_traffic(rng, index, (-80.0, 25.0), limit * float(rng.uniform(0.6, 0.95)), most=3, gaps=(16.0, 55.0))
        draft.ego_yields(draft.add(cars), ahead - 1.0, longest=14.0, before=1.5)
        return
    s = -draft.stop - 2.2
    for _ in range(int(rng.integers(0, 4))):
        draft.add([vehicle(rng, index, s - 2.6, 0.0, limit, length=4.6)], ALWAYS)
        s -= float(rng.uniform(6.6, 8.5))
    if rng.random() < 0.5:
        draft.add([vehicle(rng, index, s - float(rng.uniform(18.0, 40.0)), limit * 0.6, limit * 0.8)], ALWAYS)


def _walkers(rng: np.random.Generator, draft: _Draft, section: CrossSection, target: int, ahead: float) -> None:
    """People on the zebra crossing of the arm the ego turns into."""
    length = draft.junction.length(0, target)
    arm = draft.paths[0]
    at = arm.pose(ahead + length + 2.5)
    center = -section.center(0)
    width = section.left_edge
    aside = np.array([[-width + center - 10.0], [width + center + 10.0]])
    normal = np.array([-np.sin(at[2]), np.cos(at[2])])
    walk = path_from_points(at[:2] + aside * normal, -width + center - 10.0)
    for path in (walk, walk.reverse())[: int(rng.integers(1, 3))]:
        draft.paths.append(path)
        pace = float(rng.uniform(1.0, 1.7))
        s = -pace * (float(rng.uniform(0.0, 6.5)) + 1.5)
        numbers = draft.add([pedestrian(rng, len(draft.paths) - 1, s, float(rng.uniform(-1.0, 1.0)), pace)])
        zone = (ahead + length + 0.5, ahead + length + 4.5)
        for number in numbers:
            draft.rules.append(Yield(0, zone[0] - 0.8, zone, number, (-1.9, 1.7), 2.0, 0.2))


def red_light(rng: np.random.Generator) -> World:
    """A junction with lights: red with a queue or none, about to change, or green. The others have what is left."""
    limit = float(LIMITS_MPS[int(rng.integers(1, 4))])
    lanes = int(rng.integers(1, 3))
    turn = int(rng.choice([0, 1, 2, 2, 2]))
    target = {0: 3, 1: 1, 2: 2}[turn]
    section = CrossSection(lanes, lanes, float(rng.uniform(3.2, 3.7)), float(rng.uniform(0.3, 0.6)))
    walks = 3.0 if rng.random() < 0.6 else 0.0
    junction = crossroads(
        _angles(rng), section, corner=float(rng.uniform(5.5, 9.0)), limit=limit, route=target, signals=True, walks=walks
    )
    driver, mode = draw_driver(rng, limit), rng.random()
    fast = driver.desired * float(rng.uniform(0.7, 1.0))
    ahead = (
        walks + 4.0 + fast**2 / 5.2 + float(rng.uniform(0.0, 12.0)) if mode < 0.72 else float(rng.uniform(10.0, 45.0))
    )
    near = mode < 0.72 and rng.random() < 0.4
    if near:
        ahead = walks + 2.0 + float(rng.uniform(4.0, 16.0))
        fast = float(np.sqrt(2.0 * 1.6 * max(ahead - walks - 3.0, 0.1)))
    lane = int(rng.integers(0, lanes)) if turn == 2 else 0
    draft = _draft(junction, target, lane, ahead + NOSE, walks + 2.0)
    ahead += NOSE
    speed = fast if turn == 2 or mode < 0.72 else min(fast, float(np.sqrt(25.0 + 2.4 * max(ahead, 0.0))))
    red = np.zeros((3, STEPS), dtype=bool)
    red[ALWAYS] = True
    changes = STEPS if mode < 0.6 else int(rng.integers(20, 46))
    if mode < 0.72:
        red[EGO, :changes] = True
        red[CROSS, max(changes - 20, 0) :] = mode >= 0.6
        draft.lines.append(StopLine(0, ahead - draft.stop, EGO))
    else:
        red[CROSS] = True
    _queue(rng, draft, speed, limit, ahead, mode < 0.72, near)
    flow = limit * float(rng.uniform(0.6, 0.9))
    group = CROSS
    for a, b in ((1, 3), (3, 1)):
        for k in range(lanes):
            cars = lane_traffic(rng, draft.way(a, b, k), (-85.0, 30.0), flow, most=4, gaps=(6.0, 22.0))
            draft.add([dataclasses.replace(c, speed=0.0) if _stands(c, red, draft.stop) else c for c in cars], group)
    oncoming = lane_traffic(rng, draft.way(2, 0), (-70.0, 20.0), flow, most=2)
    numbers = draft.add(
        [dataclasses.replace(c, speed=0.0) if _stands_ego(c, red, draft.stop) else c for c in oncoming], EGO
    )
    if turn == 0:
        draft.ego_yields(numbers, ahead)
    return _finish(rng, draft, limit, speed, red, driver)


def _stands(car: Actor, red: np.ndarray, stop: float) -> bool:
    return bool(red[CROSS, 0]) and -stop - 25.0 < car.s < -stop - 0.5 * car.length


def _stands_ego(car: Actor, red: np.ndarray, stop: float) -> bool:
    return bool(red[EGO, 0]) and -stop - 25.0 < car.s < -stop - 0.5 * car.length


def _queue(
    rng: np.random.Generator, draft: _Draft, speed: float, limit: float, ahead: float, closed: bool, near: bool
) -> None:
    """Vehicles of the ego's lane before it: waiting at the line, or driving on."""
    line = ahead - draft.stop
    if closed and not near and rng.random() < 0.65:
        s = line - 0.8
        for _ in range(int(rng.integers(1, 3))):
            one = vehicle(rng, 0, s, 0.0, limit * 0.8)
            one = dataclasses.replace(one, s=s - 0.5 * one.length)
            if one.s - 0.5 * one.length < NOSE + 6.0:
                break
            draft.actors.append(one)
            draft.lines.append(StopLine(len(draft.actors), line, EGO))
            s = one.s - 0.5 * one.length - float(rng.uniform(1.8, 3.0))
    elif not closed and rng.random() < 0.5:
        draft.add([vehicle(rng, 0, -1.5 * speed + NOSE + 5.0 + speed * float(rng.uniform(1.0, 2.0)), speed, limit)])
    if rng.random() < 0.6:
        draft.add([vehicle(rng, 0, -1.5 * speed - 8.0 - speed * float(rng.uniform(1.0, 2.0)), speed, limit)])


def roundabout_entry(rng: np.random.Generator) -> World:
    """Into a roundabout past circulating traffic, and out at the first, second or third exit."""
    limit = float(LIMITS_MPS[int(rng.integers(0, 3))])
    drop = None if rng.random() < 0.7 else int(rng.integers(1, 4))
    angles = [np.pi * (1.0 + 0.5 * k) + (float(rng.uniform(-0.1, 0.1)) if k else 0.0) for k in range(4) if k != drop]
    arms = len(angles)
    target = int(rng.integers(1, arms))
    section = CrossSection(1, 1, float(rng.uniform(3.4, 3.8)), 0.5)
    junction = roundabout(angles, section, radius=float(rng.uniform(14.0, 20.0)), limit=limit, route=target)
    ahead = float(rng.uniform(-8.0, 26.0))
    draft = _draft(junction, target, 0, ahead, 2.0)
    driver = draw_driver(rng, limit)
    speed = min(driver.desired, float(np.sqrt(22.0 + 2.4 * max(ahead + 8.0, 0.0)))) * float(rng.uniform(0.7, 1.0))
    draft.add(_same_lane(rng, speed, limit, ahead, 0.3))
    pace = float(rng.uniform(4.5, 6.0))
    before = arms - 1
    ring = [(before, b) for b in range(1, arms) if b != before] + ([(before - 1, 1)] if before - 1 > 1 else [])
    spot = float(rng.uniform(-16.0, 10.0))
    for way in [ring[int(rng.integers(0, len(ring)))] for _ in range(int(rng.integers(0, 4)))]:
        index = draft.way(*way)
        numbers = draft.add([vehicle(rng, index, spot, pace, pace * 1.15, length=4.4)])
        spot -= float(rng.uniform(12.0, 24.0))
        draft.ego_yields(numbers, ahead + 1.5, longest=9.0, before=1.3)
    _outbound(rng, draft, [(a, 0) for a in range(1, arms)], limit)
    for a in range(1, arms):
        if rng.random() < 0.4:
            draft.add([vehicle(rng, draft.way(a, (a + 1) % arms), -float(rng.uniform(25.0, 60.0)), pace, pace)])
    red = np.zeros((3, STEPS), dtype=bool)
    return _finish(rng, draft, limit, speed, red, driver)
