"""Discrete flow: decoding against enumeration, the supervised loss, and a network that learns."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from oracles.tabular_flow import AllPaths, DenseFlow, TabularFlow, all_paths, distributions, end_masses
from oracles.tiny_policy import ARCHITECTURE, observation

from rlhf_drive.errors import ConfigError
from rlhf_drive.policies import Decoding, Policy, TrajectoryTokenizer, load_policy, save_policy
from rlhf_drive.policies.flow import DiscreteFlow, decode_times
from rlhf_drive.policies.numeric_path import NumericPath
from rlhf_drive.policies.processes import build_process
from rlhf_drive.policies.trace import DecodeTrace

TOKENIZER = TrajectoryTokenizer("displacements", -5.0, 15.0, 0.1)


@pytest.mark.parametrize("name", ["beta_scale", "beta_power", "distance_scale_m"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_options_must_be_positive_and_finite(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"process\.{name}.*{value}"):
        build_process("flow", {name: value}, TOKENIZER)


def test_options_rebuild_the_process() -> None:
    given = {"beta_scale": 2.0, "beta_power": 1.5, "distance_scale_m": 7.0}
    assert build_process("flow", given, TOKENIZER).options() == given
    assert build_process("flow", {}, TOKENIZER).options() == {
        "beta_scale": 3.0, "beta_power": 0.9, "distance_scale_m": 4.0,
    }  # fmt: skip
    with pytest.raises(ConfigError, match="gamma"):
        build_process("flow", {"gamma": 1.0}, TOKENIZER)


def test_first_step_can_jump() -> None:
    step = DiscreteFlow(TOKENIZER).steps(decode_times(8))[0]
    chance = -torch.expm1(-step.h * step.rate(torch.tensor([0, 100, 200]), torch.tensor([150, 150, 150])))
    # Far from the end point about half of the numbers jump at once; a solver with beta_rate 0 at t = 0 would give 0.
    assert 0.3 < chance[0].item() < 0.9
    assert (chance > 0.05).all()


# --- decoding -------------------------------------------------------------------------------------------------------


def decoding(steps: int, temperature: float = 1.0, top_k: int = 0) -> Decoding:
    return Decoding(steps, "all", temperature, top_k)


def sampled(policy: TabularFlow, rows: int, how: Decoding, seed: int = 0) -> DecodeTrace:
    shape = policy.process.uniforms_shape(policy.length, how)
    uniforms = torch.rand(rows, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return policy.process.sample(policy, torch.tensor([0]), uniforms, how)


@pytest.mark.parametrize("order", ["causal", "random", "confidence"])
def test_other_orders_are_refused(order: str) -> None:
    policy = TabularFlow(2, 3, seed=0)
    with pytest.raises(ConfigError, match=f"{order}.*'all'"):
        policy.process.check(2, Decoding(2, order, 1.0, 0))
    with pytest.raises(ConfigError, match="'all'"):
        policy.process.sample(policy, torch.tensor([0]), torch.rand(1, 7, 2), Decoding(2, order, 1.0, 0))
    policy.process.check(2, decoding(100))


def test_times_run_from_the_start_to_one_in_equal_steps() -> None:
    times = torch.cat([decode_times(5), torch.ones(1)])
    assert times[0].item() == pytest.approx(1e-3, rel=1e-6)
    assert times.diff().tolist() == pytest.approx([(1 - 1e-3) / 5] * 5, abs=1e-6)


def test_trace_holds_what_was_seen_and_drawn() -> None:
    policy = TabularFlow(2, 3, seed=1)
    trace = sampled(policy, 50, decoding(3))
    assert torch.equal(trace.tokens, trace.action[-1])
    assert bool(trace.scored.all())
    assert torch.equal(trace.time, decode_times(3))
    for k, n in itertools.product(range(3), range(50)):
        p = distributions(policy, trace.state[k, n], trace.time[k].item())
        drawn = p.gather(1, trace.action[k, n][:, None])[:, 0].log()
        torch.testing.assert_close(trace.logp[k, n].double(), drawn, rtol=0, atol=1e-6)


def outcome_masses(paths: AllPaths, policy: TabularFlow) -> torch.Tensor:
    """``[V ** L]`` probability of each plan, adding up all paths that end in it."""
    trace = paths.trace
    mass = paths.environment * end_masses(policy, trace)
    place = (trace.tokens * policy.vocab_size ** torch.arange(policy.length)).sum(-1)
    return torch.zeros(policy.vocab_size**policy.length, dtype=torch.float64).index_add(0, place, mass)


@pytest.mark.parametrize(
    ("length", "steps", "temperature", "top_k"), [(1, 3, 1.0, 0), (2, 2, 0.7, 0), (1, 3, 1.0, 2), (2, 1, 1.0, 0)]
)
def test_sampled_plans_have_the_enumerated_frequencies(length: int, steps: int, temperature: float, top_k: int) -> None:
    policy = TabularFlow(length, 3, seed=2)
    paths = all_paths(policy, decode_times(steps).tolist(), temperature=temperature, top_k=top_k)
    masses = outcome_masses(paths, policy)
    assert masses.sum().item() == pytest.approx(1.0, abs=1e-12)
    rows = 40_000
    trace = sampled(policy, rows, decoding(steps, temperature, top_k), seed=3)
    place = (trace.tokens * 3 ** torch.arange(length)).sum(-1)
    counts = torch.bincount(place, minlength=3**length).double()
    kept = masses > 0
    assert counts[~kept].sum() == 0
    chi_square = float(((counts - rows * masses).square() / (rows * masses))[kept].sum())
    # 99.9 % quantiles of chi-square with 2 and 8 degrees of freedom.
    assert chi_square < {1: 13.8, 2: 26.1}[length]


class KnownEnd(TabularFlow):
    """Sure of one end point from the start."""

    def __init__(self, end: int, vocab_size: int) -> None:
        super().__init__(1, vocab_size, seed=0)
        with torch.no_grad():
            self.table.zero_()
            self.table[..., end] = 1e4


@pytest.mark.parametrize("beta_scale", [0.7, 6.0])
def test_decoding_follows_the_path_where_the_end_is_known(beta_scale: float) -> None:
    """The marginals of the sampled states are p_t(x | x1) up to the solver's error, which shrinks with the step."""
    policy = KnownEnd(1, 7)
    policy.process.path = NumericPath(7, 0.5, beta_scale, 0.9, 2.0)
    dense, gaps = DenseFlow.of(policy.process), {}
    for steps in (8, 50):
        trace = sampled(policy, 10_000, decoding(steps))
        for share in (0.3, 0.6, 0.9):
            k = int(share * steps)
            frequency = torch.bincount(trace.state[k, :, 0], minlength=7).double() / 10_000
            gaps[steps, share] = float((frequency - dense.p(trace.time[k].item())[1]).abs().sum()) / 2
        assert bool((trace.tokens == 1).all())
    # 10,000 draws of 7 numbers alone stray by 0.01 on average; another beta would stray by more than 0.2.
    assert max(gaps[50, share] for share in (0.3, 0.6, 0.9)) < 0.035
    assert gaps[50, 0.6] < 0.5 * gaps[8, 0.6]
    wrong = DenseFlow(7, 0.5, 6.7 - beta_scale, 0.9, 2.0)
    assert float((wrong.p(0.6)[1] - dense.p(0.6)[1]).abs().sum()) / 2 > 0.2


