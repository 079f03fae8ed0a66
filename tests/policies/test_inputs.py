"""Network inputs: mirrored worlds, degenerate worlds, and the cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_drive.policies import Architecture, Decoding, Policy, TrajectoryTokenizer
from rlhf_drive.policies.feature_cache import FeatureCache
from rlhf_drive.policies.inputs import mirror_batch, stack_features
from rlhf_drive.scenes import Command, Observation, Scene
from rlhf_drive.scenes.generator import SITUATION_KINDS, generate_scenes

ARCHITECTURE = Architecture(
    d_model=32, num_heads=2, encoder_layers=1, decoder_layers=1, num_experts=4, experts_per_token=2, expert_dim=16,
    max_agents=6, max_polylines=10, points_per_polyline=5, dropout=0.0,
)  # fmt: skip
NO_MAP: dict[str, Any] = {
    "map_xy": np.zeros((0, 2)), "map_offsets": [0], "map_type": [], "map_speed_limit": [], "map_on_route": [],
    "map_red": [],
}  # fmt: skip
NO_AGENTS: dict[str, Any] = {
    "agents": np.zeros((0, 4, 5)), "agents_valid": np.zeros((0, 4)), "agents_size": np.zeros((0, 2)), "agents_type": [],
}  # fmt: skip


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    """One scene of each kind."""
    return list(generate_scenes(len(SITUATION_KINDS), seed=2))


def make_policy(encoding: str = "displacements", **changes: int) -> Policy:
    torch.manual_seed(0)
    return Policy(replace(ARCHITECTURE, **changes), TrajectoryTokenizer(encoding, -20.0, 60.0, 0.1)).eval()


def mirrored(o: Observation) -> Observation:
    """The observation of the world seen in a mirror that swaps left and right."""
    lateral = np.array([1, -1], dtype=np.float32)
    return replace(
        o,
        ego_history=o.ego_history * np.array([1, -1, -1, 1, -1, 1, -1, -1], dtype=np.float32),
        agents=o.agents * np.array([1, -1, -1, 1, -1], dtype=np.float32),
        map_xy=o.map_xy * lateral,
        route_xy=o.route_xy * lateral,
        command={Command.LEFT: Command.RIGHT, Command.RIGHT: Command.LEFT}.get(Command(o.command), o.command),
    )


def test_features_of_the_mirrored_world_are_the_mirrored_features(scenes: list[Scene]) -> None:
    policy = make_policy(max_agents=64, max_polylines=256)
    made = mirror_batch(
        stack_features([policy.features(s.observation) for s in scenes]), torch.ones(len(scenes), dtype=torch.bool)
    )
    real = stack_features([policy.features(mirrored(s.observation)) for s in scenes])
    assert made.ego[:, -12].sum() > 3  # the first leader's flag: some scenes have one
    for name in ("ego", "route", "agents", "lines", "anchor"):
        # Nearest-first order may change among agents or pieces at equal distance; their features are compared as a set.
        a, b = (getattr(batch, name).double() for batch in (made, real))
        if name in ("agents", "lines"):
            a, b = a.sum(dim=1), b.sum(dim=1)
        assert torch.allclose(a, b, atol=1e-3), name


def extreme(o: Observation) -> dict[str, Observation]:
    """Observations that are allowed and unlikely."""
    ego = o.ego_history.copy()
    ego[:, 3] = 300.0
    emptied = o.map_offsets.copy()
    emptied[-2] = emptied[-1]
    lines = len(o.map_type)
    return {
        "nothing at all": replace(o, **NO_AGENTS, **NO_MAP, route_xy=np.zeros((0, 2)), ego_history=np.zeros((4, 8))),
        "a route that is one place": replace(o, route_xy=np.full((5, 2), 3.0)),
        "a route far away": replace(o, route_xy=o.route_xy + 1e6),
        "a route that leads back": replace(o, route_xy=-o.route_xy),
        "everything at the origin": replace(o, agents=0 * o.agents, map_xy=0 * o.map_xy, route_xy=0 * o.route_xy),
        "a map 100 times too large": replace(o, map_xy=100 * o.map_xy),
        "agents on the moon": replace(o, agents=1e7 * o.agents),
        "300 m/s": replace(o, ego_history=ego),
        "a red polyline without points": replace(
            o, map_offsets=emptied, map_red=np.ones(lines), map_on_route=np.ones(lines)
        ),
    }


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("encoding", ["displacements", "waypoints"])
def test_whatever_a_scene_holds_inputs_samples_and_gradients_are_finite(scenes: list[Scene], encoding: str) -> None:
    policy = make_policy(encoding)
    for name, observation in extreme(scenes[0].observation).items():
        batch = policy.batch([observation])
        for field in ("ego", "route", "anchor", "agents", "lines"):
            assert bool(getattr(batch, field).isfinite().all()), (name, field)
        uniforms = torch.rand(2, 2, 16, generator=torch.Generator().manual_seed(0))
        trace = policy.process.sample(policy, policy.encode(batch), uniforms, Decoding(16, "causal", 1.0, 0))
        assert bool(trace.logp.isfinite().all()), name
        loss = policy.process.sft_loss(
            policy, trace.tokens, policy.encode(batch), "random", torch.Generator().manual_seed(0)
        )
        gradients = torch.autograd.grad(loss.sum(), list(policy.parameters()), allow_unused=True)
        assert all(bool(g.isfinite().all()) for g in gradients if g is not None), name


def test_without_a_direction_the_route_is_straight_ahead(scenes: list[Scene]) -> None:
    policy, observation = make_policy("waypoints"), scenes[0].observation
    none, place = (
        policy.features(replace(observation, route_xy=route)) for route in (np.zeros((0, 2)), np.full((5, 2), 3.0))
    )
    expected = 0.5 * max(observation.speed_mps, 0.0) * np.arange(1, 9)
    assert none["anchor"].reshape(8, 2)[:, 0] == pytest.approx(expected, abs=1e-4)
    assert np.array_equal(none["anchor"], place["anchor"])
    assert np.array_equal(none["route"], place["route"])


def test_one_cache_serves_policies_that_see_differently(scenes: list[Scene]) -> None:
    shared = FeatureCache()
    for policy in (make_policy(), make_policy("waypoints"), make_policy(max_agents=1), make_policy()):
        got, own = (cache.batch(policy, scenes[:3]) for cache in (shared, FeatureCache()))
        assert torch.equal(got.anchor, own.anchor)
        assert torch.equal(got.agents, own.agents)


def test_the_cache_forgets_what_was_used_longest_ago(scenes: list[Scene], monkeypatch: pytest.MonkeyPatch) -> None:
    policy, everything, computed = make_policy(), FeatureCache(), []
    everything.batch(policy, scenes[:3])
    cache = FeatureCache(everything.nbytes - 1)  # any two of the three
    features = policy.features
    monkeypatch.setattr(policy, "features", lambda o: computed.append(id(o)) or features(o))
    for i in (0, 1, 0, 2, 0, 1):  # 2 displaces 1, since 0 was used after it
        cache.batch(policy, [scenes[i]])
    assert computed == [id(scenes[i].observation) for i in (0, 1, 2, 1)]
