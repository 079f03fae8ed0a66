"""Where plans and agents can be at all in a stretch of time, so that pairs that never come close cost four comparisons.

A window is nine steps long, which is also how far TTC looks ahead.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

from rewards.kernels.boxes import EGO_HALF_LENGTH_M, EGO_HALF_WIDTH_M

__all__ = ["EGO_RADIUS_M", "WINDOW_STEPS", "agent_windows", "apart", "plan_windows"]

EGO_RADIUS_M = math.hypot(EGO_HALF_LENGTH_M, EGO_HALF_WIDTH_M)
"""From the ego's box centre to its corners."""
WINDOW_STEPS = 9
"""Steps of 0.1 s in a window."""
_STEP_S = 0.1


@njit(cache=True, nogil=True)
def agent_windows(
    pose: NDArray[np.float64], half_size: NDArray[np.float64], valid: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Boxes ``[A, W, 4]`` that an agent never leaves while a plan is in its window w of nine steps, nor 0.9 s later.

    A window in which the agent is absent has an empty box.

    Args:
        pose: ``[A, T, 4]`` box centre x, y (m), cos and sin of the heading.
        half_size: ``[A, 2]`` half length, half width (m).
        valid: ``[A, T]`` presence.
    """
    agents, steps = valid.shape
    windows = np.empty((agents, (steps + WINDOW_STEPS - 1) // WINDOW_STEPS, 4))
    windows[..., :2], windows[..., 2:] = np.inf, -np.inf
    for a in range(agents):
        radius = math.hypot(half_size[a, 0], half_size[a, 1])
        for t in range(steps):
            if not valid[a, t]:
                continue
            x, y = pose[a, t, 0], pose[a, t, 1]
            for w in range(max(t // WINDOW_STEPS - 1, 0), t // WINDOW_STEPS + 1):
                box = windows[a, w]
                box[0], box[1] = min(box[0], x - radius), min(box[1], y - radius)
                box[2], box[3] = max(box[2], x + radius), max(box[3], y + radius)
    return windows


@njit(cache=True, nogil=True)
def plan_windows(boxes: NDArray[np.float64], speed: NDArray[np.float64]) -> NDArray[np.float64]:
    """Axis-aligned boxes ``[W + 1, 4]`` that the ego box of a plan never leaves in its windows of nine steps, also when
    moved forward by up to 0.9 s of its speed; the last row holds all of them.

    Args:
        boxes: ``[K, 4]`` centre x, y, cos, sin.
        speed: ``[K]`` m/s.
    """
    windows = np.empty(((len(boxes) + WINDOW_STEPS - 1) // WINDOW_STEPS + 1, 4))
    windows[:, :2], windows[:, 2:] = np.inf, -np.inf
    whole = windows[-1]
    for k in range(len(boxes)):
        x, y = boxes[k, 0], boxes[k, 1]
        shift = WINDOW_STEPS * _STEP_S * speed[k]
        px, py = x + shift * boxes[k, 2], y + shift * boxes[k, 3]
        box = windows[k // WINDOW_STEPS]
        box[0], box[1] = (
            min(box[0], x - EGO_RADIUS_M, px - EGO_RADIUS_M),
            min(box[1], y - EGO_RADIUS_M, py - EGO_RADIUS_M),
        )
        box[2], box[3] = (
            max(box[2], x + EGO_RADIUS_M, px + EGO_RADIUS_M),
            max(box[3], y + EGO_RADIUS_M, py + EGO_RADIUS_M),
        )
    for w in range(len(windows) - 1):
        whole[0], whole[1] = min(whole[0], windows[w, 0]), min(whole[1], windows[w, 1])
        whole[2], whole[3] = max(whole[2], windows[w, 2]), max(whole[3], windows[w, 3])
    return windows


@njit(cache=True, nogil=True)
def apart(box: NDArray[np.float64], other: NDArray[np.float64]) -> bool:
    """Whether two axis-aligned boxes ``[4]`` share no point."""
    return bool(box[0] > other[2] or box[2] < other[0] or box[1] > other[3] or box[3] < other[1])
