"""Masked diffusion: schedules, draws, corruption, and the trace that decoding leaves."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_drive.errors import ConfigError
from rlhf_drive.policies import Decoding, masked


class TableDenoiser:
    """Logits are a fixed table by position: no coupling, so every probability is known."""

    def __init__(self, logits: torch.Tensor) -> None:
        self.table = logits
        self.vocab_size = logits.shape[1]
        self.seen: list[torch.Tensor] = []

    def action_logits(
        self, state: torch.Tensor, time: torch.Tensor, context: object, where: torch.Tensor, record: object = None
    ) -> torch.Tensor:
        self.seen.append(state)
        return self.table.expand(len(state), *self.table.shape)[where]


@pytest.mark.parametrize(("length", "steps", "expected"), [(5, 3, [2, 2, 1]), (4, 4, [1] * 4), (3, 9, [1, 1, 1])])
def test_reveal_steps_are_even_and_cover_all(length: int, steps: int, expected: list[int]) -> None:
    assert masked.reveal_steps(length, steps) == expected


def test_causal_and_reverse_order_reveal_from_either_end() -> None:
    denoiser = TableDenoiser(torch.zeros(4, 3))
    uniforms = torch.rand(2, 2, 4, generator=torch.Generator().manual_seed(0))
    trace = masked.sample(denoiser, None, uniforms, Decoding(2, "causal", 1.0, 0))
    assert trace.scored[:, 0].int().tolist() == [[1, 1, 0, 0], [0, 0, 1, 1]]
    trace = masked.sample(denoiser, None, uniforms, Decoding(2, "reverse_causal", 1.0, 0))
    assert trace.scored[:, 0].int().tolist() == [[0, 0, 1, 1], [1, 1, 0, 0]]


def test_random_order_follows_the_rows_own_numbers() -> None:
    uniforms = torch.zeros(1, 2, 4)
    uniforms[0, 0] = torch.tensor([0.9, 0.1, 0.5, 0.3])
    trace = masked.sample(TableDenoiser(torch.zeros(4, 3)), None, uniforms, Decoding(4, "random", 1.0, 0))
    assert trace.scored[:, 0].int().argmax(dim=1).tolist() == [1, 3, 2, 0]


def test_confidence_order_reveals_the_surest_position_first() -> None:
    table = torch.zeros(3, 2)
    table[:, 0] = torch.tensor([1.0, 3.0, 2.0])
    trace = masked.sample(TableDenoiser(table), None, torch.rand(1, 2, 3), Decoding(3, "confidence", 1.0, 0))
    assert trace.scored[:, 0].int().argmax(dim=1).tolist() == [1, 2, 0]


def test_states_hide_what_is_not_revealed_and_keep_what_is() -> None:
    denoiser = TableDenoiser(torch.zeros(4, 3))
    trace = masked.sample(denoiser, None, torch.rand(1, 2, 4), Decoding(2, "causal", 1.0, 0))
    assert trace.state[0, 0].tolist() == [3, 3, 3, 3]
    assert trace.state[1, 0].tolist() == [*trace.tokens[0, :2].tolist(), 3, 3]
    assert trace.time.tolist() == [0.0, 0.5]


def test_draw_inverts_the_cumulative_distribution() -> None:
    logits = torch.tensor([0.2, 0.3, 0.5]).log().expand(4, 3)
    token, logp = masked.draw(logits, torch.tensor([0.0, 0.199, 0.21, 0.999999]), 1.0, 0)
    assert token.tolist() == [0, 0, 1, 2]
    assert logp.exp().tolist() == pytest.approx([0.2, 0.2, 0.3, 0.5], abs=1e-6)


def test_draw_frequencies_match_probabilities() -> None:
    probabilities = torch.tensor([0.1, 0.6, 0.3])
    uniform = (torch.arange(10_000) + 0.5) / 10_000
    token, _ = masked.draw(probabilities.log().expand(10_000, 3), uniform, 1.0, 0)
    assert torch.bincount(token, minlength=3).tolist() == [1000, 6000, 3000]


def test_temperature_and_top_k_change_the_recorded_probability() -> None:
    logits = torch.tensor([[0.0, math.log(2.0), math.log(4.0)]])
    # top 2 of (1, 2, 4) at temperature 1/2: (4, 16) / 20.
    token, logp = masked.draw(logits, torch.tensor([0.1]), 0.5, 2)
    assert token.tolist() == [1]
    assert logp.exp().item() == pytest.approx(4 / 20, abs=1e-6)


def test_greedy_takes_the_mode_whatever_the_numbers() -> None:
    token, _ = masked.draw(torch.tensor([[0.0, 5.0, 1.0]]), torch.tensor([0.999]), 0.0, 0)
    assert token.tolist() == [1]


@pytest.mark.parametrize("order", ["random", "causal", "reverse_causal"])
def test_corruption_hides_between_one_and_all_with_equal_chance(order: str) -> None:
    tokens = torch.zeros(8000, 4, dtype=torch.long)
    state, hidden = masked.corrupt(tokens, 9, order, torch.Generator().manual_seed(1))
    counts = torch.bincount(hidden.sum(dim=1), minlength=5)
    assert counts[0] == 0
    assert (counts[1:] / 8000).tolist() == pytest.approx([0.25] * 4, abs=0.03)
    assert torch.equal(state == 9, hidden)
    if order == "causal":
        assert bool((hidden.int().diff(dim=1) >= 0).all())
    if order == "reverse_causal":
        assert bool((hidden.int().diff(dim=1) <= 0).all())


def test_sft_loss_of_independent_tokens_is_their_mean_surprise() -> None:
    denoiser = TableDenoiser(torch.tensor([[0.8, 0.2], [0.5, 0.5]]).log())
    tokens = torch.tensor([[0, 1]]).repeat(20_000, 1)
    loss = masked.sft_loss(denoiser, tokens, None, "random", torch.Generator().manual_seed(0)).mean()
    assert loss.item() == pytest.approx(-(math.log(0.8) + math.log(0.5)) / 2, abs=5e-3)


def test_sampled_confidence_order_is_refused_with_alternatives() -> None:
    with pytest.raises(ConfigError, match="not a probability"):
        Decoding(4, "low_confidence", 1.0, 0)
