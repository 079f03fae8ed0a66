"""The truncated importance weight: against loops, by enumeration of every plan of a table policy, and at its edges."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from oracles.loss_loops import correction, loop_loss
from oracles.tabular import CausalTable, all_outcomes
from torch import Tensor

from rlhf_drive.errors import ConfigError
from rlhf_drive.objectives import (
    IMPORTANCE_SAMPLING_LEVELS,
    LOSS_TYPES,
    Denominators,
    LossInputs,
    LossOutputs,
    ObjectiveSettings,
    count_denominators,
    importance_correction,
    make_objective,
    merge_metrics,
)

N, T, G = 8, 6, 4
STEP_OF = torch.tensor([0, 0, 0, 1, 1, 2])
CAP = 1.3
PAIRS = [
    (loss_type, level)
    for loss_type, level in itertools.product(LOSS_TYPES, IMPORTANCE_SAMPLING_LEVELS)
    if loss_type != "wll" and (loss_type != "gmpo" or level == "sequence")
]
"""Every objective that weighs, at each level it has."""


def _batch(seed: int = 0, **changes: Any) -> LossInputs:
    g = torch.Generator().manual_seed(seed)
    old = -2 * torch.rand(N, T, generator=g, dtype=torch.float64)
    fields: dict[str, Any] = {
        "logp": (old + 0.35 * torch.randn(N, T, generator=g, dtype=torch.float64)).requires_grad_(),
        "old_logp": old,
        "ref_logp": old + 0.3 * torch.randn(N, T, generator=g, dtype=torch.float64),
        "advantages": torch.randn(N, generator=g, dtype=torch.float64),
        "mask": torch.rand(N, T, generator=g) > 0.25,
        "rows": torch.tensor([True, True, False, True, True, True, True, False]),
        "group_size": G,
        "step_of": STEP_OF,
        "entropy": torch.rand(N, T, generator=g, dtype=torch.float64).requires_grad_(),
        "behaviour_logp": old + 0.25 * torch.randn(N, T, generator=g, dtype=torch.float64),
    }
    return LossInputs(**{**fields, **changes})


def _settings(loss_type: str, level: str, **changes: Any) -> ObjectiveSettings:
    high = {"cispo": 1.1, "gmpo": 0.25}.get(loss_type, 0.28)
    temperatures = {"sapo_temperature_pos": 1.5, "sapo_temperature_neg": 2.5}
    values: dict[str, Any] = {**temperatures, "epsilon_high": high, "importance_sampling_cap": CAP, **changes}
    return ObjectiveSettings(loss_type, level, 0.2, **values)


def _counts(inputs: LossInputs) -> Denominators:
    return count_denominators(inputs.mask, inputs.rows, max_length=T + 2)


def _run(settings: ObjectiveSettings, inputs: LossInputs) -> LossOutputs:
    return make_objective(settings)(inputs, _counts(inputs))


def _gradients(loss: Tensor, *wanted: Tensor | None) -> tuple[Tensor, ...]:
    tensors = [tensor for tensor in wanted if tensor is not None]
    return torch.autograd.grad(loss, tensors, materialize_grads=True, retain_graph=True)


@pytest.mark.parametrize(("loss_type", "level"), PAIRS)
def test_loss_and_gradient_equal_the_loops(loss_type: str, level: str) -> None:
    for seed, changes in enumerate(
        ({}, {"beta": 0.3, "entropy_coef": 0.1}, {"beta": 0.3, "use_bias_correction_kl": True})
    ):
        inputs = _batch(seed)
        settings = _settings(loss_type, level, **changes)
        loss, wanted = _run(settings, inputs).loss, loop_loss(inputs, settings, T + 2)
        assert loss.item() == pytest.approx(wanted.item(), abs=1e-12), changes
        both = (inputs.logp, inputs.entropy)
        for found, expected in zip(_gradients(loss, *both), _gradients(wanted, *both), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        plain = _run(replace(settings, importance_sampling_cap=0.0), inputs).loss
        difference = _gradients(loss, *both)[0] - _gradients(plain, *both)[0]
        assert difference.abs().max() > 1e-3


@pytest.mark.parametrize(("loss_type", "level"), PAIRS)
def test_samples_of_the_old_policy_itself_change_no_bit(loss_type: str, level: str) -> None:
    inputs = _batch(3)
    settings = _settings(loss_type, level, beta=0.2, entropy_coef=0.1)
    assert inputs.entropy is not None
    own = replace(inputs, behaviour_logp=inputs.old_logp.clone())
    plain, weighed = _run(settings, replace(inputs, behaviour_logp=None)), _run(settings, own)
    assert weighed.loss.item() == plain.loss.item()
    for found, wanted in zip(
        _gradients(weighed.loss, inputs.logp, inputs.entropy),
        _gradients(plain.loss, inputs.logp, inputs.entropy),
        strict=True,
    ):
        assert torch.equal(found, wanted)
    added = {name: weighed.metrics[name].item() for name in set(weighed.metrics) - set(plain.metrics)}
    assert added.pop("correction/capped_frac") == 0.0
    assert added == pytest.approx(
        dict.fromkeys(("correction/mean", "correction/min", "correction/max"), 1.0), abs=1e-12
    )
    for name, value in plain.metrics.items():
        assert torch.equal(value, weighed.metrics[name]), name


def test_a_cap_of_zero_weighs_nothing_and_says_nothing() -> None:
    settings = _settings("grpo", "token", importance_sampling_cap=0.0)
    plain, given = _run(settings, _batch(behaviour_logp=None)), _run(settings, _batch())
    assert given.loss.item() == plain.loss.item()
    assert given.metrics.keys() == plain.metrics.keys()


@pytest.mark.parametrize(("loss_type", "level"), PAIRS)
def test_no_gradient_flows_through_the_weight(loss_type: str, level: str) -> None:
    """Seen from the behaviour policy the loss is a constant; from the old one it is the ratio's denominator only."""
    inputs = _batch(4)
    assert inputs.behaviour_logp is not None
    behaviour, old = inputs.behaviour_logp.clone().requires_grad_(), inputs.old_logp.clone().requires_grad_()
    loss = _run(_settings(loss_type, level), replace(inputs, behaviour_logp=behaviour, old_logp=old)).loss
    by_behaviour, by_old, by_live = _gradients(loss, behaviour, old, inputs.logp)
    assert by_behaviour.abs().max().item() == 0.0
    if loss_type != "cispo":  # whose ratio is a constant too
        torch.testing.assert_close(by_old, -by_live, rtol=0, atol=1e-12)
    assert by_live.abs().max().item() > 1e-3


