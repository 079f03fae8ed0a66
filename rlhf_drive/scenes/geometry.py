"""Plane geometry of the generator: arclength paths, curves, oriented boxes, polygons. Metres and radians."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "Array",
    "Path",
    "box_corners",
    "boxes_overlap",
    "connect",
    "contact_zone",
    "join",
    "path_from_curvature",
    "path_from_points",
    "points_in_polygon",
    "resample",
    "smooth_step",
]

Array = NDArray[np.float64]

STEP_M = 1.0
"""Arclength between two vertices of every :class:`Path`."""


@dataclass(frozen=True)
class Path:
    """A directed curve sampled every metre; arclength `s` runs from `start`, `d` is the offset to its left."""

    xy: Array
    """``[n, 2]`` vertices, 1 m apart."""
    heading: Array
    """``[n]`` tangent direction, unwrapped."""
    start: float
    """Arclength of the first vertex."""

    @property
    def end(self) -> float:
        """Arclength of the last vertex."""
        return self.start + STEP_M * (len(self.xy) - 1)

    @cached_property
    def curvature(self) -> Array:
        """``[n]`` heading change per metre, positive to the left."""
        return np.asarray(np.gradient(self.heading, STEP_M))

    @cached_property
    def normal(self) -> Array:
        """``[n, 2]`` unit vectors to the left."""
        return np.stack([-np.sin(self.heading), np.cos(self.heading)], axis=1)

    def pose(self, s: ArrayLike, d: ArrayLike = 0.0) -> Array:
        """Poses ``[..., 3]`` at arclength `s` and left offset `d`; straight continuation beyond the ends."""
        at, offset = np.broadcast_arrays(np.asarray(s, dtype=np.float64), np.asarray(d, dtype=np.float64))
        index = (at - self.start) / STEP_M
        low = np.clip(np.floor(index).astype(np.int64), 0, len(self.xy) - 2)
        part = index - low
        heading = self.heading[low] + np.clip(part, 0.0, 1.0) * (self.heading[low + 1] - self.heading[low])
        point = self.xy[low] + part[..., None] * (self.xy[low + 1] - self.xy[low])
        return np.stack(
            [point[..., 0] - offset * np.sin(heading), point[..., 1] + offset * np.cos(heading), heading], axis=-1
        )

    def offset(self, d: ArrayLike) -> Path:
        """The parallel curve `d` (scalar or ``[n]``) to the left, resampled; its s=0 lies beside this one's s=0."""
        points = self.xy + self.normal * np.broadcast_to(np.asarray(d, dtype=np.float64), len(self.xy))[:, None]
        arc = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(points, axis=0).T))])
        beside = float(np.interp(0.0, self.start + STEP_M * np.arange(len(arc)), arc))
        return path_from_points(points, -beside)

    def reverse(self) -> Path:
        """The same curve driven the other way; s becomes -s."""
        return Path(self.xy[::-1].copy(), self.heading[::-1] + np.pi, -self.end)

    def between(self, low: float, high: float) -> Array:
        """Vertices ``[m, 2]`` from arclength `low` to `high`, both ends exact."""
        inner = np.arange(np.floor(low / STEP_M) + 1, np.ceil(high / STEP_M)) * STEP_M
        return self.pose(np.concatenate([[low], inner, [high]]))[:, :2]

    def nearest(self, point: Array) -> tuple[float, float]:
        """Arclength and left offset of the vertex tangent nearest to `point` ``[2]``."""
        rel = point - self.xy
        i = int(np.argmin(np.einsum("ij,ij->i", rel, rel)))
        cos, sin = np.cos(self.heading[i]), np.sin(self.heading[i])
        return self.start + i * STEP_M + float(rel[i] @ (cos, sin)), float(rel[i] @ (-sin, cos))


def resample(points: Array, spacing: float) -> Array:
    """Polyline ``[m, 2]`` through `points` with equal steps of about `spacing`; both ends stay."""
    step = np.diff(points, axis=0)
    arc = np.concatenate([[0.0], np.cumsum(np.hypot(step[:, 0], step[:, 1]))])
    at = np.linspace(0.0, arc[-1], max(2, round(float(arc[-1]) / spacing) + 1))
    return np.stack([np.interp(at, arc, points[:, 0]), np.interp(at, arc, points[:, 1])], axis=1)


def path_from_points(points: Array, start: float = 0.0) -> Path:
    """Path along a polyline; vertex spacing is 1 m, the remainder (< 1 m) at the end is dropped."""
    step = np.diff(points, axis=0)
    arc = np.concatenate([[0.0], np.cumsum(np.hypot(step[:, 0], step[:, 1]))])
    at = np.arange(0.0, arc[-1] + 1e-9, STEP_M)
    xy = np.stack([np.interp(at, arc, points[:, 0]), np.interp(at, arc, points[:, 1])], axis=1)
    slope = np.gradient(xy, axis=0)
    return Path(xy, np.unwrap(np.arctan2(slope[:, 1], slope[:, 0])), start)


