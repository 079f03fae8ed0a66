"""Every objective at every level against loops that spell it out, against its neighbours, and under any split."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.loss_loops import loop_loss
from torch import Tensor

from rlhf_drive.errors import ConfigError, DataError, PluginError
from rlhf_drive.objectives import (
    IMPORTANCE_SAMPLING_LEVELS,
    LOSS_TYPES,
    Denominators,
    LossInputs,
    LossOutputs,
    ObjectiveSettings,
    count_denominators,
    make_objective,
    merge_metrics,
)

NAN = float("nan")
N, T, G = 8, 6, 4
STEP_OF = torch.tensor([0, 0, 0, 1, 1, 2])
"""Three, two and one slots: a mean over steps is no mean over tokens."""


def _batch(seed: int = 0, *, ragged: bool = True, **changes: Any) -> LossInputs:
    g = torch.Generator().manual_seed(seed)
    old = -2 * torch.rand(N, T, generator=g, dtype=torch.float64)
    mask = torch.rand(N, T, generator=g) > 0.25 if ragged else torch.ones(N, T, dtype=torch.bool)
    fields: dict[str, Any] = {
        "logp": (old + 0.35 * torch.randn(N, T, generator=g, dtype=torch.float64)).requires_grad_(),
        "old_logp": old,
        "ref_logp": old + 0.3 * torch.randn(N, T, generator=g, dtype=torch.float64),
        "advantages": torch.randn(N, generator=g, dtype=torch.float64),
        "mask": mask,
        "rows": torch.tensor([True, True, False, True, True, True, True, False]) if ragged else None,
        "group_size": G,
        "step_of": STEP_OF,
        "entropy": torch.rand(N, T, generator=g, dtype=torch.float64).requires_grad_(),
    }
    return LossInputs(**{**fields, **changes})


def _settings(loss_type: str, level: str, **changes: Any) -> ObjectiveSettings:
    high = {"cispo": 1.1, "gmpo": 0.25}.get(loss_type, 0.28)
    level = "sequence" if loss_type == "gmpo" else level
    values: dict[str, Any] = {"sapo_temperature_pos": 1.5, "sapo_temperature_neg": 2.5, "epsilon_high": high, **changes}
    return ObjectiveSettings(loss_type, level, 0.2, **values)


def _counts(inputs: LossInputs, micro_batches: int = 1) -> Denominators:
    return count_denominators(inputs.mask, inputs.rows, max_length=T + 2, micro_batches=micro_batches)


def _gradients(loss: Tensor, inputs: LossInputs) -> tuple[Tensor, Tensor]:
    assert inputs.entropy is not None
    wanted = (inputs.logp, inputs.entropy)
    logp, entropy = torch.autograd.grad(loss, wanted, materialize_grads=True, retain_graph=True)
    return logp, entropy


def _run(settings: ObjectiveSettings, inputs: LossInputs) -> tuple[Tensor, Tensor]:
    loss = make_objective(settings)(inputs, _counts(inputs)).loss
    return loss, _gradients(loss, inputs)[0]


PAIRS = [
    (loss_type, level)
    for loss_type, level in itertools.product(LOSS_TYPES, IMPORTANCE_SAMPLING_LEVELS)
    if loss_type not in ("gmpo", "wll") or level == "sequence"
]
"""Every objective at each level it has; wll has no ratio."""


@pytest.mark.parametrize(("loss_type", "level"), PAIRS)
def test_loss_and_gradient_equal_the_loops(loss_type: str, level: str) -> None:
    options: list[dict[str, Any]] = [
        {},
        {"beta": 0.3, "kl_estimator": "k1"},
        {"beta": 0.3, "kl_estimator": "k2", "entropy_coef": 0.1},
        {"beta": 0.3, "kl_estimator": "k3"},
        {"beta": 0.3, "kl_estimator": "k2", "use_bias_correction_kl": True},
        {"beta": 0.3, "kl_estimator": "k3", "use_bias_correction_kl": True, "entropy_coef": 0.1},
    ]
    if loss_type == "wll":
        options = options[:4]  # the loops have no level for it
    if loss_type in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo"):
        options.append({"delta": 1.4})
    for seed, changes in enumerate(options):
        inputs = _batch(seed)
        if "delta" in changes:  # it bounds ratios of bad rows, raised here at all levels
            raised = (inputs.logp.detach() + 0.4).requires_grad_()
            inputs = replace(inputs, logp=raised, advantages=-inputs.advantages.abs())
        settings = _settings(loss_type, level, **changes)
        loss, wanted = make_objective(settings)(inputs, _counts(inputs)).loss, loop_loss(inputs, settings, T + 2)
        assert loss.item() == pytest.approx(wanted.item(), abs=1e-12), changes
        for found, expected in zip(_gradients(loss, inputs), _gradients(wanted, inputs), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        assert _gradients(loss, inputs)[0].abs().max() > 1e-3


@pytest.mark.parametrize("level", IMPORTANCE_SAMPLING_LEVELS)
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "cispo", "sapo"])
def test_advantages_per_token_equal_the_loops(loss_type: str, level: str) -> None:
    inputs = _batch(3)
    inputs = replace(inputs, advantages=torch.randn(N, T, generator=torch.Generator().manual_seed(1)).double())
    settings = _settings(loss_type, level)
    loss, gradient = _run(settings, inputs)
    wanted = loop_loss(inputs, settings, T + 2)
    assert loss.item() == pytest.approx(wanted.item(), abs=1e-12)
    torch.testing.assert_close(gradient, _gradients(wanted, inputs)[0], rtol=0, atol=1e-12)


def test_every_objective_differs_from_every_other() -> None:
    """In its gradient, not only by a factor; but for GSPO-token, which is GSPO where a row has one advantage."""
    inputs = _batch(1, rows=torch.tensor([True] * 7 + [False]))
    gradients = {}
    for pair in PAIRS:
        gradient = _run(_settings(*pair), inputs)[1]
        gradients[pair] = gradient / gradient.norm()
    for (one, first), (other, second) in itertools.combinations(gradients.items(), 2):
        distance = (first - second).norm().item()
        aggregated_alike = {one[0], other[0]} <= {"bnpo", "dapo", "dr_grpo", "luspo"} and one[0] != other[0]
        levels = {one[1], other[1]}
        if levels <= {"sequence", "sequence_token"} and (one[0] == other[0] or aggregated_alike):
            assert distance < 1e-12, (one, other)
        elif aggregated_alike and len(levels) == 1:
            assert distance < 1e-12, (one, other)  # a factor: the scale tells them apart, below
        else:
            assert distance > 1e-3, (one, other)


def test_aggregations_of_the_same_terms_differ_in_scale() -> None:
    inputs = _batch(1)
    losses = {name: _run(_settings(name, "token"), inputs)[0].item() for name in ("dapo", "dr_grpo", "luspo")}
    counts = _counts(inputs)
    assert losses["luspo"] / losses["dapo"] == pytest.approx(counts.tokens / counts.sequences, rel=1e-12)
    assert losses["luspo"] / losses["dr_grpo"] == pytest.approx(T + 2, rel=1e-12)
    assert counts.tokens / counts.sequences not in (1, T + 2)


def test_gspo_token_is_gspo_until_tokens_have_advantages_of_their_own() -> None:
    inputs = _batch(2)
    whole, by_token = (_run(_settings("grpo", level), inputs) for level in ("sequence", "sequence_token"))
    torch.testing.assert_close(by_token[0], whole[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(by_token[1], whole[1], rtol=0, atol=1e-12)
    # The clip looks at the sequence, unlike GRPO's: a token far out is not clipped while its sequence is within.
    token = _run(_settings("grpo", "token"), inputs)[1]
    clipped = (token == 0) & inputs.mask & (inputs.rows[:, None] if inputs.rows is not None else True)
    assert (by_token[1][clipped] != 0).any()
    advantages = torch.zeros(N, T, dtype=torch.float64)
    advantages[:, 0] = 1.0
    own = replace(_batch(2, ragged=False), advantages=advantages)
    assert _run(_settings("grpo", "sequence"), own)[1][:, 1:].abs().max() > 1e-3
    assert _run(_settings("grpo", "sequence_token"), own)[1][:, 1:].abs().max() == 0.0


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("level", IMPORTANCE_SAMPLING_LEVELS)
def test_no_advantage_no_gradient(loss_type: str, level: str) -> None:
    inputs = replace(_batch(4), advantages=torch.zeros(N, dtype=torch.float64))
    settings = _settings(loss_type, level)
    loss, gradient = _run(settings, inputs)
    assert loss.item() == 0.0
    assert gradient.abs().max().item() == 0.0
    assert _run(replace(settings, beta=0.1), inputs)[1].abs().max().item() > 1e-4


@pytest.mark.parametrize(("loss_type", "level"), PAIRS)
def test_any_split_into_whole_groups_gives_the_same(loss_type: str, level: str) -> None:
    inputs = _batch(5)
    settings = _settings(loss_type, level, beta=0.1, entropy_coef=0.05)
    objective = make_objective(settings)
    whole = objective(inputs, _counts(inputs))
    parts = [objective(_rows(inputs, slice(s, s + G)), _counts(inputs, 2)) for s in (0, G)]
    split = parts[0].loss + parts[1].loss
    if loss_type == "bnpo":
        assert abs(split.item() - whole.loss.item()) > 1e-3  # by its definition, which is TRL's
        return
    assert split.item() == pytest.approx(whole.loss.item(), abs=1e-12)
    for found, expected in zip(_gradients(split, inputs), _gradients(whole.loss, inputs), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    merged = merge_metrics([part.metrics for part in parts])
    assert merged == pytest.approx({name: value.item() for name, value in whole.metrics.items()}, abs=1e-6)


def _rows(inputs: LossInputs, rows: slice) -> LossInputs:
    names = ("logp", "old_logp", "ref_logp", "advantages", "mask", "rows", "entropy")
    return replace(inputs, **{name: getattr(inputs, name)[rows] for name in names})


@pytest.mark.parametrize("level", ["token", "step"])
@pytest.mark.parametrize("loss_type", [name for name in LOSS_TYPES if name != "gmpo"])
def test_drawn_steps_are_unbiased(loss_type: str, level: str) -> None:
    """The mean over all ways to draw 2 of 3 decode steps is the loss of all steps; so are its gradient and metrics."""
    full = _batch(6)
    objective = make_objective(_settings(loss_type, level, beta=0.1, entropy_coef=0.05))
    whole = objective(full, _counts(full))
    draws = []
    for chosen in itertools.combinations(range(3), 2):
        drawn = torch.isin(STEP_OF, torch.tensor(chosen)).expand(N, T)
        garbage = torch.where(drawn, full.logp, NAN)
        part = replace(full, logp=garbage, weight=torch.where(drawn, 3 / 2, 0.0).double())
        draws.append(objective(part, _counts(full)))
    mean = torch.stack([draw.loss for draw in draws]).mean()
    assert mean.item() == pytest.approx(whole.loss.item(), abs=1e-12)
    for found, expected in zip(_gradients(mean, full), _gradients(whole.loss, full), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for name in whole.metrics:
        if not name.endswith(("/min", "/max")):
            values = [draw.metrics[name].item() for draw in draws]
            assert sum(values) / 3 == pytest.approx(whole.metrics[name].item(), abs=1e-12), name
    assert max(draw.loss.item() for draw in draws) - min(draw.loss.item() for draw in draws) > 1e-4


@pytest.mark.parametrize(("loss_type", "level"), [("grpo", "sequence"), ("cispo", "sequence_token"), ("gmpo", "")])
def test_drawn_steps_are_refused_where_the_whole_sequence_is_needed(loss_type: str, level: str) -> None:
    inputs = _batch()
    inputs = replace(inputs, weight=torch.ones_like(inputs.old_logp))
    with pytest.raises(ConfigError, match=r"rl\.likelihood_steps.*'token' or 'step'"):
        make_objective(_settings(loss_type, level))(inputs, _counts(inputs))


def test_ratio_metrics_count_each_ratio_once() -> None:
    """Tokens 1.5 | 0.5 0.5 | 1.5 in two steps; sequence exp(mean log); the second row has not moved."""
    moved = torch.tensor([[1.5, 0.5, 0.5, 1.5], [1.0, 1.0, 1.0, 1.0]], dtype=torch.float64).log()
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    step_of = torch.tensor([0, 1, 1, 1])
    inputs = LossInputs(
        moved.requires_grad_(), torch.zeros_like(moved), None, torch.ones(2), mask, step_of=step_of, group_size=2
    )
    second = (0.5 * 0.5 * 1.5) ** (1 / 3)
    sequence = (1.5 * 0.5 * 0.5 * 1.5) ** (1 / 4)
    expected = {
        # mean, min, max, clipped above 1.28 (A > 0)
        "token": ((1.5 + 0.5 + 0.5 + 1.5 + 1 + 1) / 6, 0.5, 1.5, 2 / 6),
        "step": (((1.5 + second) / 2 + 1) / 2, second, 1.5, (1 / 2 + 0) / 2),
        "sequence": ((sequence + 1) / 2, sequence, 1.0, 0.0),
        "sequence_token": ((sequence + 1) / 2, sequence, 1.0, 0.0),
    }
    for level, (mean, low, high, clipped) in expected.items():
        metrics = make_objective(_settings("grpo", level))(inputs, _counts(inputs)).metrics
        found = [metrics[f"ratio/{name}"].item() for name in ("mean", "min", "max", "clip_high_frac", "clip_frac")]
        assert found == pytest.approx([mean, low, high, clipped, clipped], abs=1e-12), level
    # GMPO clips tokens, in log space: log 1.5 = 0.405 > 0.25.
    metrics = make_objective(_settings("gmpo", "sequence"))(inputs, _counts(inputs)).metrics
    assert metrics["ratio/clip_high_frac"].item() == pytest.approx(2 / 6, abs=1e-12)
    below = replace(inputs, advantages=-torch.ones(2))
    metrics = make_objective(_settings("gmpo", "sequence"))(below, _counts(inputs)).metrics
    assert metrics["ratio/clip_low_frac"].item() == pytest.approx(2 / 6, abs=1e-12)  # log 0.5 < -0.2
    assert make_objective(_settings("sapo", "token"))(inputs, _counts(inputs)).metrics["ratio/clip_frac"].item() == 0.0


def test_gmpo_counts_what_is_clipped_in_log_space() -> None:
    """1.27 lies between 1.25 and exp(.25), 0.81 between 0.8 and exp(-.2): only the latter is beyond its bound."""
    for ratio, advantage, clipped in ((1.27, 1.0, 0.0), (1.29, 1.0, 1.0), (0.81, -1.0, 1.0), (0.82, -1.0, 0.0)):
        logp = torch.full((1, 2), ratio, dtype=torch.float64).log().requires_grad_()
        inputs = LossInputs(
            logp, torch.zeros(1, 2), None, torch.tensor([advantage]), torch.ones(1, 2, dtype=torch.bool)
        )
        out = make_objective(_settings("gmpo", "sequence"))(inputs, _counts(inputs))
        assert out.metrics["ratio/clip_frac"].item() == clipped
        (gradient,) = torch.autograd.grad(out.loss, logp)
        assert (gradient == 0).all().item() == bool(clipped)


def test_shares_of_the_loss_are_reported_apart() -> None:
    inputs = _batch(7)
    plain = make_objective(_settings("dapo", "token"))(inputs, _counts(inputs))
    out = make_objective(_settings("dapo", "token", beta=0.2, entropy_coef=0.5))(inputs, _counts(inputs))
    assert inputs.entropy is not None
    assert inputs.rows is not None
    counted = inputs.mask & inputs.rows[:, None]
    entropy = inputs.entropy[counted].mean().item()
    assert out.metrics["entropy/mean"].item() == pytest.approx(entropy, abs=1e-12)
    assert out.metrics["loss/policy"].item() == pytest.approx(plain.loss.item(), abs=1e-12)
    assert out.metrics["loss/kl"].item() == pytest.approx(0.2 * out.metrics["kl/ref_k3"].item(), abs=1e-12)
    share = out.metrics["loss/policy"] + out.metrics["loss/kl"] - 0.5 * entropy
    assert out.loss.item() == pytest.approx(share.item(), abs=1e-12)
    assert "loss/kl" not in plain.metrics


def test_a_divergence_in_the_reward_is_not_in_the_loss() -> None:
    inputs = _batch(7)
    plain, rewarded = (
        _run(_settings("grpo", "token", **changes), inputs) for changes in ({}, {"beta": 0.5, "kl_in": "reward"})
    )
    torch.testing.assert_close(rewarded[1], plain[1], rtol=0, atol=0)


def test_a_function_of_ones_own_replaces_the_policy_term(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "import torch\n"
        "from rlhf_drive.objectives import LossOutputs\n"
        "def reinforce(inputs, denominators):\n"
        "    kept = inputs.mask & inputs.learned_rows()[:, None]\n"
        "    terms = torch.where(kept, inputs.advantages[:, None] * inputs.logp, 0.0)\n"
        "    loss = -terms.sum() / denominators.tokens\n"
        "    return LossOutputs(loss, {'own/loss': loss.detach()})\n"
        "def loud(inputs, denominators):\n"
        "    return LossOutputs(inputs.logp.sum(), {'reward/total': inputs.logp.sum()})\n"
        "def number(inputs, denominators):\n"
        "    return 0.0\n"
        "def one(inputs):\n"
        "    return inputs\n"
    )
    inputs = _batch(8)
    settings = ObjectiveSettings(f"{file}:reinforce", "token", beta=0.1, entropy_coef=0.2)
    out = make_objective(settings)(inputs, _counts(inputs))
    # On-policy GRPO's gradient is REINFORCE's: dapo's aggregation at ratio 1.
    on_policy = replace(inputs, old_logp=inputs.logp.detach())
    wanted = _run(_settings("dapo", "token"), on_policy)[1]
    kl = make_objective(_settings("grpo", "token", beta=0.1))(
        replace(inputs, advantages=torch.zeros(N)), _counts(inputs)
    )
    rest = _gradients(out.loss, inputs)[0] - _gradients(kl.loss, inputs)[0]
    torch.testing.assert_close(rest, wanted, rtol=0, atol=1e-12)
    assert out.metrics["own/loss"].item() == out.metrics["loss/policy"].item()
    assert {"ratio/mean", "kl/ref_k3", "entropy/mean", "loss/kl"} <= set(out.metrics)
    with pytest.raises(PluginError, match=r"returned the metrics reward/total; names of one's own begin with 'own/'"):
        make_objective(replace(settings, loss_type=f"{file}:loud"))(inputs, _counts(inputs))
    with pytest.raises(PluginError, match="must return LossOutputs"):
        make_objective(replace(settings, loss_type=f"{file}:number"))(inputs, _counts(inputs))
    with pytest.raises(ConfigError, match=r"rl\.loss_type.*called with \(inputs, denominators\)"):
        make_objective(replace(settings, loss_type=f"{file}:one"))
    with pytest.raises(PluginError, match="no function 'reinforc'"):
        make_objective(replace(settings, loss_type=f"{file}:reinforc"))


def test_objectives_of_whole_rows_and_groups_refuse_parts() -> None:
    inputs = _batch(9)
    by_token = replace(inputs, advantages=torch.ones(N, T, dtype=torch.float64))
    for loss_type in ("gmpo", "wll"):
        with pytest.raises(DataError, match=rf"{loss_type} .*\[8, 6\]"):
            make_objective(_settings(loss_type, "sequence"))(by_token, _counts(inputs))
    with pytest.raises(DataError, match="whole groups"):
        make_objective(_settings("wll", "token"))(_rows(inputs, slice(0, 3)), _counts(inputs))


def test_a_small_weighted_likelihood_is_twice_the_policy_gradient() -> None:
    """softmax(A) - softmax(-A) = 2 (A - mean A) / n + O(A^3)."""
    inputs = _batch(10, ragged=False)
    advantages = inputs.advantages.view(-1, G)
    small = 1e-4 * (advantages - advantages.mean(1, keepdim=True)).view(-1)
    on_policy = replace(inputs, old_logp=inputs.logp.detach(), advantages=small)
    wanted = 2 * _run(_settings("grpo", "token"), on_policy)[1]
    torch.testing.assert_close(_run(_settings("wll", "token"), on_policy)[1], wanted, rtol=1e-6, atol=1e-14)


def test_missing_inputs_are_named() -> None:
    inputs = _batch()
    with pytest.raises(ConfigError, match=r"rl\.entropy_coef = 0\.1"):
        make_objective(_settings("grpo", "token", entropy_coef=0.1))(replace(inputs, entropy=None), _counts(inputs))
    with pytest.raises(ConfigError, match=r"rl\.beta = 0\.1"):
        make_objective(_settings("grpo", "token", beta=0.1))(replace(inputs, ref_logp=None), _counts(inputs))
    with pytest.raises(DataError, match=r"step_of \[5\]"):
        replace(inputs, step_of=STEP_OF[:5])
    with pytest.raises(DataError, match=r"weight \[8, 1\]"):
        replace(inputs, weight=torch.ones(N, 1))


def test_garbage_where_nothing_is_learned_reaches_nothing() -> None:
    for pair in PAIRS:
        settings = _settings(*pair, beta=0.1, entropy_coef=0.1)
        clean = _batch(11)
        assert clean.rows is not None
        assert clean.entropy is not None
        assert clean.ref_logp is not None
        kept = clean.mask & clean.rows[:, None]
        dirty = replace(
            clean,
            logp=torch.where(kept, clean.logp.detach(), NAN).requires_grad_(),
            old_logp=torch.where(kept, clean.old_logp, math.inf),
            ref_logp=torch.where(kept, clean.ref_logp, -math.inf),
            entropy=torch.where(kept, clean.entropy.detach(), NAN).requires_grad_(),
            advantages=torch.where(clean.rows, clean.advantages, NAN),
        )
        loss, wanted = (make_objective(settings)(batch, _counts(clean)).loss for batch in (dirty, clean))
        assert loss.item() == pytest.approx(wanted.item(), abs=1e-12)
        for found, expected in zip(_gradients(loss, dirty), _gradients(wanted, clean), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_outputs_are_scalars_without_gradient_in_metrics() -> None:
    for pair in PAIRS:
        out = make_objective(_settings(*pair, beta=0.1))(_batch(), _counts(_batch()))
        assert isinstance(out, LossOutputs)
        assert not any(value.requires_grad or value.ndim for value in out.metrics.values())