@pytest.mark.parametrize("level", IMPORTANCE_SAMPLING_LEVELS)
def test_weights_equal_products_of_probabilities_and_are_bounded_from_above_only(level: str) -> None:
    inputs = _batch(5)
    weight = importance_correction(inputs, level, CAP).expand(N, T)  # type: ignore[arg-type]
    settings = _settings("grpo", level)
    found = []
    for i in range(N):
        slots = [j for j in range(T) if inputs.mask[i, j]]
        if inputs.rows is not None and inputs.rows[i]:
            for j in slots:
                assert weight[i, j].item() == pytest.approx(correction(inputs, settings, i, j, slots), abs=1e-12)
                found.append(weight[i, j].item())
    assert max(found) == CAP
    assert min(found) < 1 / CAP - 0.05
    assert importance_correction(replace(inputs, behaviour_logp=None), level, CAP).eq(1).all()  # type: ignore[arg-type]


def test_extreme_log_probabilities_give_the_cap_or_nothing() -> None:
    """e^2000 is beyond floating point, and e^-2000 below it; what is not scored or not learned from is not read."""
    nan = math.nan
    behaviour = torch.tensor([[-2000.0, -1.0], [0.0, -1.0], [-1.0, nan], [nan, nan]], dtype=torch.float64)
    old = torch.tensor([[0.0, -1.0], [-2000.0, -1.0], [-0.5, nan], [nan, nan]], dtype=torch.float64)
    mask = torch.tensor([[True, True], [True, True], [True, False], [True, True]])
    rows = torch.tensor([True, True, True, False])
    logp = old.nan_to_num().clone().requires_grad_()
    inputs = LossInputs(logp, old, None, torch.ones(4), mask, rows, behaviour_logp=behaviour)
    assert importance_correction(inputs, "sequence", 2.0).flatten().tolist() == [2.0, 0.0, math.exp(0.5), 1.0]
    out = make_objective(_settings("grpo", "sequence", importance_sampling_cap=2.0))(inputs, _counts(inputs))
    assert out.loss.item() == pytest.approx(-(2 + 0 + math.exp(0.5)) / 3, abs=1e-12)
    assert torch.autograd.grad(out.loss, logp)[0].isfinite().all()


LENGTH, VOCAB = 3, 3
OUTCOMES = all_outcomes(LENGTH, VOCAB)


