"""Closed-loop traffic at 10 Hz: intelligent driver model, right of way, and the ego's driver among them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlhf_drive.scenes.expert import Expert, speed_cap
from rlhf_drive.scenes.geometry import Array, smooth_step
from rlhf_drive.scenes.world import DT_S, EGO_SIZE, NOW, STEPS, World, Yield

__all__ = ["Recording", "idm_acceleration", "simulate"]

GRID_M = 2.0
WINDOW_M = (-64.0, 164.0)
"""Stretch of each path on which road users notice one another, every `GRID_M`."""
HARDEST_BRAKING = -6.0
EGO_FORESIGHT_S, FORESIGHT_S = 2.0, 0.6
"""How soon somebody moving sideways must enter a driver's lane to be taken for a leader."""
DRIFT_MPS = 0.25
"""Sideways speed that shows an intention."""


@dataclass(frozen=True)
class Recording:
    """What happened, step by step; step `NOW` is t=0. Row 0 of the users is the ego. Frame of the world's map."""

    pose: Array
    """``[STEPS, n, 3]`` box centres."""
    velocity: Array
    """``[STEPS, n, 2]`` in the map's frame."""
    ego: Array
    """``[STEPS, 11]`` ego states at the rear axle, the scorer's order."""


def idm_acceleration(
    speed: Array, desired: Array, headway: Array, min_gap: Array, accel: Array, decel: Array, gap: Array, lead: Array
) -> Array:
    """Acceleration of the intelligent driver model, a (1 - (v/v0)^4 - (s*/gap)^2), the least over all leaders.

    A leader that appears close ahead at about the same speed is no emergency: braking for one leader is limited to
    1.2 m/s² plus 1.6 times what avoiding it takes, (v - lead)^2 / (2 gap). The free-road part alone never brakes harder
    than 2 m/s².

    Args:
        speed, desired, headway, min_gap, accel, decel: ``[n]`` of the followers, SI units.
        gap: ``[n, m]`` bumper to bumper; inf where there is no leader.
        lead: ``[n, m]`` the leaders' speeds.

    Returns:
        ``[n]`` m/s² within [-6, accel].

    Treiber, Hennecke, Helbing: Congested traffic states in empirical observations and microscopic simulations (2000).
    """
    v = speed[:, None]
    closing = v - lead
    wish = min_gap[:, None] + np.maximum(
        v * (headway[:, None] + closing / (2.0 * np.sqrt(accel * decel)[:, None])), 0.0
    )
    free = np.maximum(accel * (1.0 - (speed / np.maximum(desired, 0.1)) ** 4), -2.0)
    following = free[:, None] - accel[:, None] * np.square(wish / np.maximum(gap, 0.2))
    needed = np.square(np.maximum(closing, 0.0)) / (2.0 * np.maximum(gap - 1.0, 0.5))
    least = np.where(np.isfinite(gap), np.maximum(following, -1.2 - 1.6 * needed), np.inf).min(axis=1)
    return np.asarray(np.maximum(np.minimum(free, least), HARDEST_BRAKING))


def simulate(world: World) -> Recording:
    """Drive all road users from t=-1.5 s to 5.0 s; decisions at 5 Hz, motion at 10 Hz. Deterministic."""
    crowd = _Crowd(world)
    n = len(crowd.size)
    pose, velocity, ego = np.empty((STEPS, n, 3)), np.empty((STEPS, n, 2)), np.empty((STEPS, 11))
    for step in range(STEPS):
        crowd.place()
        pose[step] = crowd.pose
        velocity[step] = crowd.speed[:, None] * np.stack([np.cos(crowd.pose[:, 2]), np.sin(crowd.pose[:, 2])], axis=1)
        ego[step] = crowd.expert.state()
        if step % 2 == 0:
            crowd.decide(step)
        crowd.advance(step)
    return Recording(pose, velocity, ego)


