"""Bird's-eye-view picture of a scene with plans: ego frame, x (forward) up, y (left) to the left.

The picture shows what the scorer knows, other agents' future included; it is for people, never an input of a policy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rlhf_drive.errors import DataError
from rlhf_drive.scenes.model import AgentType, MapElement, MapLayer, Scene
from rlhf_drive.scenes.picture_parts import (
    AGENT_COLORS,
    CROSSWALK,
    EGO,
    HUMAN,
    LANE_LINE,
    PALETTE,
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
from rlhf_drive.scenes.trajectories import to_ego_frame

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Window", "draw_scene", "draw_surroundings", "picture_window", "plan_colors"]

Array = NDArray[np.float64]

_PLAN_EVERY_STEPS = (10, 20, 30, 40)
"""Steps of 0.1 s at which another agent's future box is drawn."""
_DRIVABLE = (MapLayer.ROADBLOCK, MapLayer.INTERSECTION, MapLayer.DRIVABLE_AREA, MapLayer.CARPARK_AREA)
_LANES = (MapLayer.LANE, MapLayer.LANE_CONNECTOR)


def plan_colors(names: Sequence[str]) -> dict[str, str]:
    """Colour by plan name: the human is green, others go through the palette in the given order.

    Example:
        >>> plan_colors(["human", "sft"])["human"]
        '#2b8a3e'
    """
    others = [name for name in names if name != "human"]
    return {"human": HUMAN} | {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(others)}


def picture_window(scene: Scene, plans: Mapping[str, Array]) -> Window:
    """Square that holds the ego, the human's drive and the first sample of every plan, 50 to 140 m wide."""
    points = [np.zeros((1, 2)), scene.reference.human_poses[:, :2]]
    points += [plan[0, :, :2] for plan in _samples(plans).values()]
    return window_around(points)


def draw_scene(
    scene: Scene,
    plans: Mapping[str, NDArray[np.floating[Any]]] | None = None,
    *,
    title: str = "",
    size_px: int = 640,
    colors: Mapping[str, str] | None = None,
) -> bytes:
    """PNG of a scene from above, with plans.

    Drivable area white, on-route lanes blue, red lights red, other agents as boxes with their motion of the next 4 s
    fading, the ego's box and past, the human's drive as a green band, every plan with a dot per 0.5 s and its final
    ego box.

    Args:
        scene: What to draw.
        plans: By name, ``[8, 3]`` or ``[n, 8, 3]`` poses in the t=0 ego frame; further samples are drawn thin. The
            human is always drawn if known; plans that are not finite are left out.
        title: One or two lines at the top.
        size_px: Edge length of the square picture.
        colors: Colour by plan name, default :func:`plan_colors`.

    Raises:
        DataError: A plan has another shape.

    Example:
        ``Path("scene.png").write_bytes(draw_scene(scene, {"sft": poses_83}, title=scene.token))``
    """
    samples = _samples(plans or {})
    window = picture_window(scene, samples)
    figure, axes = square_axes(window, size_px)
    scale = size_px / 640
    draw_surroundings(axes, scene, window, scale)
    human = scene.reference.human_poses[None]
    known = {"human": human} if human.size else {}
    named = known | {k: v for k, v in samples.items() if k != "human"}
    palette = dict(plan_colors(list(named))) | dict(colors or {})
    for name, poses in named.items():
        draw_plan(axes, poses, palette[name], scale, band=name == "human")
    _draw_labels(axes, window, {name: palette[name] for name in named}, title, scale)
    return png(figure)


def draw_surroundings(axes: Axes, scene: Scene, window: Window, scale: float) -> None:
    """Map, other agents and the ego's box and past.

    Args:
        axes: What to draw into; they show `window`.
        scene: What to draw.
        window: What is seen; map elements outside it are left out.
        scale: Widths of lines, 1 in a picture of 640 pixels.
    """
    _draw_map(axes, scene, window, scale)
    _draw_agents(axes, scene, scale)
    draw_ego(axes, scene.observation, scale)


def _samples(plans: Mapping[str, NDArray[np.floating[Any]]]) -> dict[str, Array]:
    """Plans as ``[n, 8, 3]`` float64, without samples that are not finite."""
    result = {}
    for name, plan in plans.items():
        poses = np.asarray(plan, dtype=np.float64)
        poses = poses[None] if poses.ndim == 2 else poses
        if poses.ndim != 3 or poses.shape[2] != 3 or poses.shape[1] == 0:
            raise DataError(f"Plan {name!r} must be [T, 3] or [n, T, 3] to be drawn; got shape {np.shape(plan)}.")
        poses = poses[np.isfinite(poses).all(axis=(1, 2))]
        if len(poses):
            result[name] = poses
    return result


def _polygons(xy: Array, offsets: NDArray[np.int64], scene: Scene, window: Window) -> dict[int, Array]:
    """Polygons (by index) of the world frame that touch the window, on the page."""
    ego = to_ego_frame(np.column_stack([xy, np.zeros(len(xy))]), scene.reference.ego_init)[:, :2]
    result = {}
    low = np.array([window.x_min, window.y_min])
    for index, (start, end) in enumerate(pairwise(offsets.tolist())):
        ring = ego[start:end]
        if end - start > 2 and (ring.max(axis=0) > low).all() and (ring.min(axis=0) < low + window.side).all():
            result[index] = page(ring)
    return result


