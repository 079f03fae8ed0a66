"""The rewards that every installation knows: PDMS and each of its components, ``[N]`` in 0..1."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rewards.carriers import RewardInputs
from rewards.registry import REWARDS, reward

__all__ = ["ALIASES"]


@reward("pdms")
def pdms(inputs: RewardInputs) -> NDArray[np.float64]:
    """NAVSIM's PDM score: ``nc * dac * (5 ep + 5 ttc + 2 c) / 12``."""
    return inputs.pdms["pdms"]


@reward("nc")
def no_collision(inputs: RewardInputs) -> NDArray[np.float64]:
    """No at-fault collision: 1, 0.5 (with a static object) or 0."""
    return inputs.pdms["nc"]


@reward("dac")
def drivable_area(inputs: RewardInputs) -> NDArray[np.float64]:
    """Drivable-area compliance: 1 or 0."""
    return inputs.pdms["dac"]


@reward("ep")
def ego_progress(inputs: RewardInputs) -> NDArray[np.float64]:
    """Progress along the route relative to the reference planner."""
    return inputs.pdms["ep"]


@reward("ttc")
def time_to_collision(inputs: RewardInputs) -> NDArray[np.float64]:
    """Time to collision stays within bounds: 1 or 0."""
    return inputs.pdms["ttc"]


@reward("c")
def comfort(inputs: RewardInputs) -> NDArray[np.float64]:
    """Accelerations, jerks and yaw rates stay within bounds: 1 or 0."""
    return inputs.pdms["c"]


@reward("ddc")
def driving_direction(inputs: RewardInputs) -> NDArray[np.float64]:
    """Driving-direction compliance: 1, 0.5 or 0; PDMS of NAVSIM v1.1 gives it no weight."""
    return inputs.pdms["ddc"]


ALIASES = {
    "no_collision": "nc",
    "drivable_area": "dac",
    "ego_progress": "ep",
    "time_to_collision": "ttc",
    "comfort": "c",
    "driving_direction": "ddc",
}
"""Readable names of the components."""
for _alias, _name in ALIASES.items():
    REWARDS.add(_alias, REWARDS.get(_name))