def test_one_step_draws_the_plan_from_the_noise() -> None:
    policy = TabularFlow(2, 3, seed=4)
    trace = sampled(policy, 9000, decoding(1))
    assert trace.state.shape == (1, 9000, 2)
    noise = torch.bincount(trace.state[0] @ torch.tensor([1, 3]), minlength=9).double()
    assert float(((noise - 1000).square() / 1000).sum()) < 26.1


def test_greedy_end_points_are_modes() -> None:
    policy = TabularFlow(2, 3, seed=5)
    trace = sampled(policy, 20, decoding(2, temperature=0.0))
    for k, n in itertools.product(range(2), range(20)):
        p = distributions(policy, trace.state[k, n], trace.time[k].item())
        assert torch.equal(trace.action[k, n], p.argmax(-1))
    assert trace.logp.abs().sum() == 0


def test_a_plan_depends_on_its_own_numbers_alone() -> None:
    policy = TabularFlow(2, 5, seed=6)
    how = decoding(4)
    uniforms = torch.rand(30, *policy.process.uniforms_shape(2, how), generator=torch.Generator().manual_seed(1))
    whole = policy.process.sample(policy, torch.tensor([0]), uniforms, how)
    index = torch.tensor([17, 3, 29])
    part = policy.process.sample(policy, torch.tensor([0]), uniforms[index], how)
    again = policy.process.sample(policy, torch.tensor([0]), uniforms, how)
    for name in ("state", "action", "logp"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[:, index]), name
        assert torch.equal(getattr(again, name), getattr(whole, name)), name


