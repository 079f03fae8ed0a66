"""Splitting a batch changes nothing, from the table policy's parameters to the merged metrics."""

from __future__ import annotations

import pytest
import torch
from oracles.tabular import TabularDenoiser

from rlhf_drive.errors import DataError
from rlhf_drive.likelihood import flatten_steps, trace_logp
from rlhf_drive.objectives import (
    Denominators,
    LossInputs,
    ObjectiveSettings,
    count_denominators,
    group_advantages,
    make_objective,
    merge_metrics,
)
from rlhf_drive.policies.masked import sample
from rlhf_drive.policies.process import Decoding

S, G, L, V = 6, 4, 4, 3


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_micro_batches_add_up(loss_type: str, level: str) -> None:
    live, old, ref = (TabularDenoiser(S, L, V, seed=0, scale=scale) for scale in (1.0, 0.9, 0.8))
    generator = torch.Generator().manual_seed(1)
    uniforms = torch.rand(S * G, 2, L, generator=generator)
    trace = sample(old, torch.arange(S), uniforms, Decoding(steps=3, order="random", temperature=0.9, top_k=0))
    rewards = torch.rand(S * G, generator=generator, dtype=torch.float64)
    rewards[4:8] = 0.5
    valid = torch.rand(S * G, generator=generator) > 0.2
    advantages = group_advantages(rewards, valid, G, scale_rewards="group", tolerance=0.0).values
    denominators = count_denominators(flatten_steps(trace.scored), valid, max_length=L)
    objective = make_objective(ObjectiveSettings(loss_type, level, epsilon=0.02, epsilon_high=0.03, beta=0.05))

    def run(scenes_per_batch: int) -> tuple[float, torch.Tensor, dict[str, float]]:
        live.table.grad = None
        loss, parts = 0.0, []
        for start in range(0, S, scenes_per_batch):
            scenes = torch.arange(start, min(start + scenes_per_batch, S))
            index = torch.arange(int(scenes[0]) * G, (int(scenes[-1]) + 1) * G)
            part = trace.rows(index)
            logp, mask = trace_logp(live, scenes, part)
            with torch.no_grad():
                ref_logp, _ = trace_logp(ref, scenes, part)
            old_logp = flatten_steps(part.logp).double()
            inputs = LossInputs(logp, old_logp, ref_logp, advantages[index], mask, valid[index])
            out = objective(inputs, denominators)
            out.loss.backward()  # type: ignore[no-untyped-call]
            loss += out.loss.item()
            parts.append(out.metrics)
        assert live.table.grad is not None
        return loss, live.table.grad.clone(), merge_metrics(parts)

    loss, gradient, metrics = run(S)
    assert metrics["ratio/clip_frac"] > 0.1
    assert gradient.abs().max() > 1e-3
    for scenes_per_batch in (1, 4):
        split_loss, split_gradient, split_metrics = run(scenes_per_batch)
        assert split_loss == pytest.approx(loss, abs=1e-10)
        torch.testing.assert_close(split_gradient, gradient, rtol=0, atol=1e-10)
        assert split_metrics == pytest.approx(metrics, abs=1e-6)


def test_merge_of_nothing_is_empty() -> None:
    assert merge_metrics([]) == {}


def test_shapes_and_types_are_checked() -> None:
    logp, flags = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(DataError, match=r"old_logp \[2, 2\]"):
        LossInputs(logp, logp[:, :2], None, torch.zeros(2), flags)
    with pytest.raises(DataError, match=r"advantages \[2, 1\]"):
        LossInputs(logp, logp, None, torch.zeros(2, 1), flags)
    with pytest.raises(DataError, match=r"mask must be a bool tensor, got torch\.float32"):
        LossInputs(logp, logp, None, torch.zeros(2), flags.float())


def test_a_micro_batch_without_learned_rows_leaves_extremes_alone() -> None:
    objective = make_objective(ObjectiveSettings("grpo", "token"))
    logp, flags = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    denominators = Denominators(sequences=1.0, tokens=2.0, max_length=2)
    rows = torch.tensor([True])
    parts = [
        objective(LossInputs(logp, logp, None, torch.zeros(1), flags, keep), denominators).metrics
        for keep in (rows, ~rows)
    ]
    merged = merge_metrics(parts)
    assert (merged["ratio/min"], merged["ratio/mean"], merged["ratio/max"]) == (1.0, 1.0, 1.0)
