"""The human-like ego driver: a driving line with a wandering hand, comfortable pedals, a kinematic bicycle."""

from __future__ import annotations

import math

import numpy as np

from rlhf_drive.scenes.geometry import Array, Path, path_from_points, smooth_step
from rlhf_drive.scenes.world import DT_S, Driver, Shift, World

__all__ = ["AXLE_TO_CENTER_M", "WHEEL_BASE_M", "Expert", "driving_line", "speed_cap"]

WHEEL_BASE_M = 3.089
AXLE_TO_CENTER_M = 1.461
STEERING_RATE = 0.6
"""rad/s the hand turns the wheels at most."""
EASY_JERK, HARD_JERK = 2.8, 7.0
"""m/s³ in ordinary driving and when braking hard."""


def driving_line(route: Path, driver: Driver, shifts: tuple[Shift, ...]) -> Array:
    """Left offset ``[n]`` from the route that the driver aims for at each vertex: habit, swaying and detours."""
    s = route.start + np.arange(len(route.xy))
    offset = driver.bias + driver.wander * np.sin(2 * np.pi * s / driver.wander_length + driver.wander_phase)
    for shift in shifts:
        rise = smooth_step((s - shift.begin) / max(shift.full - shift.begin, 1e-6))
        fall = smooth_step((s - shift.leave) / max(shift.end - shift.leave, 1e-6))
        share = rise - fall
        offset = (1.0 - 0.7 * share) * offset + shift.offset * share
    return np.asarray(offset)


def speed_cap(path: Path, lateral_accel: float, decel: float, shifts: tuple[Shift, ...] = ()) -> Array:
    """Speed ``[n]`` by vertex that respects every bend ahead, braking with `decel`: min_m sqrt(a/k_m + 2 b (m-n))."""
    curvature = np.abs(path.curvature)
    smooth = np.convolve(curvature, np.full(5, 0.2), mode="same")
    square = np.minimum(lateral_accel / np.maximum(smooth, 1e-4), 1e4)
    s = path.start + np.arange(len(square))
    for shift in shifts:
        inside = (s >= shift.full - 2.0) & (s <= shift.leave)
        square = np.where(inside, np.minimum(square, shift.cap**2), square)
    slope = 2.0 * decel * np.arange(len(square))
    return np.asarray(np.sqrt(np.minimum.accumulate((square + slope)[::-1])[::-1] - slope))


class Expert:
    """State of the ego vehicle and the two controllers that move it."""

    def __init__(self, world: World) -> None:
        route, self.driver = world.paths[0], world.driver
        self.offset = driving_line(route, world.driver, world.shifts)
        """``[n]`` planned left offset by route vertex."""
        self.line = path_from_points(route.xy + route.normal * self.offset[:, None], route.start)
        self.cap = speed_cap(self.line, world.driver.lateral_accel, 1.3, world.shifts)
        start = -1.5 * world.speed if world.start is None else world.start
        pose = route.pose(start, world.lateral)
        self.x, self.y, self.heading = float(pose[0]), float(pose[1]), float(pose[2]) + world.heading_error
        self.speed, self.accel, self.rate = world.speed, 0.0, 0.0
        self.index, _ = self._nearest(0, len(self.line.xy))
        self.steering = math.atan(WHEEL_BASE_M * float(self.line.curvature[self.index]))
        self.omega = self._yaw_rate()
        self.alpha = 0.0
        self.waiting: list[float] = []

    def state(self) -> Array:
        """``[11]`` in the scorer's order; vy and ay are 0, as the bicycle of the scorer has them."""
        motion = (self.speed, 0.0, self.accel, 0.0, self.steering, self.rate, self.omega, self.alpha)
        return np.array((self.x, self.y, self.heading, *motion))

    def center(self) -> tuple[float, float, float]:
        """Pose of the box centre."""
        cos, sin = math.cos(self.heading), math.sin(self.heading)
        return self.x + AXLE_TO_CENTER_M * cos, self.y + AXLE_TO_CENTER_M * sin, self.heading

    def allowed(self) -> float:
        """Speed the driver would choose here on an empty road."""
        ahead = min(self.index + 2 + int(0.3 * self.speed), len(self.cap) - 1)
        return float(min(self.driver.desired, self.cap[ahead]))

    def step(self, wanted: float) -> None:
        """Move on by 0.1 s; `wanted` acceleration passes through reaction time and a jerk limit."""
        if not self.waiting:
            self.waiting = [wanted] * self.driver.reaction_steps
            self.accel = wanted if self.speed > 0 else max(wanted, 0.0)
        self.waiting.append(wanted)
        late = self.waiting.pop(0)
        jerk = HARD_JERK if late < -3.0 else EASY_JERK
        accel = self.accel + min(max(late - self.accel, -jerk * DT_S), jerk * DT_S)
        if self.speed + accel * DT_S <= 0.0:
            accel = -self.speed / DT_S
        self._steer()
        middle = self.heading + 0.5 * self.omega * DT_S
        advance = self.speed * DT_S + 0.5 * accel * DT_S**2
        self.x += advance * math.cos(middle)
        self.y += advance * math.sin(middle)
        self.heading += self.omega * DT_S
        self.speed = max(0.0, self.speed + accel * DT_S)
        self.accel = accel if self.speed > 0.0 else 0.0
        omega = self._yaw_rate()
        self.alpha, self.omega = (omega - self.omega) / DT_S, omega

    def _yaw_rate(self) -> float:
        return self.speed * math.tan(self.steering) / WHEEL_BASE_M

    def _nearest(self, low: int, high: int) -> tuple[int, float]:
        rel = self.line.xy[low:high] - (self.x, self.y)
        i = low + int(np.argmin(rel[:, 0] ** 2 + rel[:, 1] ** 2))
        tangent = float(self.line.heading[i])
        along = (self.x - self.line.xy[i, 0]) * math.cos(tangent) + (self.y - self.line.xy[i, 1]) * math.sin(tangent)
        return i, float(along)

    def _steer(self) -> None:
        """Pure pursuit of a point on the driving line, with a limited steering rate."""
        self.index, along = self._nearest(max(0, self.index - 2), self.index + 6)
        reach = 3.0 + 0.7 * self.speed
        at = self.index + along + reach
        i = min(int(at), len(self.line.xy) - 2)
        target = self.line.xy[i] + (at - i) * (self.line.xy[i + 1] - self.line.xy[i])
        dx, dy = float(target[0]) - self.x, float(target[1]) - self.y
        aside = dy * math.cos(self.heading) - dx * math.sin(self.heading)
        wanted = math.atan(WHEEL_BASE_M * 2.0 * aside / (dx * dx + dy * dy))
        rate = min(max((wanted - self.steering) / 0.2, -STEERING_RATE), STEERING_RATE)
        self.rate = rate if self.speed > 0.1 else 0.0
        self.steering += self.rate * DT_S
