"""Pictures of sampled groups: what the plans of one scene look like, and what each of them is worth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rewards.carriers import Scores
from rlhf_drive.disk import writing
from rlhf_drive.scenes import Scene
from rlhf_drive.scenes.picture import draw_surroundings
from rlhf_drive.scenes.picture_parts import (
    HUMAN,
    OFF_ROAD,
    Window,
    draw_plan,
    ego_boxes,
    page,
    png,
    show_window,
    window_around,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap

    from rollout import Rollout

__all__ = ["choose_groups", "draw_groups"]

PANEL_PX = 560
"""Edge length of one scene's square."""
FOOT_PX = 74
"""Height of the strip below with the scale of rewards."""
REWARD_COLORS = ("#c92a2a", "#e8590c", "#b5179e", "#5f3dc4", "#1c6fd1")
"""From the lowest reward of the picture to the highest."""
INVALID = "#68727d"
INK = "#15202b"
SAME = 1e-9
"""Rewards that differ by less are equal."""


@dataclass(frozen=True)
class _Group:
    """The plans of one scene."""

    scene: Scene
    poses: NDArray[np.float64]
    """``[G, 8, 3]``, ego frame."""
    rewards: NDArray[np.float64]
    """``[G]``; NaN where a plan is not valid."""
    scores: Scores
    """G rows."""

    @property
    def best(self) -> int | None:
        """Row of the highest reward, the first of equals; None where no plan is valid."""
        return None if np.isnan(self.rewards).all() else int(np.nanargmax(self.rewards))

    @property
    def worst(self) -> int | None:
        """Row of the lowest reward; None where it is that of the best."""
        best = self.best
        if best is None or np.nanmin(self.rewards) >= self.rewards[best] - SAME:
            return None
        return int(np.nanargmin(self.rewards))


def choose_groups(rewards: NDArray[np.float64], count: int) -> list[int]:
    """The first `count` groups whose rewards differ, filled up with the first of the others; in their order.

    Args:
        rewards: ``[S, G]``; NaN where a plan is not valid.
        count: Groups wanted.
    """
    filled = np.where(np.isnan(rewards), -np.inf, rewards)
    low = np.where(np.isnan(rewards), np.inf, rewards).min(axis=1)
    differs = filled.max(axis=1) > low + SAME
    return sorted(np.argsort(~differs, kind="stable")[:count].tolist())