def test_drawing_in_pieces_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = TabularFlow(2, 5, seed=6)
    whole = sampled(policy, 30, decoding(3))
    monkeypatch.setattr("rlhf_drive.policies.flow.DRAW_NUMBERS", 35)  # 7 rows of 5 numbers
    pieces = sampled(policy, 30, decoding(3))
    assert torch.equal(pieces.action, whole.action)
    assert torch.equal(pieces.logp, whole.logp)


# --- supervised loss and the network --------------------------------------------------------------------------------


def test_loss_is_the_cross_entropy_at_all_positions_of_noised_plans() -> None:
    policy = TabularFlow(2, 3, seed=7)
    count = 30_000
    tokens = torch.tensor([[2, 0]]).expand(count, 2)
    loss = policy.process.sft_loss(policy, tokens, torch.tensor([0]), "random", torch.Generator().manual_seed(0))
    grid = (torch.arange(100) + 0.5) / 100
    dense, expected = DenseFlow.of(policy.process), 0.0
    for t in grid.tolist():
        p = dense.p(t)
        for state in itertools.product(range(3), repeat=2):
            nll = -distributions(policy, torch.tensor(state), t).log()
            weight = float(p[2, state[0]] * p[0, state[1]])
            expected += weight * float(nll[0, 2] + nll[1, 0]) / 2 / len(grid)
    loss = loss.detach()
    error = float(loss.std()) / math.sqrt(count)
    assert loss.mean().item() == pytest.approx(expected, abs=4 * error)
    assert 4 * error < 0.03


def test_loss_does_not_look_at_the_order() -> None:
    policy = TabularFlow(2, 3, seed=7)
    tokens = torch.tensor([[2, 0], [1, 1]])
    losses = [
        policy.process.sft_loss(policy, tokens, torch.tensor([0]), order, torch.Generator().manual_seed(3))
        for order in ("random", "causal", "mixed")
    ]
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2])


@pytest.fixture(scope="module")
def network() -> Policy:
    torch.manual_seed(3)
    policy = Policy(ARCHITECTURE, TOKENIZER, "flow", {"beta_scale": 4.0})
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if name.startswith(("head", "decoder.time")):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return policy.eval()


def test_a_timed_policy_draws_its_other_weights_as_an_untimed_one() -> None:
    built = []
    for process in ("masked", "flow"):
        torch.manual_seed(11)
        built.append(Policy(ARCHITECTURE, TOKENIZER, process).state_dict())
    masked, flow = built
    extra = set(flow) - set(masked)
    assert {name.partition(".time.")[0] for name in extra} == {"decoder"}
    assert len(extra) == 4
    assert all(torch.equal(flow[name], value) for name, value in masked.items())


def test_the_network_is_told_the_time_row_by_row(network: Policy) -> None:
    context = network.encode([observation(0)])
    state = torch.randint(0, network.vocab_size, (1, 16), generator=torch.Generator().manual_seed(0)).expand(3, 16)
    logits = network.action_logits(state, torch.tensor([0.2, 0.2, 0.7]), context, torch.ones(3, 16).bool())
    rows = logits.view(3, 16, -1)
    assert torch.allclose(rows[0], rows[1], atol=1e-5)
    assert (rows[0] - rows[2]).abs().max() > 1e-2