def _draw_map(axes: Axes, scene: Scene, window: Window, scale: float) -> None:
    from matplotlib.collections import LineCollection, PolyCollection

    ref, seen = scene.reference, scene.observation
    rings = _polygons(ref.map_xy, ref.map_offsets, scene, window)
    road = [ring for i, ring in rings.items() if ref.map_layer[i] in _DRIVABLE]
    lanes = [ring for i, ring in rings.items() if ref.map_layer[i] in _LANES]
    route = [ring for i, ring in rings.items() if ref.map_layer[i] in _LANES and ref.map_on_route[i]]
    axes.add_collection(PolyCollection(road, facecolors=ROAD, edgecolors=ROAD, linewidths=0.8 * scale, zorder=1))
    axes.add_collection(PolyCollection(route, facecolors=ROUTE, edgecolors="none", zorder=2))
    axes.add_collection(
        PolyCollection(lanes, facecolors="none", edgecolors="#d5dae0", linewidths=0.8 * scale, zorder=2.5)
    )
    lines: dict[int, list[Array]] = {int(kind): [] for kind in MapElement}
    for m, (start, end) in enumerate(pairwise(seen.map_offsets.tolist())):
        lines[int(seen.map_type[m])].append(page(seen.map_xy[start:end].astype(np.float64)))
    axes.add_collection(PolyCollection(lines[MapElement.CROSSWALK], facecolors=CROSSWALK, edgecolors="none", zorder=3))
    centers = lines[MapElement.LANE_CENTER] + lines[MapElement.LANE_CONNECTOR_CENTER]
    dashes = (0, (5, 4))
    axes.add_collection(
        LineCollection(centers, colors=LANE_LINE, linewidths=0.8 * scale, linestyles=[dashes], zorder=3.5)
    )
    axes.add_collection(
        LineCollection(lines[MapElement.ROAD_EDGE], colors=ROAD_EDGE, linewidths=1.2 * scale, zorder=3.6)
    )
    red = _polygons(ref.red_xy, ref.red_offsets, scene, window)
    red_now = [(1.0, 0.19, 0.19, 0.45 if ref.red_active[i, 0] else 0.15) for i in red]
    axes.add_collection(PolyCollection(list(red.values()), facecolors=red_now, edgecolors="none", zorder=4))


def _draw_agents(axes: Axes, scene: Scene, scale: float) -> None:
    from matplotlib.collections import LineCollection, PolyCollection
    from matplotlib.colors import to_rgb

    ref = scene.reference
    pose = to_ego_frame(ref.agent_pose, ref.ego_init)
    rgb = np.array([to_rgb(AGENT_COLORS[AgentType(int(kind))]) for kind in ref.agent_type]).reshape(-1, 3)
    length, width = ref.agent_size[:, 0], ref.agent_size[:, 1]
    for step in _PLAN_EVERY_STEPS[::-1]:
        moved = np.hypot(*(pose[:, step, :2] - pose[:, 0, :2]).T) > 0.5
        shown = ref.agent_valid[:, step] & (moved | ~ref.agent_valid[:, 0])
        color = np.column_stack([rgb[shown], np.full(shown.sum(), 0.45 - step / 120)])
        boxes = agent_boxes(pose[shown, step], length[shown], width[shown])
        axes.add_collection(PolyCollection(boxes, facecolors=color, edgecolors=color, linewidths=0.5, zorder=5))
    trail = [page(pose[a, :41, :2][ref.agent_valid[a, :41]]) for a in range(len(pose))]
    axes.add_collection(
        LineCollection(trail, colors=np.column_stack([rgb, np.full(len(rgb), 0.6)]), linewidths=0.8 * scale, zorder=5.5)
    )
    now = ref.agent_valid[:, 0]
    boxes = agent_boxes(pose[now, 0], length[now], width[now])
    axes.add_collection(
        PolyCollection(boxes, facecolors=rgb[now], edgecolors="white", linewidths=0.7 * scale, zorder=6)
    )


def _draw_labels(axes: Axes, window: Window, colors: Mapping[str, str], title: str, scale: float) -> None:
    """Title, legend and scale bar."""
    from matplotlib.lines import Line2D

    paper = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "boxstyle": "round,pad=0.35"}
    if title:
        axes.text(
            0.015,
            0.985,
            title,
            transform=axes.transAxes,
            va="top",
            size=9 * scale,
            bbox=paper,
            zorder=20,
            parse_math=False,
        )
    widths = [5.0 if name == "human" else 2.2 for name in colors]
    handles = [
        Line2D([], [], color=c, lw=w * scale, marker="o", ms=4 * scale, mec="white", mew=0.5)
        for c, w in zip(colors.values(), widths, strict=True)
    ]
    legend = axes.legend(
        handles, [_plain(name) for name in colors], loc="lower left", fontsize=8.5 * scale, framealpha=0.88
    )
    legend.set_zorder(20)
    legend.get_frame().set_edgecolor("none")
    right, bottom = -window.y_min - 0.03 * window.side, window.x_min + 0.035 * window.side
    axes.plot([right - 10, right], [bottom, bottom], color=EGO, lw=2 * scale, solid_capstyle="butt", zorder=20)
    axes.text(right - 5, bottom + 0.008 * window.side, "10 m", ha="center", va="bottom", size=8 * scale, zorder=20)


def _plain(text: str) -> str:
    """Text that matplotlib neither reads as mathematics nor hides from a legend (a leading underscore)."""
    escaped = text.replace("$", r"\$")
    return f"\u200b{escaped}" if escaped.startswith("_") else escaped
