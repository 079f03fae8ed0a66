"""The clipped objectives: values, gradients and metrics by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_drive.errors import ConfigError
from rlhf_drive.objectives import LossInputs, ObjectiveSettings, count_denominators, make_objective

LEVELS = ["token", "sequence", "sequence_token", "step"]
LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo", "luspo"]
NAN = float("nan")


def _batch(seed: int = 0, n: int = 6, t: int = 5, **changes: Any) -> LossInputs:
    g = torch.Generator().manual_seed(seed)
    old = -torch.rand(n, t, generator=g, dtype=torch.float64) * 2
    fields: dict[str, Any] = {
        "logp": (old + 0.3 * torch.randn(n, t, generator=g, dtype=torch.float64)).requires_grad_(),
        "old_logp": old,
        "ref_logp": old + 0.2 * torch.randn(n, t, generator=g, dtype=torch.float64),
        "advantages": torch.randn(n, generator=g, dtype=torch.float64),
        "mask": torch.arange(t)[None] < torch.randint(1, t + 1, (n, 1), generator=g),
    }
    return LossInputs(**{**fields, **changes})


def _run(inputs: LossInputs, loss_type: str = "grpo", level: str = "token", beta: float = 0.0) -> tuple[Any, Tensor]:
    objective = make_objective(ObjectiveSettings(loss_type, level, epsilon=0.2, epsilon_high=0.28, beta=beta))
    denominators = count_denominators(inputs.mask, inputs.rows, max_length=inputs.mask.shape[1])
    out = objective(inputs, denominators)
    (gradient,) = torch.autograd.grad(out.loss, inputs.logp)
    return out, gradient


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("advantage", "ratio", "alive"),
    [
        (1.0, 1.5, False),  # already more likely than the trust region allows
        (1.0, 0.5, True),  # good, and less likely than before: pull it back
        (-1.0, 0.5, False),  # already less likely than the trust region allows
        (-1.0, 1.5, True),  # bad, and more likely than before: push it back
        (1.0, 1.25, True),  # inside: epsilon_high, not epsilon, bounds from above
        (-1.0, 0.85, True),
    ],
)
def test_clip_stops_the_gradient_on_one_side_only(level: str, advantage: float, ratio: float, alive: bool) -> None:
    logp = torch.full((1, 4), math.log(ratio), dtype=torch.float64, requires_grad=True)
    inputs = LossInputs(logp, torch.zeros(1, 4), None, torch.tensor([advantage]), torch.ones(1, 4, dtype=torch.bool))
    out, gradient = _run(inputs, level=level)
    expected = -advantage * ratio / 4 if alive else 0.0
    torch.testing.assert_close(gradient, torch.full_like(gradient, expected), rtol=0, atol=1e-12)
    clipped = min(max(ratio, 0.8), 1.28)
    assert out.loss.item() == pytest.approx(-min(ratio * advantage, clipped * advantage), abs=1e-12)
    assert out.metrics["ratio/clip_frac"].item() == (0.0 if alive else 1.0)
    assert out.metrics["ratio/clip_low_frac"].item() == (1.0 if ratio < 0.8 and not alive else 0.0)
    assert out.metrics["ratio/clip_high_frac"].item() == (1.0 if ratio > 1.28 and not alive else 0.0)


@pytest.mark.parametrize("level", LEVELS)
def test_at_the_old_policy_the_ratio_is_one_and_the_gradient_is_the_policy_gradient(level: str) -> None:
    old = _batch().old_logp
    inputs = _batch(logp=old.clone().requires_grad_())
    out, gradient = _run(inputs, level=level)
    # -A / length, averaged over the 6 rows.
    expected = -inputs.advantages[:, None] * inputs.mask / inputs.mask.sum(1, keepdim=True) / 6
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)
    assert out.loss.item() == pytest.approx(-inputs.advantages.mean().item(), abs=1e-12)
    for name in ("ratio/mean", "ratio/min", "ratio/max"):
        assert out.metrics[name].item() == pytest.approx(1.0, abs=1e-12)
    assert out.metrics["kl/old_approx"].item() == 0.0
    assert out.metrics["ratio/clip_frac"].item() == 0.0


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSSES)
def test_zero_advantage_without_kl_gives_zero_gradient(loss_type: str, level: str) -> None:
    inputs = _batch(advantages=torch.zeros(6))
    out, gradient = _run(inputs, loss_type, level)
    assert out.loss.item() == 0.0
    assert gradient.abs().max().item() == 0.0
    # Rows without advantage still feel the reference.
    out, gradient = _run(inputs, loss_type, level, beta=0.1)
    assert gradient[inputs.mask].abs().min().item() > 0
    assert out.loss.item() > 0


def test_sequence_weight_is_the_geometric_mean_over_scored_tokens() -> None:
    inputs = LossInputs(
        logp=torch.tensor([[0.1, -0.3, 7.0]], requires_grad=True),
        old_logp=torch.zeros(1, 3),
        ref_logp=None,
        advantages=torch.tensor([2.0]),
        mask=torch.tensor([[True, True, False]]),
    )
    out, gradient = _run(inputs, level="sequence")
    weight = math.exp((0.1 - 0.3) / 2)
    assert out.loss.item() == pytest.approx(-2 * weight, abs=1e-6)
    assert gradient.tolist()[0] == pytest.approx([-weight, -weight, 0.0], abs=1e-6)


def test_kl_term_and_metrics_by_hand() -> None:
    inputs = LossInputs(
        logp=torch.tensor([[-1.0, -2.0], [-1.5, NAN]], requires_grad=True),
        old_logp=torch.tensor([[-1.1, -1.7], [-1.5, NAN]]),
        ref_logp=torch.tensor([[-0.8, -2.5], [-1.5, NAN]]),
        advantages=torch.tensor([0.0, 0.0]),
        mask=torch.tensor([[True, True], [True, False]]),
    )
    out, gradient = _run(inputs, "dapo", beta=0.5)
    k3 = [math.exp(0.2) - 0.2 - 1, math.exp(-0.5) + 0.5 - 1, 0.0]
    assert out.loss.item() == pytest.approx(0.5 * sum(k3) / 3, abs=1e-6)
    assert gradient[0, 0].item() == pytest.approx(0.5 * (1 - math.exp(0.2)) / 3, abs=1e-6)
    assert gradient[1].tolist() == [0.0, 0.0]
    expected = {
        "kl/ref_k1": (-0.2 + 0.5) / 3,
        "kl/ref_k2": (0.02 + 0.125) / 3,
        "kl/ref_k3": sum(k3) / 3,
        # Live minus old: 0.1, -0.3, 0.
        "kl/old_approx": (math.exp(0.1) - 0.1 - 1 + math.exp(-0.3) + 0.3 - 1) / 3,
        "ratio/mean": (math.exp(0.1) + math.exp(-0.3) + 1) / 3,
        "ratio/min": math.exp(-0.3),
        "ratio/max": math.exp(0.1),
    }
    for name, value in expected.items():
        assert out.metrics[name].item() == pytest.approx(value, abs=1e-6), name
    assert not any(value.requires_grad for value in out.metrics.values())


@pytest.mark.parametrize("level", LEVELS)
def test_extremes_of_the_ratio_are_over_what_is_learned_from(level: str) -> None:
    mask, rows = torch.tensor([[True, False]] * 3), torch.tensor([True, True, False])
    for low, high in ((0.25, 0.5), (1.5, 2.0)):
        logp = torch.tensor([low, high, 9.0]).log()[:, None].expand(3, 2).contiguous().requires_grad_()
        out, _ = _run(LossInputs(logp, torch.zeros(3, 2), None, torch.ones(3), mask, rows), level=level)
        assert out.metrics["ratio/min"].item() == pytest.approx(low, abs=1e-6)
        assert out.metrics["ratio/max"].item() == pytest.approx(high, abs=1e-6)
        assert out.metrics["ratio/mean"].item() == pytest.approx((low + high) / 2, abs=1e-6)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSSES)
def test_rows_left_out_are_as_if_they_were_not_there(loss_type: str, level: str) -> None:
    rows = torch.tensor([True, False, True, True, False, True])
    whole = _batch()
    poisoned = {
        name: torch.where(rows[:, None], getattr(whole, name).detach(), NAN)
        for name in ("logp", "old_logp", "ref_logp")
    }
    inputs = LossInputs(
        **{**poisoned, "logp": poisoned["logp"].requires_grad_()},
        advantages=torch.where(rows, whole.advantages, NAN),
        mask=whole.mask,
        rows=rows,
    )
    kept = _batch(
        logp=whole.logp.detach()[rows].requires_grad_(),
        old_logp=whole.old_logp[rows],
        ref_logp=whole.ref_logp[rows] if whole.ref_logp is not None else None,
        advantages=whole.advantages[rows],
        mask=whole.mask[rows],
    )
    out, gradient = _run(inputs, loss_type, level, beta=0.1)
    expected, expected_gradient = _run(kept, loss_type, level, beta=0.1)
    assert out.loss.item() == pytest.approx(expected.loss.item(), abs=1e-12)
    torch.testing.assert_close(gradient[rows], expected_gradient, rtol=0, atol=1e-12)
    assert gradient[~rows].abs().max().item() == 0.0
    assert {name: value.item() for name, value in out.metrics.items()} == pytest.approx(
        {name: value.item() for name, value in expected.metrics.items()}, abs=1e-12
    )


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_garbage_in_unscored_slots_reaches_nothing(level: str, beta: float) -> None:
    clean = _batch()
    logp = torch.where(clean.mask, clean.logp.detach(), 1e4).requires_grad_()
    dirty = _batch(logp=logp, old_logp=torch.where(clean.mask, clean.old_logp, -1e4))
    out, gradient = _run(dirty, level=level, beta=beta)
    expected, expected_gradient = _run(clean, level=level, beta=beta)
    assert out.loss.item() == pytest.approx(expected.loss.item(), abs=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-12)


def test_wrong_settings_are_listed_together() -> None:
    with pytest.raises(ConfigError) as caught:
        make_objective(ObjectiveSettings("gprpo", "sequenc", epsilon=1.5, epsilon_high=-1.0, beta=NAN))
    text = str(caught.value)
    for piece in ("'gprpo'", "'grpo'", "'sequenc'", "'sequence'", "epsilon = 1.5", "epsilon_high = -1.0", "beta = nan"):
        assert piece in text


def test_beta_without_reference_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rl\.beta = 0\.1"):
        _run(_batch(ref_logp=None), beta=0.1)
