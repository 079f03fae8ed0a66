"""From features to log-probabilities in chunks: the same values and gradients, without keeping logits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlhf_drive.likelihood.base import tempered_logp
from rlhf_drive.likelihood.scoring import score_draws, tempered_entropy

M, F, V = 23, 5, 11


class Head(torch.nn.Module):
    """A linear head that notes the sizes of what it makes."""

    vocab_size = V

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(F, V, generator=generator, dtype=dtype))
        self.made: list[int] = []

    def logits(self, features: Tensor) -> Tensor:
        self.made.append(len(features))
        return features @ self.weight


def _inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(M, F, generator=generator, dtype=dtype).requires_grad_()
    return features, torch.randint(0, V, (M,), generator=generator)


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (0.6, 0), (1.4, 3), (1.0, 1)])
@pytest.mark.parametrize("rows", [1, 4, 22, 23, 100])
def test_chunks_equal_the_plain_version(rows: int, temperature: float, top_k: int) -> None:
    head, (features, action) = Head(), _inputs()
    weight = torch.linspace(-1.0, 2.0, M, dtype=torch.float64)

    def grads(logp: Tensor, entropy: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((weight * logp + weight.flip(0) * entropy).sum(), [features, head.weight])

    logits = features @ head.weight
    expected = tempered_logp(logits, action, temperature, top_k)
    expected_entropy = tempered_entropy(logits, action, temperature, top_k)
    logp, entropy = score_draws(
        head,
        features,
        action,
        temperature,
        top_k,
        entropy=True,
        limit=rows * V + 1,  # type: ignore[arg-type]
    )
    assert entropy is not None
    assert logp.dtype == torch.float64
    torch.testing.assert_close(logp, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(entropy, expected_entropy, rtol=0, atol=1e-12)
    assert max(head.made) <= rows
    made = len(head.made)
    assert made == math.ceil(M / rows)
    for got, want in zip(grads(logp, entropy), grads(expected, expected_entropy), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-11)
    # Chunks are made again in the backward pass; what fits at once is not.
    assert len(head.made) == (2 * made if made > 1 else 1)


def test_no_wide_tensor_is_kept_for_the_backward_pass() -> None:
    head, (features, action) = Head(), _inputs()

    def kept(limit: int) -> int:
        sizes: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel() if tensor.shape[-1:] == (V,) and len(tensor) != F else 0)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            score_draws(head, features, action, 0.7, 0, limit=limit)  # type: ignore[arg-type]
        return sum(sizes)

    assert kept(10**9) >= M * V
    assert kept(4 * V) == 0


def test_float32_in_half_precision() -> None:
    head, (features, action) = Head(torch.bfloat16), _inputs(torch.bfloat16)
    logp, entropy = score_draws(head, features, action, 0.7, 0, entropy=True)  # type: ignore[arg-type]
    exact = ((features @ head.weight).double() / 0.7).log_softmax(-1)
    assert entropy is not None
    assert logp.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logp.double(), exact[torch.arange(M), action], rtol=0, atol=2e-6)
    torch.testing.assert_close(entropy.double(), -(exact.exp() * exact).sum(-1), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("action", "temperature", "top_k", "support"),
    [
        (0, 1.0, 0, [0, 1, 2, 3]),
        (0, 2.0, 0, [0, 1, 2, 3]),
        (0, 1.0, 1, [0]),
        (1, 1.0, 2, [0, 1, 2]),  # a tie at the second place: both stay
        (3, 1.0, 1, [0, 3]),  # the action has dropped out of the live top-k: it alone is added
    ],
)
def test_entropy_by_hand(action: int, temperature: float, top_k: int, support: list[int]) -> None:
    numbers = [3.0, 2.0, 2.0, -1.0]
    logits = torch.tensor([numbers], requires_grad=True)
    weights = {v: math.exp(numbers[v] / temperature) for v in support}
    p = {v: w / sum(weights.values()) for v, w in weights.items()}
    expected = -sum(q * math.log(q) for q in p.values())
    entropy = tempered_entropy(logits, torch.tensor([action]), temperature, top_k)
    assert float(entropy) == pytest.approx(expected, abs=1e-6)
    entropy.sum().backward()
    # dH/dx_v = -p_v (log p_v + H) / temperature inside the support, 0 outside.
    slope = [-p[v] * (math.log(p[v]) + expected) / temperature if v in p else 0.0 for v in range(4)]
    torch.testing.assert_close(logits.grad, torch.tensor([slope]), rtol=0, atol=1e-6)


def test_nothing_to_score() -> None:
    logp, entropy = score_draws(
        Head(),
        torch.zeros(0, F, dtype=torch.float64),
        torch.zeros(0, dtype=torch.long),
        1.0,
        3,
        entropy=True,  # type: ignore[arg-type]
    )
    assert entropy is not None
    assert len(logp) == len(entropy) == 0