def _logps(policy: CausalTable) -> Tensor:
    """``[V**L, L]`` log-probability of every token of every plan."""
    picked = []
    for position in range(LENGTH):
        before = torch.where(torch.arange(LENGTH) < position, OUTCOMES, VOCAB)
        where = torch.zeros_like(OUTCOMES, dtype=torch.bool)
        where[:, position] = True
        logits = policy.action_logits(before, torch.zeros(len(OUTCOMES)), torch.tensor([0]), where)
        picked.append(logits.log_softmax(-1).gather(1, OUTCOMES[:, position, None]).squeeze(1))
    return torch.stack(picked, 1)


def _tables(distance: float = 1.0) -> tuple[CausalTable, CausalTable, Tensor]:
    """A policy, an older one `distance` away from it, and the return of each plan."""
    old, behaviour = CausalTable(1, LENGTH, VOCAB, seed=0), CausalTable(1, LENGTH, VOCAB, seed=1)
    with torch.no_grad():
        behaviour.table.copy_(old.table + distance * behaviour.table)
    rewards = torch.rand(len(OUTCOMES), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return old, behaviour, rewards


def _expected_gradient(
    old: CausalTable,
    behaviour: CausalTable,
    rewards: Tensor,
    settings: ObjectiveSettings,
    step_of: Tensor | None = None,
) -> Tensor:
    """Of the loss, over every plan that the behaviour policy can draw, before the first update.

    Loss and gradient are proportional to the advantage: a row's probability, times the rows, is a factor on it.
    """
    logp, drawn = _logps(old), _logps(behaviour).detach()
    chance = drawn.sum(1).exp()
    assert chance.sum().item() == pytest.approx(1.0, abs=1e-12)
    inputs = LossInputs(
        logp, logp.detach(), None, len(chance) * chance * rewards, torch.ones_like(logp, dtype=torch.bool),
        step_of=step_of, behaviour_logp=drawn,
    )  # fmt: skip
    out = make_objective(settings)(inputs, count_denominators(inputs.mask, max_length=LENGTH))
    return torch.autograd.grad(out.loss, old.table)[0]


def _policy_gradient(old: CausalTable, rewards: Tensor) -> Tensor:
    return torch.autograd.grad((_logps(old).sum(1).exp() * rewards).sum(), old.table)[0]


@pytest.mark.parametrize(
    ("loss_type", "level", "scale"),
    [
        ("grpo", "sequence", LENGTH),
        ("grpo", "sequence_token", LENGTH),
        ("luspo", "sequence", 1),  # its sum over tokens makes the mean log-probability a sum
        ("dr_grpo", "sequence", LENGTH),
        ("cispo", "sequence", LENGTH),
        ("sapo", "sequence", LENGTH),
        ("gmpo", "sequence", LENGTH),
        ("grpo", "step", LENGTH),  # all tokens in one step
    ],
)
def test_older_samples_give_the_policy_gradient_without_bias(loss_type: str, level: str, scale: int) -> None:
    """Of ``E_old[R]``, over `scale`: without a cap, and not without the weight."""
    old, behaviour, rewards = _tables()
    settings = _settings(loss_type, level, importance_sampling_cap=math.inf, epsilon_high=1.1)
    wanted = -_policy_gradient(old, rewards) / scale
    found = _expected_gradient(old, behaviour, rewards, settings)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    for cap in (0.0, 1.5):
        biased = _expected_gradient(old, behaviour, rewards, replace(settings, importance_sampling_cap=cap))
        assert (biased - wanted).norm() > 0.05 * wanted.norm(), cap


def test_a_group_mean_is_a_baseline_for_older_samples_too() -> None:
    """Every pair of plans: the expectation of the weighed loss's gradient is (1 - 1/G) that of the policy gradient."""
    old, behaviour, rewards = _tables()
    logp, drawn = _logps(old), _logps(behaviour).detach()
    pairs = torch.cartesian_prod(torch.arange(len(rewards)), torch.arange(len(rewards)))
    chance = drawn.sum(1).exp()[pairs].prod(1)
    groups = rewards[pairs]
    advantages = (groups - groups.mean(1, keepdim=True)) * chance[:, None] * len(pairs)
    rows = pairs.flatten()
    inputs = LossInputs(
        logp[rows], logp[rows].detach(), None, advantages.flatten(), torch.ones(len(rows), LENGTH, dtype=torch.bool),
        group_size=2, behaviour_logp=drawn[rows],
    )  # fmt: skip
    objective = make_objective(_settings("grpo", "sequence", importance_sampling_cap=math.inf))
    loss = objective(inputs, count_denominators(inputs.mask, max_length=LENGTH)).loss
    wanted = -_policy_gradient(old, rewards) / LENGTH * (1 - 1 / 2)
    torch.testing.assert_close(torch.autograd.grad(loss, old.table)[0], wanted, rtol=0, atol=1e-12)


def test_weights_of_tokens_give_one_step_of_improvement_of_the_older_policy() -> None:
    """``sum_t E_{s ~ b} sum_a grad o(a | s) Q_b(s, a)``, spelled out over prefixes."""
    old, behaviour, rewards = _tables()
    logp, drawn = _logps(old), _logps(behaviour).detach()
    total = torch.zeros((), dtype=torch.float64)
    value = dict(zip(map(tuple, OUTCOMES.tolist()), rewards.tolist(), strict=True))

    def rows_from(prefix: tuple[int, ...]) -> Tensor:
        return OUTCOMES[:, : len(prefix)].eq(torch.tensor(prefix, dtype=torch.long)).all(1).nonzero().flatten()

    for position in range(LENGTH):
        for prefix in itertools.product(range(VOCAB), repeat=position):
            reached = math.prod(drawn[rows_from(prefix)[0], t].exp().item() for t in range(position))
            for action in range(VOCAB):
                rows = rows_from((*prefix, action))
                tails = drawn[rows, position + 1 :].sum(1).exp()
                quality = sum(p * value[tuple(OUTCOMES[r].tolist())] for p, r in zip(tails.tolist(), rows, strict=True))
                total = total + reached * logp[rows[0], position].exp() * quality
    wanted = -torch.autograd.grad(total, old.table)[0] / LENGTH
    settings = _settings("grpo", "token", importance_sampling_cap=math.inf)
    torch.testing.assert_close(_expected_gradient(old, behaviour, rewards, settings), wanted, rtol=0, atol=1e-12)
    assert (wanted + _policy_gradient(old, rewards) / LENGTH).norm() > 0.05 * wanted.norm()
    by_step = _expected_gradient(old, behaviour, rewards, replace(settings, importance_sampling_level="step"))
    one_a_step = _expected_gradient(
        old, behaviour, rewards, replace(settings, importance_sampling_level="step"), torch.arange(LENGTH)
    )
    torch.testing.assert_close(one_a_step, wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(by_step, -_policy_gradient(old, rewards) / LENGTH, rtol=0, atol=1e-12)


def test_a_geometric_mean_as_weight_would_leave_most_of_the_bias() -> None:
    """(1 - 1/T) of it where the two are near each other: why the weight is the product, as the ratio is not."""
    old, behaviour, rewards = _tables(distance=0.01)
    logp, drawn = _logps(old).detach(), _logps(behaviour).detach()

    def value(weight: Callable[[Tensor], Tensor]) -> float:
        return float((drawn.sum(1).exp() * weight(logp - drawn) * rewards).sum())

    exact = float((logp.sum(1).exp() * rewards).sum())
    unweighed = value(lambda d: torch.ones(len(d))) - exact
    geometric = value(lambda d: d.mean(1).exp()) - exact
    assert abs(value(lambda d: d.sum(1).exp()) - exact) < 1e-12 < abs(unweighed)
    assert geometric / unweighed == pytest.approx(1 - 1 / LENGTH, abs=0.03)


def test_metrics_count_each_weight_once() -> None:
    """Tokens 2, 1/2, 1/2 | 1, 1 with steps {0}, {1, 2}; the cap is 1.5."""
    ratios = torch.tensor([[2.0, 0.5, 0.5], [1.0, 1.0, 9.0]], dtype=torch.float64)
    mask = torch.tensor([[True] * 3, [True, True, False]])
    zero = torch.zeros_like(ratios)
    inputs = LossInputs(
        zero.clone().requires_grad_(), zero, None, torch.ones(2), mask, step_of=torch.tensor([0, 1, 1]),
        behaviour_logp=-ratios.log(),
    )  # fmt: skip
    expected = {
        # mean, min, max, capped_frac
        "token": ((1.5 + 0.5 + 0.5 + 1 + 1) / 5, 0.5, 1.5, 1 / 5),
        "step": (((1.5 + 0.25) / 2 + 1) / 2, 0.25, 1.5, (1 / 2 + 0) / 2),
        "sequence": ((0.5 + 1) / 2, 0.5, 1.0, 0.0),
        "sequence_token": ((0.5 + 1) / 2, 0.5, 1.0, 0.0),
    }
    names = ("mean", "min", "max", "capped_frac")
    for level, values in expected.items():
        metrics = _run(_settings("grpo", level, importance_sampling_cap=1.5), inputs).metrics
        assert [metrics[f"correction/{name}"].item() for name in names] == pytest.approx(list(values), abs=1e-12), level


@pytest.mark.parametrize(("loss_type", "level"), [pair for pair in PAIRS if pair[0] != "bnpo"])
def test_micro_batches_add_up(loss_type: str, level: str) -> None:
    inputs, settings = _batch(6), _settings(loss_type, level, beta=0.1)
    whole = _run(settings, inputs)
    objective, parts = make_objective(settings), []
    for start in range(0, N, G):
        rows = slice(start, start + G)
        changes = {
            name: getattr(inputs, name)[rows]
            for name in ("logp", "old_logp", "ref_logp", "advantages", "mask", "rows", "entropy", "behaviour_logp")
        }
        parts.append(objective(replace(inputs, **changes), _counts(inputs)))
    assert sum(part.loss.item() for part in parts) == pytest.approx(whole.loss.item(), abs=1e-12)
    merged = merge_metrics([part.metrics for part in parts])
    assert merged == pytest.approx({name: value.item() for name, value in whole.metrics.items()}, abs=1e-6)
    assert merged["correction/capped_frac"] > 0


@pytest.mark.parametrize("level", ["token", "step"])
def test_drawn_steps_estimate_the_weighed_loss(level: str) -> None:
    """Two of three decode steps, weighed 3/2: the mean over every choice is the loss of all steps, and its metrics."""
    full = _batch(7)
    assert full.behaviour_logp is not None
    settings = _settings("grpo", level)
    whole = _run(settings, full)
    draws = []
    for left_out in range(3):
        drawn = STEP_OF.ne(left_out).expand(N, T)
        part = replace(
            full,
            behaviour_logp=torch.where(drawn, full.behaviour_logp, math.nan),
            weight=torch.where(drawn, 3 / 2, 0.0).double(),
        )
        draws.append(make_objective(settings)(part, _counts(full)))
    assert sum(draw.loss.item() for draw in draws) / 3 == pytest.approx(whole.loss.item(), abs=1e-12)
    for name in ("correction/mean", "correction/capped_frac"):
        assert sum(draw.metrics[name].item() for draw in draws) / 3 == pytest.approx(
            whole.metrics[name].item(), abs=1e-9
        )


def test_objectives_without_an_old_policy_refuse_to_weigh(tmp_path: Any) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from rlhf_drive.objectives import LossOutputs, importance_correction\n"
        "def reinforce(inputs, denominators):\n"
        "    weight = importance_correction(inputs, 'sequence', 1.3)\n"
        "    kept = inputs.mask & inputs.learned_rows()[:, None]\n"
        "    terms = inputs.advantages[:, None] * weight * inputs.logp\n"
        "    return LossOutputs(-(terms * kept).sum() / denominators.tokens, {})\n"
    )
    inputs = _batch()
    for loss_type, words in (("wll", "no old policy"), (f"{file}:reinforce", "importance_correction")):
        settings = ObjectiveSettings(loss_type, "sequence", importance_sampling_cap=CAP)
        with pytest.raises(ConfigError, match=rf"rl\.importance_sampling_cap = 1\.3: rl\.loss_type = .*{words}"):
            _run(settings, inputs)
        unweighed = _run(replace(settings, importance_sampling_cap=0.0), inputs)
        without = _run(settings, replace(inputs, behaviour_logp=None))
        assert math.isfinite(unweighed.loss.item())
        assert math.isfinite(without.loss.item())
    own = _gradients(unweighed.loss, inputs.logp)[0]
    on_policy = replace(inputs, logp=inputs.old_logp.clone().requires_grad_())
    wanted = _gradients(_run(_settings("dapo", "sequence_token"), on_policy).loss, on_policy.logp)[0]
    torch.testing.assert_close(own, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("cap", [-1.0, 0.5, math.nan])
def test_a_cap_below_the_weight_of_own_samples_is_refused(cap: float) -> None:
    with pytest.raises(ConfigError, match=r"rl\.importance_sampling_cap = .* must be at least 1"):
        make_objective(ObjectiveSettings(importance_sampling_cap=cap))