def draw_groups(
    scenes: Sequence[Scene], rollout: Rollout, scores: Scores, path: Path, *, step: int, count: int
) -> None:
    """PNG of the first scenes of a step whose groups differ, a square for each.

    Plans are coloured by reward on one scale for the whole picture; the best and the worst of a group are thick and
    named, the worst with what it lacks beside the best; plans without a score are grey and dashed, and the human's is a
    green band.

    Args:
        scenes: S scenes.
        rollout: N = S * G plans.
        scores: N rows.
        path: File to write; its folder is made if need be.
        step: Counted from 1, for the title.
        count: Scenes drawn at most.

    Raises:
        StorageError: The file cannot be written.

    Example:
        ``draw_groups(batch, rollout, scores, folder / "pictures" / "step-000020.png", step=20, count=4)``
    """
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    groups = _groups(scenes, rollout, scores, count)
    columns = len(groups) if len(groups) <= 3 else math.ceil(math.sqrt(len(groups)))
    rows = math.ceil(len(groups) / columns)
    width, height = columns * PANEL_PX, rows * PANEL_PX + FOOT_PX
    figure = Figure(figsize=(width / 100, height / 100), dpi=100, facecolor="white")
    colors = LinearSegmentedColormap.from_list("reward", REWARD_COLORS)
    valid = [group.rewards[~np.isnan(group.rewards)] for group in groups]
    shown = np.concatenate(valid) if valid else np.zeros(0)
    low, high = (float(shown.min()), float(shown.max())) if len(shown) else (0.0, 1.0)
    gap = 3.0
    for i, group in enumerate(groups):
        left, top = i % columns * PANEL_PX, i // columns * PANEL_PX
        box = (left + gap, height - top - PANEL_PX + gap, PANEL_PX - 2 * gap, PANEL_PX - 2 * gap)
        axes = figure.add_axes((box[0] / width, box[1] / height, box[2] / width, box[3] / height))
        _draw_group(axes, group, _Scale(low, high, colors))
    _draw_foot(figure, step, scores, _Scale(low, high, colors), width, height)
    with writing(f"The picture of step {step}", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_bytes(png(figure))
        partial.replace(path)


@dataclass(frozen=True)
class _Scale:
    """From a reward to its colour."""

    low: float
    high: float
    colors: Colormap

    def __call__(self, reward: float) -> Any:
        share = (reward - self.low) / (self.high - self.low) if self.high > self.low + SAME else 0.5
        return self.colors(share)


def _groups(scenes: Sequence[Scene], rollout: Rollout, scores: Scores, count: int) -> list[_Group]:
    size = rollout.num_generations
    rewards = np.where(scores.valid, scores.total, np.nan).reshape(-1, size)
    poses = np.asarray(rollout.trajectories.poses, dtype=np.float64).reshape(len(scenes), size, -1, 3)
    return [
        _Group(scenes[s], poses[s], rewards[s], scores.rows(np.arange(s * size, (s + 1) * size)))
        for s in choose_groups(rewards, count)
    ]


def _draw_group(axes: Axes, group: _Group, scale: _Scale) -> None:
    axes.patch.set_facecolor(OFF_ROAD)
    ends = group.poses[:, :, :2].reshape(-1, 2)
    window = window_around([np.zeros((1, 2)), group.scene.reference.human_poses[:, :2], ends], least_m=44.0)
    show_window(axes, window)
    axes.set_axis_on()
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_color("#c5ccd3")
    thin = PANEL_PX / 640
    draw_surroundings(axes, group.scene, window, thin)
    if group.scene.reference.human_poses.size:
        draw_plan(axes, group.scene.reference.human_poses[None], HUMAN, thin, band=True)
    best, worst = group.best, group.worst
    order = [row for row in np.argsort(np.nan_to_num(group.rewards, nan=-np.inf)) if row not in (best, worst)]
    for row in order:
        _draw_path(axes, group.poses[row], group.rewards[row], scale, strong=False)
    for row in (worst, best):
        if row is not None:
            _draw_path(axes, group.poses[row], group.rewards[row], scale, strong=True)
    _name_ends(axes, group, window, scale)
    _draw_title(axes, group)


def _draw_path(axes: Axes, poses: NDArray[np.float64], reward: float, scale: _Scale, *, strong: bool) -> None:
    """A plan from the ego on, with its final box."""
    from matplotlib.collections import PolyCollection

    if not np.isfinite(poses).all():
        return
    x, y = page(np.concatenate([np.zeros((1, 2)), poses[:, :2]])).T
    if np.isnan(reward):
        axes.plot(x, y, color=INVALID, lw=1.5, ls=(0, (3, 2)), zorder=8.4)
        axes.plot(x[-1:], y[-1:], color=INVALID, ls="", marker="x", ms=6, mew=1.6, zorder=9)
        return
    color, layer = scale(reward), 9.0 if strong else 8.6
    axes.plot(x, y, color="white", lw=4.4 if strong else 2.6, alpha=0.75, zorder=layer, solid_capstyle="round")
    axes.plot(x, y, color=color, lw=2.6 if strong else 1.3, zorder=layer + 0.1, solid_capstyle="round")
    if strong:
        axes.plot(x[1:], y[1:], color=color, ls="", marker="o", ms=4, mec="white", mew=0.5, zorder=layer + 0.2)
        box = ego_boxes(poses[None, -1])
        axes.add_collection(PolyCollection(box, facecolors="none", edgecolors=color, linewidths=1.3, zorder=layer))
    else:
        axes.plot(x[-1:], y[-1:], color=color, ls="", marker="o", ms=3.5, mec="white", mew=0.5, zorder=layer + 0.2)


def _name_ends(axes: Axes, group: _Group, window: Window, scale: _Scale) -> None:
    """Labels of the best and the worst plan, on the sides of the picture where they do not lie on each other."""
    named = [("best", group.best), ("worst", group.worst)]
    rows = [(name, row) for name, row in named if row is not None]
    ends = {name: page(group.poses[row, -1, :2]) for name, row in rows}
    middle = -window.y_min - window.side / 2
    for name, row in rows:
        x, y = ends[name]
        others = [end[0] for other, end in ends.items() if other != name]
        right = x >= others[0] if others and abs(x - others[0]) > 0.5 else (name == "best") == (x <= middle)
        text = f"{name} {group.rewards[row]:.2f}"
        if name == "worst":
            text += _lacks(group, int(row))
        axes.annotate(
            text, (x, y), xytext=(16 if right else -16, 10 if name == "best" else -10), textcoords="offset points",
            ha="left" if right else "right", va="center", size=8.5, color=scale(group.rewards[row]), weight="bold",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "boxstyle": "round,pad=0.25"}, zorder=21,
            arrowprops={"arrowstyle": "-", "color": scale(group.rewards[row]), "lw": 0.9, "shrinkA": 0, "shrinkB": 3},
            parse_math=False, annotation_clip=False,
        )  # fmt: skip


