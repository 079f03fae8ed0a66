"""Estimators of the divergence against its exact value on a small distribution."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from rlhf_drive.objectives import ObjectiveSettings
from rlhf_drive.objectives.kl import KlEstimator, kl_k1, kl_k2, kl_k3, kl_loss, reward_penalty

LOGP = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
REF = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64).log()
EXACT = 0.5 * 0.9162907318741551 + 0.2 * -0.9162907318741551  # sum p log(p / ref), log 2.5 = 0.91629…


def test_k1_and_k3_are_unbiased_and_k3_is_never_negative() -> None:
    assert (LOGP.exp() * kl_k1(LOGP, REF)).sum().item() == pytest.approx(EXACT, abs=1e-12)
    assert (LOGP.exp() * kl_k3(LOGP, REF)).sum().item() == pytest.approx(EXACT, abs=1e-12)
    assert (kl_k3(LOGP, REF) >= 0).all()
    assert (kl_k1(LOGP, REF) < 0).any()


def test_k2_by_hand() -> None:
    expected = torch.tensor([0.91629073**2 / 2, 0.0, 0.91629073**2 / 2], dtype=torch.float64)
    torch.testing.assert_close(kl_k2(LOGP, REF), expected, rtol=0, atol=1e-8)


def test_k3_gradient_pulls_towards_the_reference() -> None:
    logp = LOGP.clone().requires_grad_()
    kl_k3(logp, REF).sum().backward()
    # d/dlogp (e^(ref - logp) - (ref - logp) - 1) = 1 - ref / p.
    torch.testing.assert_close(logp.grad, 1 - (REF - LOGP).exp(), rtol=0, atol=1e-12)


OLD = torch.tensor([0.25, 0.6, 0.15], dtype=torch.float64).log()


def _expected_gradient(estimator: KlEstimator, old: Tensor, *, corrected: bool) -> Tensor:
    """Mean over all outcomes of the gradient that `kl_loss` has at each, with respect to the policy's logits."""
    logits = LOGP.clone().requires_grad_()
    logp = logits.log_softmax(-1)
    weight = (logp - old).exp() if corrected else None
    loss = (old.exp() * kl_loss(logp, old, REF, estimator, weight)).sum()
    return torch.autograd.grad(loss, logits)[0]


def _gradient_of_divergence(*, forward: bool) -> Tensor:
    logits = LOGP.clone().requires_grad_()
    logp = logits.log_softmax(-1)
    exact = (REF.exp() * (REF - logp)).sum() if forward else (logp.exp() * (logp - REF)).sum()
    return torch.autograd.grad(exact, logits)[0]


def test_gradients_on_policy_are_those_of_the_divergence_they_name() -> None:
    """k2's is that of KL(policy || reference), k3's that of KL(reference || policy); k1's, unweighted, is none."""
    reverse, forward = _gradient_of_divergence(forward=False), _gradient_of_divergence(forward=True)
    assert (reverse - forward).abs().max() > 0.01
    k2, k3 = (_expected_gradient(name, LOGP, corrected=False) for name in ("k2", "k3"))
    torch.testing.assert_close(k2, reverse, rtol=0, atol=1e-12)
    torch.testing.assert_close(k3, forward, rtol=0, atol=1e-12)
    logits = LOGP.clone().requires_grad_()
    plain = (LOGP.exp() * kl_k1(logits.log_softmax(-1), REF)).sum()
    assert torch.autograd.grad(plain, logits)[0].abs().max().item() < 1e-12


@pytest.mark.parametrize(("estimator", "corrected"), [("k1", False), ("k1", True), ("k2", True), ("k3", True)])
@pytest.mark.parametrize("old", [LOGP, OLD], ids=["on_policy", "off_policy"])
def test_weighted_gradients_are_those_of_the_reverse_divergence(
    estimator: KlEstimator, corrected: bool, old: Tensor
) -> None:
    found = _expected_gradient(estimator, old, corrected=corrected)
    torch.testing.assert_close(found, _gradient_of_divergence(forward=False), rtol=0, atol=1e-12)


def test_without_the_weight_an_old_sample_misleads() -> None:
    for estimator in ("k2", "k3"):
        found = _expected_gradient(estimator, OLD, corrected=False)  # type: ignore[arg-type]
        assert (found - _gradient_of_divergence(forward=False)).abs().max() > 0.01


def test_a_penalty_in_the_reward_maximises_reward_less_divergence() -> None:
    """Over all plans of two tokens, the second drawn given the first: REINFORCE on R - beta sum k1 is exact."""
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(3, generator=generator).double(), torch.randn(3, 3, generator=generator).double()
    first, second = first.requires_grad_(), second.requires_grad_()
    ref_first = torch.randn(3, generator=generator).double().log_softmax(-1)
    ref_second = torch.randn(3, 3, generator=generator).double().log_softmax(-1)
    reward = torch.rand(3, 3, generator=generator).double()
    plans = torch.tensor(list(itertools.product(range(3), range(3))))
    a, b = plans.T
    logp = torch.stack([first.log_softmax(-1)[a], second.log_softmax(-1)[a, b]], 1)
    ref = torch.stack([ref_first[a], ref_second[a, b]], 1)
    probability = logp.sum(1).exp()
    settings = ObjectiveSettings(beta=0.4, kl_estimator="k1", kl_in="reward")
    penalty = reward_penalty(logp, ref, torch.ones(9, 2, dtype=torch.bool), settings)
    assert not penalty.requires_grad
    value = (probability.detach() * (reward[a, b] - penalty) * logp.sum(1)).sum()
    exact = (probability * (reward[a, b] - 0.4 * (logp.sum(1) - ref.sum(1)))).sum()
    for found, wanted in zip(
        torch.autograd.grad(value, (first, second), retain_graph=True),
        torch.autograd.grad(exact, (first, second)),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_penalty_by_hand_with_steps_left_out() -> None:
    nan = float("nan")
    old = torch.tensor([[-1.0, -2.0, nan], [-1.0, nan, -3.0]], dtype=torch.float64)
    ref = torch.tensor([[-1.5, -1.0, nan], [-2.0, nan, -3.0]], dtype=torch.float64)
    mask = old.isfinite()
    for estimator, expected in (("k1", [0.5 - 1.0, 1.0]), ("k2", [0.125 + 0.5, 0.5])):
        settings = ObjectiveSettings(beta=2.0, kl_estimator=estimator, kl_in="reward")
        assert reward_penalty(old, ref, mask, settings).tolist() == pytest.approx([2 * x for x in expected])
    weight = torch.tensor([[0.0, 1.5, 1.5]] * 2, dtype=torch.float64)
    settings = ObjectiveSettings(beta=1.0, kl_estimator="k1", kl_in="reward")
    dirty = torch.where(weight > 0, old, nan)
    assert reward_penalty(dirty, ref, mask, settings, weight).tolist() == pytest.approx([-1.5, 0.0])
