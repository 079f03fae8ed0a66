"""The engine in one process: what torch does without it. Several processes: see `test_processes`."""

from __future__ import annotations

import copy

import pytest
import torch
from oracles.tiny_policy import ARCHITECTURE, observation
from torch import Tensor

from rlhf_drive.errors import ConfigError, TrainingError
from rlhf_drive.policies import Policy, TrajectoryTokenizer
from rlhf_drive.training.build import build_accelerator
from rlhf_drive.training.engine import TrainingEngine

OBSERVATIONS = [observation(i) for i in range(3)]


@pytest.fixture
def policy() -> Policy:
    torch.manual_seed(0)
    return Policy(ARCHITECTURE, TrajectoryTokenizer(low=-5.0, high=15.0, step=0.1, encoding="waypoints")).eval()


def make_engine(policy: Policy, **options: str) -> TrainingEngine:
    accelerator = build_accelerator("cpu")
    return TrainingEngine(policy, learning_rate=1e-3, weight_decay=0.1, accelerator=accelerator, **options)  # type: ignore[arg-type]


def loss_of(policy: Policy, number: int) -> Tensor:
    context = policy.encode(OBSERVATIONS[number : number + 1])
    state = torch.full((2, policy.tokenizer.length), policy.vocab_size)
    logits = policy.action_logits(state, torch.zeros(2), context, torch.ones_like(state, dtype=torch.bool))
    return logits.log_softmax(dim=-1)[:, 7 * number].mean()


def test_a_step_is_torchs(policy: Policy) -> None:
    theirs = copy.deepcopy(policy)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-3, weight_decay=0.1)
    engine = make_engine(policy)
    for max_norm in (1e9, 0.01):
        for turn in engine.turns(range(3)):
            assert turn.counts
            engine.backward(engine.forward(lambda model, number=turn.part: loss_of(model, number)))
            loss_of(theirs, turn.part).backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(engine.step(max_norm), norm)
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), theirs.parameters(), strict=True))
    assert all(p.grad is None for p in policy.parameters())


def test_a_check_that_fails_leaves_everything_as_it_was(policy: Policy) -> None:
    engine, before = make_engine(policy), copy.deepcopy(policy.state_dict())
    engine.backward(engine.forward(lambda model: loss_of(model, 0)))
    gradients = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}

    def check(norm: Tensor) -> None:
        raise TrainingError(f"{float(norm):.3f} is too much")

    with pytest.raises(TrainingError, match=r"\d+\.\d+ is too much"):
        engine.step(1e-6, check)
    assert not engine.optimizer.state
    for name, p in policy.named_parameters():
        assert torch.equal(p, before[name])
        assert torch.equal(p.grad, gradients[name])  # type: ignore[arg-type]


def test_what_comes_with_a_loss_is_given_back(policy: Policy) -> None:
    engine = make_engine(policy)
    loss, words = engine.forward(lambda model: (loss_of(model, 0), ["as", "it", "was"]))
    assert loss.requires_grad
    assert words == ["as", "it", "was"]
    assert engine.whole_policy() is policy


def test_one_process_has_all_parts_in_order(policy: Policy) -> None:
    engine = make_engine(policy, strategy="fsdp2")
    assert not engine.divided
    assert [(turn.part, turn.counts, turn.last) for turn in engine.turns("ab")] == [
        ("a", True, False),
        ("b", True, True),
    ]
    assert engine.collect(engine.share("abc")) == ["a", "b", "c"]
    assert list(engine.turns(())) == []


def test_an_unknown_strategy_is_refused(policy: Policy) -> None:
    with pytest.raises(ConfigError, match=r"Unknown parallel.strategy 'fsdp'. Did you mean 'fsdp2'"):
        make_engine(policy, strategy="fsdp")