def path_from_curvature(curvature: Array, start: float) -> Path:
    """Path with the given curvature at each metre; at s=0 it passes the origin with heading 0."""
    heading = np.concatenate([[0.0], np.cumsum(0.5 * (curvature[1:] + curvature[:-1]))]) * STEP_M
    middle = 0.5 * (heading[1:] + heading[:-1])
    xy = np.zeros((len(curvature), 2))
    xy[1:, 0], xy[1:, 1] = np.cumsum(np.cos(middle)), np.cumsum(np.sin(middle))
    zero = round(-start / STEP_M)
    cos, sin = np.cos(heading[zero]), np.sin(heading[zero])
    rel = xy - xy[zero]
    turned = np.stack([rel[:, 0] * cos + rel[:, 1] * sin, rel[:, 1] * cos - rel[:, 0] * sin], axis=1)
    return Path(turned, heading - heading[zero], start)


def connect(start: Array, end: Array, stretch: float = 0.39) -> Array:
    """Cubic Bezier curve ``[m, 2]`` from pose `start` to pose `end`; 0.39 of the chord makes 90° nearly an arc."""
    handle = stretch * float(np.hypot(*(end[:2] - start[:2])))
    p1 = start[:2] + handle * np.array([np.cos(start[2]), np.sin(start[2])])
    p2 = end[:2] - handle * np.array([np.cos(end[2]), np.sin(end[2])])
    u = np.linspace(0.0, 1.0, 21)[:, None]
    return np.asarray((1 - u) ** 3 * start[:2] + 3 * u * (1 - u) ** 2 * p1 + 3 * u**2 * (1 - u) * p2 + u**3 * end[:2])


def join(pieces: list[Array]) -> Array:
    """One polyline out of consecutive ones; the shared end points appear once."""
    return np.concatenate([pieces[0]] + [p[1:] for p in pieces[1:]])


def smooth_step(u: ArrayLike) -> Array:
    """Minimum-jerk step: 0 for u <= 0, 1 for u >= 1, zero slope and curvature at both ends."""
    x = np.clip(np.asarray(u, dtype=np.float64), 0.0, 1.0)
    return np.asarray(x**3 * (10.0 - 15.0 * x + 6.0 * x * x))


def box_corners(pose: Array, size: Array) -> Array:
    """Corners ``[..., 4, 2]`` (front left, rear left, rear right, front right) of boxes centred at `pose`."""
    half = 0.5 * size[..., None, :] * np.array([[1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]])
    cos, sin = np.cos(pose[..., 2])[..., None], np.sin(pose[..., 2])[..., None]
    x, y = half[..., 0], half[..., 1]
    return np.stack([pose[..., 0:1] + cos * x - sin * y, pose[..., 1:2] + sin * x + cos * y], axis=-1)


def boxes_overlap(pose_a: Array, size_a: Array, pose_b: Array, size_b: Array) -> NDArray[np.bool_]:
    """Whether oriented boxes overlap (separating axes; touching counts), broadcast over the leading axes."""
    delta = pose_b[..., :2] - pose_a[..., :2]
    turn = pose_b[..., 2] - pose_a[..., 2]
    cos, sin = np.abs(np.cos(turn)), np.abs(np.sin(turn))
    clear = np.zeros(delta.shape[:-1], dtype=bool)
    for pose, own, other in ((pose_a, size_a, size_b), (pose_b, size_b, size_a)):
        c, s = np.cos(pose[..., 2]), np.sin(pose[..., 2])
        along, aside = delta[..., 0] * c + delta[..., 1] * s, delta[..., 1] * c - delta[..., 0] * s
        length, width = other[..., 0], other[..., 1]
        clear |= np.abs(along) > 0.5 * (own[..., 0] + length * cos + width * sin)
        clear |= np.abs(aside) > 0.5 * (own[..., 1] + length * sin + width * cos)
    return np.asarray(~clear)


def points_in_polygon(points: Array, polygon: Array) -> NDArray[np.bool_]:
    """Even-odd test of points ``[m, 2]`` against one unclosed polygon ``[v, 2]``."""
    x1, y1 = polygon[:, 0], polygon[:, 1]
    x2, y2 = np.roll(x1, -1), np.roll(y1, -1)
    px, py = points[:, 0:1], points[:, 1:2]
    spans = (y1 > py) != (y2 > py)
    rise = np.where(y2 == y1, 1.0, y2 - y1)
    return np.asarray(np.count_nonzero(spans & (px < x1 + (py - y1) * (x2 - x1) / rise), axis=1) % 2 == 1)


def contact_zone(
    own: Path, other: Path, clearance: float, longest: float = 1e3
) -> tuple[float, float, float, float] | None:
    """First stretch where two paths come closer than `clearance`.

    Args:
        own, other: The paths, looked at every 2 m.
        clearance: Metres between centre lines under which bodies could touch.
        longest: The stretch is cut to this length, for paths that go on together.

    Returns:
        Arclengths (own_in, own_out, other_in, other_out), or None where they never meet.
    """
    a, b = own.xy[::2], other.xy[::2]
    near = ((a[:, None, :] - b[None, :, :]) ** 2).sum(axis=2) < clearance**2
    rows = np.flatnonzero(near.any(axis=1))
    if len(rows) == 0:
        return None
    breaks = np.flatnonzero(np.diff(rows) > 1)
    rows = rows[: breaks[0] + 1] if len(breaks) else rows
    rows = rows[: max(1, int(longest / (2 * STEP_M)))]
    columns = np.flatnonzero(near[rows].any(axis=0))
    scale = 2 * STEP_M
    return (
        own.start + scale * float(rows[0]),
        own.start + scale * float(rows[-1]),
        other.start + scale * float(columns[0]),
        other.start + scale * float(columns[-1]),
    )
