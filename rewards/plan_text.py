"""Plans and scenes as text: what a language model writes and reads, and what TRL's reward functions receive.

A plan is its poses in order, 0.5 s apart, each `x y heading` in the t=0 ego frame (m, m, rad)::

    2.5000 0.0000 0.0000; 5.0000 0.0120 0.0048; 7.5000 0.0430 0.0130; …

Written with four digits after the point (0.1 mm, 0.0001 rad). Reading what was written gives those numbers to the
bit, and writing them again gives the same text.
"""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from rlhf_drive.errors import DataError
from rlhf_drive.scenes import NUM_POSES, AgentType, Command, Observation

__all__ = ["DECIMALS", "command_word", "format_plan", "parse_plan", "scene_prompt"]

DECIMALS = 4
"""Digits after the point that a plan is written with."""
_NUMBER = re.compile(r"[+-]?[0-9]{1,5}(\.[0-9]{0,12})?")
"""No exponents and at most five digits before the point: no plan lies farther away, and no number overflows."""
_AGENTS_SHOWN = 12
_ROUTE_POINTS_M = (10.0, 20.0, 30.0, 40.0, 60.0)
"""Distances along the route at which a prompt names its points."""


def format_plan(poses: NDArray[np.floating]) -> str:
    """One plan as text.

    Args:
        poses: ``[T, 3]`` x, y (m), heading (rad).

    Raises:
        DataError: Another shape, or a number that is not finite or has more than five digits before the point.

    Example:
        >>> format_plan(np.array([[2.5, 0.0, 0.0], [5.0, -0.00001, 0.0125]]))
        '2.5000 0.0000 0.0000; 5.0000 0.0000 0.0125'
    """
    plan = np.asarray(poses, dtype=np.float64)
    if plan.ndim != 2 or plan.shape[1] != 3 or not len(plan):
        raise DataError(f"A plan to write must be [T, 3]; got shape {list(plan.shape)}.")
    if not (np.abs(plan) < 99999.5).all():
        raise DataError(f"A plan to write must be finite and below 99999.5; got {plan[~(np.abs(plan) < 99999.5)][0]}.")
    rounded = np.round(plan, DECIMALS) + 0.0  # no "-0.0000"
    return "; ".join(" ".join(f"{value:.{DECIMALS}f}" for value in pose) for pose in rounded)


def parse_plan(text: str, *, num_poses: int = NUM_POSES) -> NDArray[np.float64]:
    """The plan that `text` states; nothing is guessed, repaired or left out.

    Spaces and line breaks around numbers, a semicolon at the end, and other counts of digits are fine; any other text
    beside the plan is not.

    Args:
        text: As :func:`format_plan` writes it.
        num_poses: Poses the plan must have.

    Returns:
        ``[num_poses, 3]`` float64.

    Raises:
        DataError: It is not a plan; the message names the pose and what stands there.

    Example:
        >>> parse_plan("2.5 0 0; 5 0.01 0.004", num_poses=2).tolist()
        [[2.5, 0.0, 0.0], [5.0, 0.01, 0.004]]
    """
    parts = text.strip().removesuffix(";").split(";")
    rows = []
    for index, part in enumerate(parts):
        numbers = part.split()
        bad = next((number for number in numbers if not _NUMBER.fullmatch(number)), None)
        if bad is not None:
            raise DataError(f"Pose {index + 1} of the plan holds {bad[:40]!r}, which is no number such as -12.3456.")
        if len(numbers) != 3:
            raise DataError(f"Pose {index + 1} of the plan has {len(numbers)} numbers; write `x y heading`.")
        rows.append([float(number) for number in numbers])
    if len(rows) != num_poses:
        raise DataError(f"The plan has {len(rows)} poses; write {num_poses}, separated by semicolons.")
    return np.array(rows, dtype=np.float64)


def scene_prompt(observation: Observation) -> str:
    """What a policy may see, and the question, as text.

    Speed, command, points of the route 10 … 60 m ahead, red lights, the twelve nearest road users with their speed,
    and the form of the answer. Nothing but the observation goes in.
    """
    lines = [
        f"You drive at {observation.speed_mps:.2f} m/s. Command: {command_word(observation)}.",
        "Frame: your rear axle, x forward, y left; metres, radians, seconds.",
        f"Route ahead: {_route(observation)}.",
        f"Red light ahead: {'yes' if bool(np.any(observation.map_red & observation.map_on_route)) else 'no'}.",
        "Road users (x, y, heading, speed):",
        *(_agents(observation) or ["none"]),
        f"Write your next {NUM_POSES} poses, 0.5 s apart, as `x y heading; x y heading; …` and nothing else.",
    ]
    return "\n".join(lines)


def command_word(observation: Observation) -> str:
    """`left`, `straight` or `right`."""
    return Command(observation.command).name.lower()


def _route(observation: Observation) -> str:
    """Points of the route at given distances along it."""
    xy = observation.route_xy.astype(np.float64)
    if len(xy) < 2:
        return "unknown"
    along = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(xy, axis=0).T))])
    along -= along[int(np.argmin(np.hypot(*xy.T)))]
    reached = [d for d in _ROUTE_POINTS_M if d <= along[-1]]
    points = [(np.interp(d, along, xy[:, 0]), np.interp(d, along, xy[:, 1])) for d in reached]
    return ", ".join(f"({x:.1f}, {y:.1f})" for x, y in points) or "ends here"


def _agents(observation: Observation) -> list[str]:
    """One line for each of the nearest road users, nearest first."""
    now = observation.agents[:, -1].astype(np.float64)
    nearest = np.argsort(np.hypot(now[:, 0], now[:, 1]), kind="stable")[:_AGENTS_SHOWN]
    names = [AgentType(int(kind)).name.lower() for kind in observation.agents_type]
    return [
        f"{names[i]} {now[i, 0]:.1f} {now[i, 1]:.1f} {now[i, 2]:.2f} {np.hypot(now[i, 3], now[i, 4]):.1f}"
        for i in nearest
    ]
