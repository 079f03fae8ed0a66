"""Picture from above of an observation and one plan: for a judge that must not see the future."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rlhf_drive.errors import DataError
from rlhf_drive.scenes.model import AgentType, MapElement, Observation
from rlhf_drive.scenes.picture_parts import (
    AGENT_COLORS,
    CROSSWALK,
    LANE_LINE,
    PALETTE,
    RED_LIGHT,
    ROAD,
    ROAD_EDGE,
    ROUTE,
    Window,
    agent_boxes,
    draw_ego,
    draw_plan,
    page,
    png,
    square_axes,
    window_around,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_observation", "observation_window"]

Array = NDArray[np.float64]
_LANE_WIDTH_M = 3.6
_LANES = (MapElement.LANE_CENTER, MapElement.LANE_CONNECTOR_CENTER)


def observation_window(plan: NDArray[np.floating]) -> Window:
    """Square that holds the ego and the plan ``[T, 3]``, 60 to 140 m wide."""
    return window_around([np.zeros((1, 2)), np.asarray(plan, dtype=np.float64)[:, :2]], least_m=60.0)


def draw_observation(observation: Observation, plan: NDArray[np.floating], *, size_px: int = 512) -> bytes:
    """PNG of what a policy sees, with its plan.

    Lanes are white bands 3.6 m wide, blue on the route and red behind a red light; road edges grey, crosswalks beige;
    other road users are boxes with their observed past; the ego is dark with its past, the plan blue with a dot per
    pose and its final box. Forward is up, left is left. The same input gives the same bytes.

    Args:
        observation: What is known now; nothing else is drawn.
        plan: ``[T, 3]`` finite poses in the t=0 ego frame.
        size_px: Edge length of the square picture.

    Raises:
        DataError: The plan has another shape or is not finite.

    Example:
        ``Path("plan.png").write_bytes(draw_observation(scene.observation, poses_83))``
    """
    poses = np.asarray(plan, dtype=np.float64)
    if poses.ndim != 2 or poses.shape[1] != 3 or not len(poses) or not np.isfinite(poses).all():
        raise DataError(f"A plan to draw must be finite [T, 3]; got shape {list(poses.shape)}.")
    window = observation_window(poses)
    figure, axes = square_axes(window, size_px)
    scale = size_px / 640
    _draw_map(axes, observation, 0.72 * size_px / window.side, scale)
    _draw_agents(axes, observation, scale)
    draw_ego(axes, observation, scale)
    draw_plan(axes, poses[None], PALETTE[0], scale, band=False)
    return png(figure)


def _draw_map(axes: Axes, seen: Observation, points_per_m: float, scale: float) -> None:
    """Lanes as bands, then crosswalks, lane centres and road edges."""
    from matplotlib.collections import LineCollection, PolyCollection

    lines = [page(seen.map_xy[a:b].astype(np.float64)) for a, b in pairwise(seen.map_offsets.tolist())]

    def of(*kinds: MapElement) -> list[int]:
        return [m for m in range(len(lines)) if seen.map_type[m] in kinds and len(lines[m]) > 1]

    lanes = of(*_LANES)
    bands = (
        (ROAD, lanes, 1.0),
        (ROUTE, [m for m in lanes if seen.map_on_route[m]], 2.0),
        (RED_LIGHT, [m for m in lanes if seen.map_red[m]], 2.2),
    )
    width = _LANE_WIDTH_M * points_per_m
    for color, chosen, zorder in bands:
        alpha = 0.35 if color == RED_LIGHT else 1.0
        band = [lines[m] for m in chosen]
        axes.add_collection(LineCollection(band, colors=color, linewidths=width, alpha=alpha, zorder=zorder))
    crosswalks = [lines[m] for m in of(MapElement.CROSSWALK)]
    axes.add_collection(PolyCollection(crosswalks, facecolors=CROSSWALK, edgecolors="none", zorder=3))
    centers = [lines[m] for m in lanes]
    dashes = (0, (5, 4))
    axes.add_collection(
        LineCollection(centers, colors=LANE_LINE, linewidths=0.8 * scale, linestyles=[dashes], zorder=3.5)
    )
    edges = [lines[m] for m in of(MapElement.ROAD_EDGE)]
    axes.add_collection(LineCollection(edges, colors=ROAD_EDGE, linewidths=1.5 * scale, zorder=3.6))


def _draw_agents(axes: Axes, seen: Observation, scale: float) -> None:
    """Boxes now, with the observed past as a line."""
    from matplotlib.collections import LineCollection, PolyCollection

    poses = seen.agents[:, :, :3].astype(np.float64)
    colors = [AGENT_COLORS[AgentType(int(kind))] for kind in seen.agents_type]
    trails = [page(poses[a, :, :2][seen.agents_valid[a]]) for a in range(len(poses))]
    axes.add_collection(LineCollection(trails, colors=colors, linewidths=1.2 * scale, alpha=0.6, zorder=5.5))
    length, width = seen.agents_size.astype(np.float64).T
    boxes = agent_boxes(poses[:, -1], length, width)
    axes.add_collection(PolyCollection(boxes, facecolors=colors, edgecolors="white", linewidths=0.7 * scale, zorder=6))
