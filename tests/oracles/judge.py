"""Sub-metrics of states written by hand, in a tiny scene."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from oracles.tiny_scene import Agent, Polygon, make_reference, straight_states
from rewards.kernels.score import V1_RULES, ScoreRules, StateMetrics, score_states
from rewards.prepare import prepare_agents, prepare_lights, prepare_road


def judge(
    *agents: Agent,
    states: NDArray[np.float64] | None = None,
    polygons: list[Polygon] | None = None,
    rules: ScoreRules = V1_RULES,
    red: Sequence[list[tuple[float, float]]] = (),
) -> StateMetrics:
    """Metrics of ``[1, 41, 11]`` states in the ego frame (by default 10 m/s along +x) among `agents`."""
    reference = make_reference(agents=list(agents), polygons=polygons, red=list(red))
    boxes = prepare_agents(
        reference.agent_pose,
        reference.agent_velocity,
        reference.agent_valid,
        reference.agent_size,
        reference.agent_type,
        reference.ego_init[:3],
    )
    drive = straight_states(10.0) if states is None else states
    return score_states(prepare_road(reference), boxes, drive, rules=rules, lights=prepare_lights(reference))


def seen_once(step: int, x: float, y: float = 0.0, **options: object) -> Agent:
    """A moving agent that is there at one step only."""
    return Agent(path=np.tile([x, y, 0.0], (51, 1)), seen=(step,), vx=3.0, **options)  # type: ignore[arg-type]