class _Crowd:
    """State of all road users; index 0 is the ego."""

    def __init__(self, world: World) -> None:
        self.world, self.expert = world, Expert(world)
        actors, driver = world.actors, world.driver

        def column(name: str, ego: float) -> Array:
            return np.array([ego] + [float(getattr(a, name)) for a in actors])

        self.path = np.array([0] + [a.path for a in actors])
        self.s, self.d = column("s", 0.0), column("d", 0.0)
        self.speed, self.desired = column("speed", world.speed), column("desired", driver.desired)
        self.headway, self.min_gap = column("headway", driver.headway), column("min_gap", driver.min_gap)
        self.accel, self.decel = column("accel", driver.accel), column("decel", driver.decel)
        self.size = np.stack([column("length", EGO_SIZE[0]), column("width", EGO_SIZE[1])], axis=1)
        self.start = column("start_s", -9.0)
        self.steady = np.array([False] + [a.steady for a in actors])
        self.cruise = np.where(self.steady, self.speed, 0.0)
        self.reach = np.where(np.arange(len(self.path)) == 0, EGO_FORESIGHT_S, FORESIGHT_S)
        self.pose, self.now = np.zeros((len(self.path), 3)), np.zeros(len(self.path))
        self.origin, self.tilt = self.d.copy(), np.zeros(len(self.path))
        self.shifted = np.zeros(len(self.path))
        self.brakes = [(i, a.brake) for i, a in enumerate(actors, 1) if a.brake is not None]
        self.shifts = [(i, a.shift) for i, a in enumerate(actors, 1) if a.shift is not None]
        paths = world.paths
        self.vertices = np.zeros((len(paths), max(len(p.xy) for p in paths), 3))
        for row, path in zip(self.vertices, paths, strict=True):
            row[: len(path.xy), :2], row[: len(path.xy), 2] = path.xy, path.heading
        self.first = np.array([p.start for p in paths])[self.path]
        self.last = np.array([len(p.xy) - 2 for p in paths])[self.path]
        at = np.arange(*WINDOW_M, GRID_M)
        grid = np.stack([path.pose(at) for path in paths])
        self.grid, self.grid_s = grid, at
        self.flat = grid[..., :2].reshape(-1, 2)
        self.flat_square = np.einsum("ij,ij->i", self.flat, self.flat)
        self.caps = np.stack(
            [np.interp(at, p.start + np.arange(len(p.xy)), speed_cap(p, 2.2, 1.5)) for p in world.paths]
        )

    def place(self) -> None:
        """World poses out of path coordinates."""
        at = self.s - self.first
        low = np.minimum(np.maximum(at.astype(np.int64), 0), self.last)
        here, there = self.vertices[self.path, low], self.vertices[self.path, low + 1]
        along = here + (at - low)[:, None] * (there - here)
        self.pose[:, 0] = along[:, 0] - self.d * np.sin(along[:, 2])
        self.pose[:, 1] = along[:, 1] + self.d * np.cos(along[:, 2])
        self.pose[:, 2] = along[:, 2] + self.tilt
        self.pose[0] = self.expert.center()
        self.speed[0] = self.expert.speed

    def _project(self) -> tuple[Array, Array, Array, NDArray[np.bool_]]:
        """Arclength, left offset and heading ``[n, paths]`` of everybody on every path; whether inside its window."""
        count, points = self.grid.shape[:2]
        point = self.pose[:, :2]
        far = self.flat_square - 2.0 * point @ self.flat.T
        nearest = far.reshape(len(point), count, points).argmin(axis=2)
        base = self.grid[np.arange(count), nearest]
        dx, dy = point[:, 0:1] - base[..., 0], point[:, 1:2] - base[..., 1]
        cos, sin = np.cos(base[..., 2]), np.sin(base[..., 2])
        along = dx * cos + dy * sin
        inside = np.abs(along) < 2.0 * GRID_M
        return self.grid_s[nearest] + along, dy * cos - dx * sin, self.pose[:, 2:3] - base[..., 2], inside

    def decide(self, step: int) -> None:
        """Acceleration everybody wants now."""
        s, d, turn, inside = self._project()
        self.s[0], self.d[0] = s[0, 0], d[0, 0]
        gap, lead = self._leaders(s.T[self.path], d.T[self.path], turn.T[self.path], inside.T[self.path])
        lines = self._closed_lines(step)
        if lines:
            extra = np.full((len(self.s), 1), np.inf)
            for who, line in lines:
                rest = line - self.s[who] - 0.5 * self.size[who, 0] + self.min_gap[who] - 0.8
                extra[who, 0] = min(extra[who, 0], max(rest, 0.2))
            gap, lead = np.concatenate([gap, extra], axis=1), np.concatenate([lead, np.zeros_like(extra)], axis=1)
        desired = np.minimum(self.desired, self._cap())
        desired[0] = self.expert.allowed()
        self.now = idm_acceleration(self.speed, desired, self.headway, self.min_gap, self.accel, self.decel, gap, lead)

    def _cap(self) -> Array:
        """Speed the bends of their paths allow."""
        index = ((self.s - WINDOW_M[0]) / GRID_M).astype(np.int64) + 1
        index = np.minimum(np.maximum(index, 0), len(self.grid_s) - 1)
        return np.asarray(self.caps[self.path, index])

    def _leaders(self, s: Array, d: Array, turn: Array, inside: NDArray[np.bool_]) -> tuple[Array, Array]:
        """Gap (inf where not in the way) and speed along my path ``[me, other]``; all arguments on my path."""
        cos, sin = np.cos(turn), np.sin(turn)
        length, width = self.size[:, 0], self.size[:, 1]
        ahead = s - self.s[:, None]
        gap = ahead - 0.5 * (length[:, None] + length * np.abs(cos) + width * np.abs(sin))
        reach = 0.5 * (width[:, None] + width * np.abs(cos) + length * np.abs(sin)) + 0.25
        planned = np.repeat(self.d[:, None], len(self.d), axis=1)
        vertex = (s[0] - self.world.paths[0].start).astype(np.int64)
        planned[0] = self.expert.offset[np.minimum(np.maximum(vertex, 0), len(self.expert.offset) - 1)]
        aside, drift = d - planned, self.speed * sin
        pace = np.maximum(np.abs(drift), 1e-3)
        toward = aside * np.where(drift >= 0.0, 1.0, -1.0)
        enters, leaves = (-reach - toward) / pace, (reach - toward) / pace
        own = np.maximum(self.speed[:, None], 1.0)
        arrive, gone = gap / own, (gap + 2.0 * length[:, None]) / own
        meets = (enters < np.minimum(self.reach[:, None], gone + 0.3)) & (leaves > arrive - 0.5)
        in_way = np.where(np.abs(drift) > DRIFT_MPS, meets, np.abs(aside) < reach)
        for blend in self.world.blends:
            rows, columns = self.path == blend.own, self.path == blend.other
            near = (s > blend.low) & (s < blend.high) & (np.abs(aside) < 9.0)
            in_way |= rows[:, None] & columns[None, :] & near
        in_way &= inside & (ahead > 0.3)
        return np.where(in_way, np.maximum(gap, 0.2), np.inf), np.maximum(self.speed * cos, 0.0)

    def _closed_lines(self, step: int) -> list[tuple[int, float]]:
        """(actor, arclength) of the lines that actors must stop at now and still can."""
        lines = [(line.actor, line.s) for line in self.world.stop_lines if self.world.red[line.group, step]]
        lines += [(rule.actor, rule.line) for rule in self.world.yields if self._conflict(rule)]
        return [(who, line) for who, line in lines if self._can_stop(who, line)]

    def _can_stop(self, who: int, line: float) -> bool:
        rest = line - float(self.s[who]) - 0.5 * float(self.size[who, 0])
        return rest > -0.5 and float(self.speed[who]) ** 2 < 2.0 * 4.2 * max(rest, 0.2)

    def _conflict(self, rule: Yield) -> bool:
        """Whether the two would be in the zone together, if I pulled through now and the other kept its speed."""
        me, other = rule.actor, rule.other
        speed, half = float(self.speed[other]), 0.5 * float(self.size[other, 0])
        s = float(self.s[other])
        if s - half > rule.other_zone[1] or (speed < 0.3 and s + half < rule.other_zone[0]):
            return False
        pace = max(speed, 0.3)
        enters, leaves = (rule.other_zone[0] - half - s) / pace, (rule.other_zone[1] + half - s) / pace
        mine, front = float(self.s[me]), 0.5 * float(self.size[me, 0])
        arrive = self._time_to(me, rule.zone[0] - front - mine)
        gone = self._time_to(me, rule.zone[1] + front - mine)
        return arrive < leaves + rule.after and gone > enters - rule.before

    def _time_to(self, who: int, distance: float) -> float:
        """Seconds to cover `distance` pulling away with 1.2 m/s²."""
        speed, pull = float(self.speed[who]), 1.2
        return (-speed + math.sqrt(speed * speed + 2.0 * pull * max(distance, 0.0))) / pull

    def advance(self, step: int) -> None:
        """Move everybody by 0.1 s."""
        time = (step - NOW) * DT_S
        wanted = self.now.copy()
        for i, (begins, decel, until) in self.brakes:
            if time >= begins:
                wanted[i] = min(wanted[i], max(-decel, 1.5 * (until - self.speed[i])))
        self.expert.step(float(wanted[0]))
        speed = np.maximum(self.speed + wanted * DT_S, 0.0)
        speed = np.where(self.steady, self.cruise, speed)
        speed = np.where(time < self.start, 0.0, speed)
        travel = 0.5 * (self.speed + speed) * DT_S
        self.s += travel
        self.speed = speed
        for i, (begins, length, end) in self.shifts:
            if time >= begins and travel[i] > 1e-3:
                self.shifted[i] += travel[i]
                before = self.d[i]
                share = float(smooth_step(self.shifted[i] / length))
                self.d[i] = self.origin[i] + (end - self.origin[i]) * share
                self.tilt[i] = math.atan2(self.d[i] - before, travel[i])
