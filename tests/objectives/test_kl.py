"""Estimators of the divergence against its exact value on a small distribution."""

from __future__ import annotations

import pytest
import torch

from rlhf_drive.objectives.kl import kl_k1, kl_k2, kl_k3

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
