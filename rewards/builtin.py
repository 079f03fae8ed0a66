"""The rewards that every installation knows: the scorers' components and aggregates, ``[N]`` in 0..1."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from rewards.carriers import RewardInputs
from rewards.registry import REWARDS, reward

__all__ = ["AGGREGATES", "ALIASES", "COMPONENT_TEXTS"]

AGGREGATES = frozenset({"pdms", "epdms", "wam_flow", "epdms_two_frame"})
"""Rewards that are made of a scorer's components."""

COMPONENT_TEXTS = {
    "pdms": "NAVSIM v1.1's PDM score: ``nc * dac * (5 ep + 5 ttc + 2 c) / 12``.",
    "epdms": "NAVSIM v2.2's extended PDM score; with EC where a plan of the previous frame is given.",
    "nc": "No at-fault collision: 1, 0.5 (with a static object) or 0.",
    "dac": "Drivable-area compliance: 1 or 0.",
    "ddc": "Driving-direction compliance: 1, 0.5 or 0; v1.1 gives it no weight, in v2.2 it multiplies.",
    "tlc": "Traffic-light compliance (v2.2): 1 or 0.",
    "ep": "Progress along the route relative to the reference planner.",
    "ttc": "Time to collision stays within bounds: 1 or 0.",
    "c": "Comfort (v1.1): accelerations, jerks and yaw rates stay within bounds: 1 or 0.",
    "lk": "Lane keeping (v2.2): 1 or 0.",
    "hc": "History comfort (v2.2): comfort of the logged past and the plan together: 1 or 0.",
    "ec": "Two-frame extended comfort (v2.2): agrees with the plan of the previous frame: 1 or 0.",
}
"""What each component measures."""
ALIASES = {
    "no_collision": "nc",
    "drivable_area": "dac",
    "driving_direction": "ddc",
    "traffic_lights": "tlc",
    "ego_progress": "ep",
    "time_to_collision": "ttc",
    "comfort": "c",
    "lane_keeping": "lk",
    "history_comfort": "hc",
    "extended_comfort": "ec",
}
"""Readable names of the components."""


def _component(name: str, text: str) -> Callable[[RewardInputs], NDArray[np.float64]]:
    def component(inputs: RewardInputs) -> NDArray[np.float64]:
        return inputs.components[name]

    component.__doc__ = text
    return component


for _name, _text in COMPONENT_TEXTS.items():
    reward(_name, needs=(_name,), two_frame=_name == "ec")(_component(_name, _text))
for _alias, _name in ALIASES.items():
    REWARDS.add(_alias, REWARDS.get(_name))


@reward("wam_flow", needs=("nc", "dac", "ep", "ttc", "c"))
def wam_flow(inputs: RewardInputs) -> NDArray[np.float64]:
    """WAM-Flow's simulator reward: ``nc * dac * (5 ep + 5 ttc + 2 c) / 12`` (arXiv 2512.06112), of PDMS components."""
    part = inputs.components
    return np.asarray(part["nc"] * part["dac"] * (5.0 * part["ep"] + 5.0 * part["ttc"] + 2.0 * part["c"]) / 12.0)


@reward("epdms_two_frame", needs=("epdms", "ec"), two_frame=True)
def epdms_two_frame(inputs: RewardInputs) -> NDArray[np.float64]:
    """EPDMS with EC in every row; a row without a plan of the previous frame has no value."""
    return np.where(np.isnan(inputs.components["ec"]), np.nan, inputs.components["epdms"])
