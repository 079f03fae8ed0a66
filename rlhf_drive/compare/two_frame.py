"""Planners that also say what they would have planned in the previous frame, for extended comfort."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from rlhf_drive.errors import DataError
from rlhf_drive.scenes import Scene, Trajectories

__all__ = ["TwoFramePlanner", "plan_previous"]


@runtime_checkable
class TwoFramePlanner(Protocol):
    """A planner that can also say what it would have planned in the previous frame, 0.5 s earlier."""

    def plan_previous(self, scenes: Sequence[Scene]) -> Trajectories | None:
        """Plans in the ego frame of that time, row by row those of ``plan(scenes)``; None where it has none.

        What it returns for a scene without such a frame (:func:`rewards.two_frame.has_previous_frame`) is not used.
        """


def plan_previous(name: str, planner: object, scenes: Sequence[Scene], plans: Trajectories) -> Trajectories | None:
    """A planner's plans of the previous frame, row by row those of `plans`; None where it has none.

    Args:
        name: The planner's, for messages.
        planner: Has none if it is no :class:`TwoFramePlanner`.
        scenes: S scenes.
        plans: Its plans of now.

    Raises:
        DataError: It returned other rows.
    """
    previous = planner.plan_previous(scenes) if isinstance(planner, TwoFramePlanner) else None
    if previous is not None and not np.array_equal(previous.scene_index, plans.scene_index):
        raise DataError(
            f"Planner {name!r} returned {len(previous)} plans of the previous frame for {len(plans)} plans; they must "
            "be the same rows, scene-major."
        )
    return previous
