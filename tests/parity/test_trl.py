"""Losses, gradients, metrics and advantages against TRL's own code, run on random tensors with a stand-in trainer."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_drive.objectives import (
    LossInputs,
    ObjectiveSettings,
    ScaleRewards,
    count_denominators,
    group_advantages,
    make_objective,
)

LOW, HIGH = 0.2, 0.28


@pytest.fixture(scope="module")
def grpo_trainer() -> Any:
    """TRL's trainer class; its methods are called unbound on a stand-in that has just the attributes they read."""
    return pytest.importorskip("trl").GRPOTrainer


class _Stub(SimpleNamespace):
    """Attributes that are not set read as None: every optional feature of the trainer is off."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def _accelerator() -> _Stub:
    return _Stub(
        num_processes=1,
        process_index=0,
        device=torch.device("cpu"),
        gather=lambda value: value,
        reduce=lambda value, reduction: value,
    )


def _metrics() -> dict[str, dict[str, list[float]]]:
    return {"train": defaultdict(list)}


def _trl_loss(
    trainer: Any, inputs: LossInputs, loss_type: str, level: str, beta: float, accumulation: int, tokens: float
) -> tuple[Tensor, dict[str, list[float]]]:
    n, t = inputs.logp.shape
    stub = _Stub(
        _get_per_token_logps_and_entropies=lambda *_, **__: (inputs.logp, torch.zeros(n, t), None),
        top_entropy_quantile=1.0,
        importance_sampling_level=level,
        loss_type=loss_type,
        beta=beta,
        epsilon_low=LOW,
        epsilon_high=HIGH,
        args=_Stub(steps_per_generation=accumulation),
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=accumulation,
        max_completion_length=t + 2,
        accelerator=_accelerator(),
        _metrics=_metrics(),
    )
    ids = torch.zeros(n, 1, dtype=torch.long)
    batch = {
        "prompt_ids": ids,
        "prompt_mask": ids,
        "completion_ids": torch.zeros(n, t, dtype=torch.long),
        "completion_mask": inputs.mask.long(),
        "advantages": inputs.advantages,
        "old_per_token_logps": inputs.old_logp,
        "ref_per_token_logps": inputs.ref_logp,
        "num_items_in_batch": torch.tensor(tokens),
    }
    return trainer._compute_loss(stub, None, batch), stub._metrics["train"]


def _random(seed: int, n: int = 8, t: int = 6) -> LossInputs:
    g = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(n, t, generator=g, dtype=torch.float64)
    return LossInputs(
        logp=(old + 0.4 * torch.randn(n, t, generator=g, dtype=torch.float64)).requires_grad_(),
        old_logp=old,
        ref_logp=old + 0.3 * torch.randn(n, t, generator=g, dtype=torch.float64),
        advantages=torch.randn(n, generator=g, dtype=torch.float64),
        mask=torch.arange(t)[None] < torch.randint(1, t + 1, (n, 1), generator=g),
    )


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("beta", [0.0, 0.07])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_loss_gradient_and_metrics(grpo_trainer: Any, loss_type: str, level: str, beta: float, seed: int) -> None:
    inputs = _random(seed)
    denominators = count_denominators(inputs.mask, max_length=inputs.mask.shape[1] + 2)
    out = make_objective(ObjectiveSettings(loss_type, level, LOW, HIGH, beta=beta))(inputs, denominators)
    (gradient,) = torch.autograd.grad(out.loss, inputs.logp)
    theirs, metrics = _trl_loss(grpo_trainer, inputs, loss_type, level, beta, 1, denominators.tokens)
    (their_gradient,) = torch.autograd.grad(theirs, inputs.logp)
    torch.testing.assert_close(out.loss, theirs, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient, their_gradient, rtol=0, atol=1e-12)
    assert gradient.abs().max().item() > 1e-3
    names = {
        "ratio/clip_frac": "clip_ratio/region_mean",
        "ratio/clip_low_frac": "clip_ratio/low_mean",
        "ratio/clip_high_frac": "clip_ratio/high_mean",
    }
    if beta:
        names["kl/ref_k3"] = "kl"
    for ours, trl_name in names.items():
        assert out.metrics[ours].item() == pytest.approx(metrics[trl_name][0], abs=1e-6), ours
    assert out.metrics["ratio/clip_frac"].item() > 0


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_gradient_accumulation(grpo_trainer: Any, loss_type: str) -> None:
    """Two micro-batches of TRL add up to our full batch: one window, with the window's own token count."""
    inputs = _random(3)
    denominators = count_denominators(inputs.mask, max_length=inputs.mask.shape[1] + 2)
    ours = make_objective(ObjectiveSettings(loss_type, "token", LOW, HIGH, beta=0.05))(inputs, denominators).loss
    theirs = torch.zeros((), dtype=torch.float64)
    for rows in (slice(0, 4), slice(4, 8)):
        assert inputs.ref_logp is not None
        part = LossInputs(
            inputs.logp[rows],
            inputs.old_logp[rows],
            inputs.ref_logp[rows],
            inputs.advantages[rows],
            inputs.mask[rows],
        )
        theirs = theirs + _trl_loss(grpo_trainer, part, loss_type, "token", 0.05, 2, denominators.tokens)[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad(ours, inputs.logp)
    (their_gradient,) = torch.autograd.grad(theirs, inputs.logp)
    torch.testing.assert_close(gradient, their_gradient, rtol=0, atol=1e-12)


def _trl_advantages(trainer: Any, rewards: Tensor, num_generations: int, scale_rewards: str) -> Tensor:
    """Advantages out of TRL's generation step, with the generation and the reward call stubbed; NaN is unscorable."""
    n = len(rewards)
    tokens = [[1, 2]] * n
    stub = _Stub(
        accelerator=_accelerator(),
        model=_Stub(training=True),
        _tokenizer=_Stub(pad_token_id=0),
        _generate=lambda prompts: (tokens, tokens, None, ["x"] * n, None, {}, None, None),
        args=_Stub(per_device_train_batch_size=n, steps_per_generation=1, gradient_accumulation_steps=1),
        num_iterations=1,
        beta=0.0,
        _calculate_rewards=lambda *_, **__: rewards[:, None].clone(),
        num_generations=num_generations,
        multi_objective_aggregation="sum_then_normalize",
        reward_weights=torch.ones(1, dtype=rewards.dtype),
        scale_rewards=scale_rewards,
        reward_func_names=["reward"],
        _metrics=_metrics(),
        _logs={
            "prompt": [],
            "completion": [],
            "rewards": defaultdict(list),
            "advantages": [],
            "extra": defaultdict(list),
        },
        _pending_extra_logs={},
        _pending_metrics={},
    )
    output = trainer._generate_and_score_completions(stub, [{"prompt": "p"}] * n)
    return output["advantages"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("scale_rewards", ["none", "group", "batch"])
def test_advantages_with_unscorable_rows(grpo_trainer: Any, scale_rewards: ScaleRewards) -> None:
    generator = torch.Generator().manual_seed(0)
    rewards = torch.rand(24, generator=generator, dtype=torch.float64)
    rewards[[1, 7]] = torch.nan  # a group of four each keeps three rows
    rewards[8:11] = torch.nan  # one row is left: nothing to compare it with
    rewards[12:16] = torch.nan  # none is left
    rewards[16:20] = 0.25  # no spread
    ours = group_advantages(rewards, rewards.isfinite(), 4, scale_rewards=scale_rewards, tolerance=0.0)
    theirs = _trl_advantages(grpo_trainer, rewards, 4, scale_rewards)
    # TRL forms n / (n - 1) in float32.
    torch.testing.assert_close(ours.values, theirs, rtol=0, atol=1e-6)
    assert ours.degenerate.tolist() == [False, False, True, True, True, False]
    assert ours.values.abs().max().item() > 0.1
