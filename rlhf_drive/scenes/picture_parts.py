"""What pictures from above are drawn with: colours, the window, boxes, the ego and plans, ego frame, x up, y left."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rlhf_drive.scenes.model import AgentType, Observation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "AGENT_COLORS",
    "CROSSWALK",
    "EGO",
    "HUMAN",
    "LANE_LINE",
    "OFF_ROAD",
    "PALETTE",
    "RED_LIGHT",
    "ROAD",
    "ROAD_EDGE",
    "ROUTE",
    "Window",
    "agent_boxes",
    "draw_ego",
    "draw_plan",
    "ego_boxes",
    "page",
    "png",
    "show_window",
    "square_axes",
    "window_around",
]

Array = NDArray[np.float64]

EGO_LENGTH_M, EGO_WIDTH_M, EGO_CENTER_M = 5.176, 2.297, 1.461
"""NAVSIM's ego box (Pacifica) and how far its centre lies ahead of the rear axle."""
OFF_ROAD, ROAD, ROUTE, LANE_LINE, CROSSWALK, ROAD_EDGE = (
    "#dde2db",
    "#fbfbfa",
    "#e7f0fa",
    "#b4bcc6",
    "#e3ddd0",
    "#7c8792",
)
RED_LIGHT, EGO, HUMAN = "#e03131", "#15202b", "#2b8a3e"
AGENT_COLORS = {
    AgentType.VEHICLE: "#5c6f82",
    AgentType.PEDESTRIAN: "#c2255c",
    AgentType.BICYCLE: "#0c8599",
    AgentType.STATIC: "#8d6e63",
}
PALETTE = ("#1c6fd1", "#e8590c", "#7048e8", "#0b7285", "#b5179e", "#9c6b00", "#495057")


@dataclass(frozen=True)
class Window:
    """The square of the ego frame that a picture shows."""

    x_min: float
    """Rearmost x shown (m), at the lower edge."""
    y_min: float
    """Rightmost y shown (m), at the right edge."""
    side: float
    """Edge length (m)."""

    def pixel(self, x: float, y: float, size_px: int) -> tuple[int, int]:
        """(column, row) of a point in a picture of ``size_px`` squared, row 0 at the top."""
        column = (self.y_min + self.side - y) / self.side * size_px
        row = (self.x_min + self.side - x) / self.side * size_px
        return int(column), int(row)


def window_around(points: Sequence[Array], *, least_m: float = 50.0, most_m: float = 140.0) -> Window:
    """Square around points ``[n, 2]`` with room on all sides; points that are not finite do not count."""
    xy = np.concatenate(points)
    xy = xy[np.isfinite(xy).all(axis=1)]
    low, high = xy.min(axis=0) - [12.0, 10.0], xy.max(axis=0) + np.array([14.0, 10.0])
    side = float(np.clip((high - low).max(), least_m, most_m))
    spare = side - min(side, float(high[0] - low[0]))
    return Window(float(low[0]) - 0.3 * spare, float(low[1] + high[1] - side) / 2.0, side)


def square_axes(window: Window, size_px: int) -> tuple[Figure, Axes]:
    """An empty square picture that shows `window`, without frame."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size_px / 100, size_px / 100), dpi=100, facecolor=OFF_ROAD)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    show_window(axes, window)
    return figure, axes


def show_window(axes: Axes, window: Window) -> None:
    """Let square axes show `window`, without frame."""
    axes.set_axis_off()
    axes.set_xlim(-window.y_min - window.side, -window.y_min)
    axes.set_ylim(window.x_min, window.x_min + window.side)


def png(figure: Figure) -> bytes:
    """The finished picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def page(xy: Array) -> Array:
    """Ego-frame points ``[..., 2]`` to the page: right = -y, up = x."""
    return np.stack([-xy[..., 1], xy[..., 0]], axis=-1)


def agent_boxes(pose: Array, length: Array | float, width: Array | float) -> list[Array]:
    """Corners ``[4, 2]`` of boxes centred at ``pose [B, 3]``, on the page."""
    forward = np.stack([np.cos(pose[..., 2]), np.sin(pose[..., 2])], axis=-1) * np.asarray(length)[..., None] / 2
    left = np.stack([-np.sin(pose[..., 2]), np.cos(pose[..., 2])], axis=-1) * np.asarray(width)[..., None] / 2
    corners = np.stack([forward + left, forward - left, -forward - left, -forward + left], axis=-2)
    return list(page(pose[..., None, :2] + corners))


def ego_boxes(rear_axle: Array) -> list[Array]:
    """Corners ``[4, 2]`` of ego boxes for rear-axle poses ``[B, 3]``, on the page."""
    ahead = EGO_CENTER_M * np.stack([np.cos(rear_axle[..., 2]), np.sin(rear_axle[..., 2])], axis=-1)
    center = np.concatenate([rear_axle[..., :2] + ahead, rear_axle[..., 2:3]], axis=-1)
    return agent_boxes(center, EGO_LENGTH_M, EGO_WIDTH_M)


def draw_ego(axes: Axes, seen: Observation, scale: float) -> None:
    from matplotlib.collections import PolyCollection

    past = page(seen.ego_history[:, :2].astype(np.float64))
    axes.plot(past[:, 0], past[:, 1], color=EGO, lw=1.6 * scale, ls=":", marker=".", ms=4 * scale, alpha=0.7, zorder=6)
    box = ego_boxes(np.zeros((1, 3)))
    axes.add_collection(PolyCollection(box, facecolors=EGO, edgecolors="white", linewidths=1.0 * scale, zorder=7))
    nose = page(np.array([[3.9, 0.0], [3.0, 0.6], [3.0, -0.6]]))
    axes.add_collection(PolyCollection([nose], facecolors="white", edgecolors="none", zorder=7.5))


def draw_plan(axes: Axes, poses: Array, color: str, scale: float, *, band: bool) -> None:
    """First sample as a line with a dot per pose (as a wide `band`: under the others), further samples thin."""
    from matplotlib.collections import LineCollection, PolyCollection

    paths = page(np.concatenate([np.zeros((len(poses), 1, 2)), poses[:, :, :2]], axis=1))
    axes.add_collection(LineCollection(list(paths[1:]), colors=color, linewidths=0.9 * scale, alpha=0.3, zorder=8))
    x, y = paths[0].T
    if band:
        axes.plot(x, y, color=color, lw=7.0 * scale, alpha=0.45, zorder=8.2, solid_capstyle="round")
    else:
        axes.plot(x, y, color="white", lw=4.0 * scale, alpha=0.7, zorder=8.5, solid_capstyle="round")
        axes.plot(x, y, color=color, lw=2.2 * scale, zorder=9)
    axes.plot(x[1:], y[1:], color=color, ls="", marker="o", ms=4 * scale, mec="white", mew=0.5, zorder=9)
    box = ego_boxes(poses[:1, -1])
    axes.add_collection(PolyCollection(box, facecolors="none", edgecolors=color, linewidths=1.3 * scale, zorder=8.8))
