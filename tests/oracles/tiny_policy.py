"""A small architecture, and random observations to feed it."""

from __future__ import annotations

import numpy as np

from rlhf_drive.policies import Architecture
from rlhf_drive.scenes import Command, Observation

ARCHITECTURE = Architecture(
    d_model=32, num_heads=2, encoder_layers=1, decoder_layers=2, num_experts=4, experts_per_token=2, expert_dim=16,
    max_agents=6, max_polylines=10, points_per_polyline=5, dropout=0.0,
)  # fmt: skip


def observation(seed: int, agents: int = 4, lines: int = 6) -> Observation:
    """A random but well-formed observation."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, 12, size=lines)
    return Observation(
        ego_history=rng.normal(size=(4, 8)) + np.array([0, 0, 0, 8.0, 0, 0, 0, 0]),
        agents=rng.normal(size=(agents, 4, 5)) * 10,
        agents_valid=np.ones((agents, 4)),
        agents_size=np.full((agents, 2), 2.0),
        agents_type=rng.integers(0, 4, size=agents),
        map_xy=rng.normal(size=(int(sizes.sum()), 2)).cumsum(axis=0) * 3,
        map_offsets=np.concatenate([[0], np.cumsum(sizes)]),
        map_type=rng.integers(0, 4, size=lines),
        map_speed_limit=np.full(lines, 12.0),
        map_on_route=np.arange(lines) % 2 == 0,
        map_red=np.zeros(lines),
        route_xy=np.stack([np.arange(0, 90, 3.0), 0.001 * np.arange(0, 90, 3.0) ** 2], axis=-1),
        command=int(Command.LEFT),
    )
