"""The policy network: shared context, isolation, invariances, checkpoints."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles.tiny_policy import ARCHITECTURE, observation

from rlhf_drive.errors import CheckpointError
from rlhf_drive.policies import Decoding, Policy, TrajectoryTokenizer, load_policy, masked, save_policy
from rlhf_drive.policies.checkpoints import restore_folder
from rlhf_drive.policies.inputs import mirror_batch, stack_features
from rlhf_drive.policies.policy import NumericHead
from rlhf_drive.policies.route import anchor_path
from rlhf_drive.scenes import Command, Observation


@pytest.fixture(scope="module")
def policy() -> Policy:
    torch.manual_seed(3)
    policy = Policy(ARCHITECTURE, TrajectoryTokenizer("displacements", -5.0, 20.0, 0.1))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if name.startswith("head"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return policy.eval()


def test_rows_share_the_context_as_if_each_had_encoded_its_own(policy: Policy) -> None:
    scenes = [observation(0), observation(1, agents=2, lines=9), observation(2, agents=0)]
    state = torch.randint(0, policy.vocab_size + 1, (3 * 4, 16), generator=torch.Generator().manual_seed(0))
    where = torch.ones_like(state, dtype=torch.bool)
    together = policy.action_logits(state, torch.zeros(12), policy.encode(scenes), where).view(12, 16, -1)
    for row in range(12):
        alone = policy.action_logits(
            state[row : row + 1], torch.zeros(1), policy.encode([scenes[row // 4]]), where[:1]
        ).view(16, -1)
        assert torch.allclose(together[row], alone, atol=2e-4)


def test_scene_tokens_do_not_see_action_tokens(policy: Policy) -> None:
    context = policy.encode([observation(0)])
    before = [key.clone() for key in context.keys]
    policy.action_logits(torch.zeros(5, 16, dtype=torch.long), torch.zeros(5), context, torch.ones(5, 16).bool())
    assert all(torch.equal(a, b) for a, b in zip(before, context.keys, strict=True))


def test_every_scene_input_reaches_the_logits(policy: Policy) -> None:
    base = observation(0)
    state = torch.full((1, 16), policy.vocab_size)

    def logits(changed: Observation) -> torch.Tensor:
        return policy.action_logits(state, torch.zeros(1), policy.encode([changed]), torch.ones(1, 16).bool())

    reference = logits(base)
    for name in ("ego_history", "agents", "map_xy", "route_xy", "agents_size", "map_speed_limit"):
        moved = replace(base, **{name: getattr(base, name) + 0.5})
        assert (logits(moved) - reference).abs().max() > 1e-4, name
    for name in ("map_red", "map_on_route"):
        assert (logits(replace(base, **{name: ~getattr(base, name)})) - reference).abs().max() > 1e-4, name
    assert (logits(replace(base, command=Command.RIGHT)) - reference).abs().max() > 1e-4


def test_bidirectional_decoder_sees_tokens_on_both_sides(policy: Policy) -> None:
    context = policy.encode([observation(0)])
    state = torch.full((3, 16), policy.vocab_size)
    state[1, 2], state[2, 13] = 70, 70
    where = torch.zeros(3, 16, dtype=torch.bool)
    where[:, 8] = True
    logits = policy.action_logits(state, torch.zeros(3), context, where)
    assert (logits[1] - logits[0]).abs().max() > 1e-4
    assert (logits[2] - logits[0]).abs().max() > 1e-4


def test_untrained_head_centres_on_driving_on_along_the_route() -> None:
    torch.manual_seed(0)
    fresh = Policy(ARCHITECTURE, TrajectoryTokenizer("waypoints", -5.0, 60.0, 0.1)).eval()
    scene = observation(0)
    logits = fresh.action_logits(
        torch.full((1, 16), fresh.vocab_size), torch.zeros(1), fresh.encode([scene]), torch.ones(1, 16).bool()
    )
    mean = (logits.softmax(dim=-1) * fresh.values[:-1]).sum(dim=-1).view(8, 2)
    # The route is y = 0.001 x^2, starts at the ego, and is nearly as long as x.
    expected = 0.5 * scene.speed_mps * np.arange(1, 9)
    assert mean[:, 0].tolist() == pytest.approx(expected, abs=0.5)
    assert mean[:, 1].tolist() == pytest.approx(0.001 * expected**2, abs=0.2)


def test_head_is_a_mixture_and_a_free_term() -> None:
    """Against `logsumexp` over the components in float64; the narrowest are tens of thousands of nats down far off."""
    torch.manual_seed(0)
    head, dim, values = NumericHead(6, 501, 0.05), 6, torch.linspace(-5.0, 20.0, 501)
    with torch.no_grad():
        head.table.normal_()
        head.mixture.weight.normal_(std=0.5)
        head.mixture.bias[6:] = torch.tensor([-4.0, -4.5, 1.0])
    hidden, anchor = torch.randn(7, dim, requires_grad=True), torch.linspace(-2.0, 15.0, 7)
    logits = head(hidden, anchor, values)
    exact_head, exact_hidden = copy.deepcopy(head).double(), hidden.detach().double().requires_grad_()
    weight, mean, spread = exact_head.mixture(exact_hidden).chunk(3, dim=-1)
    deviation = torch.nn.functional.softplus(spread) + 0.025
    log_weight = weight.log_softmax(dim=-1) - deviation.log()
    z = (values.double()[:, None] - (anchor.double()[:, None] + mean)[:, None]) / deviation[:, None]
    exact = (log_weight[:, None] - 0.5 * z.square()).logsumexp(-1) + exact_head.free(exact_hidden) @ exact_head.table.T
    assert float(z.square().max()) > 1e5
    torch.testing.assert_close(logits.double(), exact, rtol=2e-5, atol=2e-5)
    looked_at = torch.randn(7, 501, generator=torch.Generator().manual_seed(1))
    (found,) = torch.autograd.grad((logits.log_softmax(-1).exp() * looked_at).sum(), hidden)
    (expected,) = torch.autograd.grad((exact.log_softmax(-1).exp() * looked_at).sum(), exact_hidden)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_anchor_eases_onto_the_route_at_the_present_speed() -> None:
    base = observation(0)
    straight = np.stack([np.arange(-5.0, 95.0, 5.0), np.full(20, 2.0)], axis=-1)
    scene = replace(base, route_xy=straight)
    path = anchor_path(scene, np.array([0.0, 1.0, 3.0]))
    distance = scene.speed_mps * np.array([0.0, 1.0, 3.0])
    # The ego starts 2 m right of the route; that offset shrinks by exp(-distance / 15 m).
    assert path[:, 0] == pytest.approx(distance, abs=1e-6)
    assert path[:, 1] == pytest.approx(2.0 - 2.0 * np.exp(-distance / 15.0), abs=1e-6)


def test_mirroring_twice_is_the_identity_and_swaps_the_command(policy: Policy) -> None:
    batch = stack_features([policy.features(observation(s)) for s in range(2)])
    flip = torch.tensor([True, False])
    once = mirror_batch(batch, flip)
    assert torch.equal(once.ego[1], batch.ego[1])
    assert once.ego[0, 32:35].tolist() == [0.0, 0.0, 1.0]
    twice = mirror_batch(once, flip)
    for name in ("ego", "route", "agents", "lines"):
        assert torch.equal(getattr(twice, name), getattr(batch, name))


def test_mirrored_observation_equals_mirrored_features(policy: Policy) -> None:
    base = observation(4)
    sign_state = np.array([1, -1, -1, 1, -1, 1, -1, -1], dtype=np.float32)
    flipped = replace(
        base,
        ego_history=base.ego_history * sign_state,
        agents=base.agents * np.array([1, -1, -1, 1, -1], dtype=np.float32),
        map_xy=base.map_xy * np.array([1, -1], dtype=np.float32),
        route_xy=base.route_xy * np.array([1, -1], dtype=np.float32),
        command=Command.RIGHT,
    )
    made = mirror_batch(stack_features([policy.features(base)]), torch.tensor([True]))
    real = stack_features([policy.features(flipped)])
    for name in ("ego", "route", "agents", "lines"):
        assert torch.allclose(getattr(made, name), getattr(real, name), atol=1e-5), name


def test_checkpoint_rebuilds_the_same_policy(policy: Policy, tmp_path: Path) -> None:
    policy.trained_on = frozenset({"0123456789ab"})
    save_policy(policy, tmp_path, info={"step": 3})
    back = load_policy(tmp_path)
    assert back.trained_on == policy.trained_on
    assert back.describe() == policy.describe()
    assert all(torch.equal(a, b) for a, b in zip(policy.state_dict().values(), back.state_dict().values(), strict=True))
    uniforms = torch.rand(4, 2, 16, generator=torch.Generator().manual_seed(0))
    scenes = [observation(0), observation(1)]
    traces = [
        masked.sample(p, p.encode(scenes), uniforms, Decoding(4, "confidence", 1.0, 0)) for p in (policy, back.eval())
    ]
    assert torch.equal(traces[0].tokens, traces[1].tokens)


def test_a_folder_lost_between_two_renames_comes_back(tmp_path: Path) -> None:
    old, final = tmp_path / ".policy.old", tmp_path / "policy"
    old.mkdir()
    (old / "policy.json").write_text("{}")
    restore_folder(final)
    assert (final / "policy.json").read_text() == "{}"
    old.mkdir()
    restore_folder(final)  # a folder that is there is never replaced by an older one
    assert (final / "policy.json").exists()
    assert old.exists()


@pytest.mark.parametrize("damage", ["truncate", "flip", "manifest", "missing", "format", "architecture"])
def test_damaged_checkpoints_are_named(policy: Policy, tmp_path: Path, damage: str) -> None:
    save_policy(policy, tmp_path)
    weights, manifest = tmp_path / "policy.safetensors", tmp_path / "policy.json"
    if damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "flip":
        content = bytearray(weights.read_bytes())
        content[-5] ^= 1
        weights.write_bytes(bytes(content))
    elif damage == "manifest":
        manifest.write_text(manifest.read_text()[:50])
    elif damage == "missing":
        manifest.unlink()
    else:
        data = json.loads(manifest.read_text())
        if damage == "format":
            data["format"] = 99
        else:
            data["architecture"]["d_model"] = 64
        manifest.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=r"policy\.(safetensors|json)"):
        load_policy(tmp_path)