def test_a_new_network_does_not_yet_heed_the_time() -> None:
    torch.manual_seed(0)
    fresh = Policy(ARCHITECTURE, TOKENIZER, "flow").eval()
    state = torch.zeros(2, 16, dtype=torch.long)
    logits = fresh.action_logits(state, torch.tensor([0.1, 0.9]), fresh.encode([observation(0)]), state == 0)
    assert torch.allclose(*logits.view(2, -1), atol=1e-6)


def test_network_samples_do_not_depend_on_batch_mates(network: Policy) -> None:
    scenes = [observation(0), observation(1, agents=2, lines=9)]
    how = decoding(4)
    shape = network.process.uniforms_shape(16, how)
    uniforms = torch.rand(6, *shape, generator=torch.Generator().manual_seed(2))
    together = network.process.sample(network, network.encode(scenes), uniforms, how)
    alone = network.process.sample(network, network.encode(scenes[1:]), uniforms[3:], how)
    assert torch.equal(together.action[:, 3:], alone.action)
    torch.testing.assert_close(together.logp[:, 3:], alone.logp, rtol=0, atol=1e-4)


def test_checkpoint_rebuilds_the_flow(network: Policy, tmp_path: object) -> None:
    save_policy(network, tmp_path)  # type: ignore[arg-type]
    back = load_policy(tmp_path).eval()  # type: ignore[arg-type]
    assert back.process.options() == {"beta_scale": 4.0, "beta_power": 0.9, "distance_scale_m": 4.0}
    how = decoding(3)
    uniforms = torch.rand(2, *back.process.uniforms_shape(16, how), generator=torch.Generator().manual_seed(0))
    traces = [p.process.sample(p, p.encode([observation(0)]), uniforms, how) for p in (network, back)]
    assert torch.equal(traces[0].action, traces[1].action)


def test_kept_routing_is_that_of_each_steps_pass(network: Policy) -> None:
    from rlhf_drive.policies.moe import RouterRecord

    context, how = network.encode([observation(0)]), decoding(3)
    uniforms = torch.rand(4, *network.process.uniforms_shape(16, how), generator=torch.Generator().manual_seed(0))
    trace = network.process.sample(network, context, uniforms, how, keep_experts=True)
    assert trace.experts is not None
    for k in range(3):
        record = RouterRecord()
        network.action_features(trace.state[k], trace.time[k].expand(4), context, trace.scored[k], record)
        assert torch.equal(trace.experts[k], record.choices())


def test_supervised_training_learns_plans_that_decoding_gives_back() -> None:
    torch.manual_seed(0)
    policy = Policy(ARCHITECTURE, TOKENIZER, "flow")
    scenes = [observation(seed) for seed in range(12)]
    generator = torch.Generator().manual_seed(0)
    anchor = torch.from_numpy(policy.tokenizer.quantise(np.stack([policy.features(s)["anchor"] for s in scenes])))
    plans = (anchor + torch.randint(-6, 7, (12, 1), generator=generator)).clamp(0, policy.vocab_size - 1)
    optimizer = torch.optim.AdamW(policy.parameters(), 3e-3)
    batch, losses = policy.batch(scenes), []
    for _ in range(60):
        loss = policy.process.sft_loss(
            policy, plans.repeat_interleave(2, dim=0), policy.encode(batch), "mixed", generator
        ).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-10:]) < 0.25 * losses[0]
    policy.eval()
    for steps in (1, 4):
        how = decoding(steps)
        uniforms = torch.rand(48, *policy.process.uniforms_shape(16, how), generator=generator)
        trace = policy.process.sample(policy, policy.encode(batch), uniforms, how)
        error = (trace.tokens - plans.repeat_interleave(4, dim=0)).abs().double().mean().item() * 0.1
        assert error < 0.1  # metres
