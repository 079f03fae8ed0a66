"""What a situation is made of before it is simulated: map, paths, actors, lights and the ego's driver."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rlhf_drive.scenes.geometry import Path
from rlhf_drive.scenes.model import AgentType
from rlhf_drive.scenes.roads import RoadMap

__all__ = ["DT_S", "EGO_SIZE", "NOW", "STEPS", "Actor", "Blend", "Driver", "Shift", "StopLine", "World", "Yield"]

DT_S = 0.1
NOW = 15
"""Step of t=0; the simulation starts 1.5 s earlier."""
STEPS = NOW + 51
"""Simulated steps, t = -1.5 … 5.0 s."""
EGO_SIZE = (5.176, 2.297)
"""Length and width of the ego (m)."""


@dataclass(frozen=True)
class Actor:
    """Another road user. It follows `paths[path]`; a vehicle by the intelligent driver model, unless `steady`."""

    path: int
    s: float
    """Arclength of its centre at t=-1.5 s."""
    d: float
    """Left offset of its centre from the path."""
    speed: float
    """m/s at t=-1.5 s."""
    desired: float
    """Speed it would like to drive, m/s."""
    length: float = 4.7
    width: float = 1.9
    type: AgentType = AgentType.VEHICLE
    steady: bool = False
    """Keeps `speed` whatever happens: pedestrians, and everything that stands."""
    start_s: float = -9.0
    """Before this time it stands and waits (seconds relative to now)."""
    headway: float = 1.3
    min_gap: float = 2.0
    accel: float = 1.5
    decel: float = 2.0
    brake: tuple[float, float, float] | None = None
    """(time it begins, deceleration, speed it goes down to): brakes for a reason of its own."""
    shift: tuple[float, float, float] | None = None
    """(time it begins, metres of road it takes, left offset it ends at): lane change or pulling out."""


@dataclass(frozen=True)
class StopLine:
    """A line actor `actor` (0 = ego) must not cross while light group `group` is red."""

    actor: int
    s: float
    group: int


@dataclass(frozen=True)
class Yield:
    """Actor `actor` (0 = ego) waits at `line` while `other` would share the conflict zone with it."""

    actor: int
    line: float
    """Arclength on its own path where it waits."""
    zone: tuple[float, float]
    """Where the zone begins and ends on its own path."""
    other: int
    other_zone: tuple[float, float]
    """The same on the other's path."""
    before: float = 1.2
    """Seconds it wants to be gone before the other arrives."""
    after: float = 0.5
    """Seconds it lets pass after the other has left."""


@dataclass(frozen=True)
class Blend:
    """Users of path `own` keep their gap to users of path `other` between two arclengths, though still beside them."""

    own: int
    other: int
    low: float
    high: float


@dataclass(frozen=True)
class Shift:
    """A planned detour of the ego: `offset` metres to the left from `full` to `leave`, eased in and out."""

    begin: float
    full: float
    leave: float
    end: float
    offset: float
    cap: float = 99.0
    """Speed while passing, m/s."""


@dataclass(frozen=True)
class Driver:
    """How the human drives: a careful person with a taste, a reaction time and an unsteady hand."""

    desired: float
    """m/s on a free straight road."""
    headway: float
    min_gap: float
    accel: float
    decel: float
    lateral_accel: float
    """m/s² accepted in bends."""
    reaction_steps: int
    wander: float
    """Amplitude (m) of a slow swaying in the lane."""
    wander_length: float
    wander_phase: float
    bias: float
    """Habitual left offset in the lane (m)."""


@dataclass(frozen=True)
class World:
    """One situation at t=-1.5 s, with everything that will drive it on."""

    map: RoadMap
    paths: tuple[Path, ...]
    """Path 0 is the ego's route; arclength 0 is about where the ego is now."""
    actors: tuple[Actor, ...]
    driver: Driver
    speed: float
    """The ego's speed at t=-1.5 s."""
    limit: float
    """Speed limit of the ego's lane."""
    start: float | None = None
    """The ego's arclength (rear axle) at t=-1.5 s; None: where constant speed would bring it to 0 by now."""
    lateral: float = 0.0
    """The ego's left offset at t=-1.5 s."""
    heading_error: float = 0.0
    shifts: tuple[Shift, ...] = ()
    stop_lines: tuple[StopLine, ...] = ()
    yields: tuple[Yield, ...] = ()
    blends: tuple[Blend, ...] = ()
    red: NDArray[np.bool_] = field(default_factory=lambda: np.zeros((0, STEPS), dtype=bool))
    """``[light groups, STEPS]``."""