def _lacks(group: _Group, worst: int) -> str:
    """The components in which the worst plan is furthest below the best, two at most."""
    assert group.best is not None
    lower = group.scores.components[group.best] - group.scores.components[worst]
    most = sorted(
        (c for c in range(len(lower)) if lower[c] > 0.005 and group.scores.names[c] != group.scores.scorer.name),
        key=lambda c: (-lower[c], c),
    )[:2]
    parts = [f"{group.scores.names[c]} {group.scores.components[worst, c]:.2g}" for c in most]
    return f"\n{', '.join(parts)}" if parts else ""


def _draw_title(axes: Axes, group: _Group) -> None:
    rewards = group.rewards[~np.isnan(group.rewards)]
    token = group.scene.token if len(group.scene.token) <= 40 else f"{group.scene.token[:39]}…"
    second = [] if token.startswith(group.scene.kind) else [group.scene.kind]
    if len(rewards):
        second += [f"mean {rewards.mean():.2f}", f"spread {np.ptp(rewards):.2f}"]
    if len(rewards) < len(group.rewards):
        second.append(f"{len(group.rewards) - len(rewards)} without a score")
    axes.text(
        0.015, 0.985, f"{token}\n{'   '.join(second)}", transform=axes.transAxes, va="top", size=9, color=INK,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "boxstyle": "round,pad=0.35"}, zorder=20,
        parse_math=False,
    )  # fmt: skip


def _draw_foot(figure: Any, step: int, scores: Scores, scale: _Scale, width: int, height: int) -> None:
    """Step and mean reward at the left, the scale of rewards at the right."""
    middle = FOOT_PX / 2 / height
    mean = f"mean reward {scores.total[scores.valid].mean():.3f}" if scores.valid.any() else "no valid plan"
    figure.text(14 / width, middle + 10 / height, f"step {step}", size=13, weight="bold", color=INK, va="center")
    figure.text(14 / width, middle - 14 / height, mean, size=9.5, color=INK, va="center")
    _draw_key(figure, (width - 375) / width, middle, height)
    bar = figure.add_axes(((width - 170) / width, middle, 150 / width, 12 / height))
    bar.imshow(np.linspace(0.0, 1.0, 256)[None], aspect="auto", cmap=scale.colors, extent=(0.0, 1.0, 0.0, 1.0))
    bar.set_yticks([])
    ends = [0.0, 0.5, 1.0] if scale.high > scale.low + SAME else [0.5]
    bar.set_xticks(ends, [f"{scale.low + end * (scale.high - scale.low):.2f}" for end in ends])
    bar.tick_params(length=2, labelsize=8.5, colors=INK, pad=2)
    bar.set_title("reward of a plan", size=8.5, color=INK, pad=3)
    for side in bar.spines.values():
        side.set_visible(False)


def _draw_key(figure: Any, left: float, middle: float, height: int) -> None:
    """What a green band and a dashed line mean."""
    from matplotlib.lines import Line2D

    rows: tuple[tuple[int, str, dict[str, Any]], ...] = (
        (10, "human", {"color": HUMAN, "lw": 5.0, "alpha": 0.55}),
        (-14, "plan without a score", {"color": INVALID, "lw": 1.5, "ls": (0, (3, 2)), "marker": "x", "ms": 6}),
    )
    for above, text, style in rows:
        y, width = middle + above / height, 34 / figure.bbox.width
        figure.add_artist(Line2D([left, left + width], [y, y], markevery=[1], **style))
        figure.text(left + 1.4 * width, y, text, size=9, color=INK, va="center")
