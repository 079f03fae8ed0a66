"""The on-ramp: merging, from either side of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from rlhf_drive.scenes.junctions import OnRamp, on_ramp
from rlhf_drive.scenes.roads import CrossSection, bending_road
from rlhf_drive.scenes.situations import LIMITS_MPS, bystander, draw_driver, lane_traffic, vehicle
from rlhf_drive.scenes.world import Actor, Blend, World

__all__ = ["merge"]

NOSE = 4.05
"""Rear axle to front bumper (m)."""


def merge(rng: np.random.Generator) -> World:
    """An on-ramp: the ego finds its gap in the main lane, or somebody comes in before or behind the ego."""
    limit = float(LIMITS_MPS[int(rng.integers(2, 5))])
    lanes, on = int(rng.integers(1, 4)), bool(rng.random() < 0.6)
    section = CrossSection(lanes, 0, float(rng.uniform(3.4, 3.75)), float(rng.uniform(0.3, 0.6)))
    ways = _ways(rng, section, limit, on)
    main = ways.main[-1]
    paths = (ways.ramp, main, *ways.main[:-1]) if on else (main, ways.ramp, *ways.main[:-1])
    speed = limit * float(rng.uniform(0.55, 0.9))
    pace = limit * float(rng.uniform(0.6, 0.95))
    actors = _on_the_main_lane(rng, ways, speed, pace) if on else _on_the_ramp(rng, speed, pace)
    if rng.random() < 0.4:
        actors.append(vehicle(rng, 0, -1.5 * speed + NOSE + 6.0 + speed * float(rng.uniform(1.2, 2.4)), speed, limit))
    for index in range(2, len(paths)):
        actors += lane_traffic(rng, index, (-50.0, 70.0), pace * 1.05, most=3)
    edge = -0.5 * section.lane_width - section.shoulder if on else -section.right_edge
    while len(actors) < 3:
        actors.append(bystander(rng, 0, (-30.0, 10.0), edge + float(rng.uniform(1.5, 3.0)) * (-1.0 if on else 1.0)))
    shift = main.nearest(ways.ramp.pose(ways.gore)[:2])[0] - ways.gore
    low, high = ways.gore - 25.0, ways.end + 5.0
    ramp_path, main_path = (0, 1) if on else (1, 0)
    blends = [Blend(ramp_path, main_path, low, high)]
    if not on or rng.random() < 0.35:
        blends.append(Blend(main_path, ramp_path, low + shift, high + shift))
    driver = draw_driver(rng, limit)
    world = World(ways.map, paths, tuple(actors[:20]), driver, speed, limit, blends=tuple(blends))
    return replace(world, lateral=float(rng.uniform(-0.3, 0.3)), heading_error=float(rng.uniform(-0.02, 0.02)))


def _ways(rng: np.random.Generator, section: CrossSection, limit: float, on: bool) -> OnRamp:
    """A straight or gently bending main road and a ramp that joins it over 75 … 105 m."""
    side = float(rng.choice([-1.0, 1.0]))
    bends = [] if rng.random() < 0.4 else [(-40.0, 90.0, side * float(rng.uniform(180.0, 500.0)))]
    begin = float(rng.uniform(-50.0, -15.0))
    end, apart = begin + float(rng.uniform(75.0, 105.0)), float(rng.uniform(8.0, 12.0))
    reference = bending_road(bends, -140.0, 210.0)
    return on_ramp(reference, section, begin=begin, end=end, apart=apart, limit=limit, ego_on_ramp=on)


def _on_the_main_lane(rng: np.random.Generator, ways: OnRamp, speed: float, pace: float) -> list[Actor]:
    """Traffic on the lane the ego (at `speed`) comes into; mostly somebody who would arrive there with it."""
    meet = 0.5 * (ways.gore + ways.end)
    there = ways.main[-1].nearest(ways.ramp.pose(meet)[:2])[0]
    beside = there - pace * (meet / speed + 1.5) + float(rng.uniform(-10.0, 8.0))
    actors = [vehicle(rng, 1, beside, pace, pace * 1.1)] if rng.random() < 0.75 else []
    keep_out = (beside - 14.0, beside + 14.0)
    return actors + lane_traffic(rng, 1, (-65.0, 70.0), pace, most=4, gaps=(10.0, 40.0), keep_out=keep_out)


def _on_the_ramp(rng: np.random.Generator, speed: float, pace: float) -> list[Actor]:
    """Vehicles that come in from the ramp about where the ego is, and one behind the ego."""
    span = (-1.5 * pace - 18.0, -1.5 * pace + 26.0)
    actors = lane_traffic(rng, 1, span, pace, most=2, gaps=(9.0, 20.0))
    return [*actors, vehicle(rng, 0, -1.5 * speed - 8.0 - 1.2 * speed, speed, speed * 1.1)]
