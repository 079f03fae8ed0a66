"""A step that fails leaves the state before it, bit for bit, or says what there is instead."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from oracles.small_disk import failing_write
from oracles.tiny_policy import ARCHITECTURE

from rlhf_drive.policies import Policy, TrajectoryTokenizer
from rlhf_drive.training.build import build_accelerator
from rlhf_drive.training.checkpoint import CheckpointStore
from rlhf_drive.training.engine import TrainingEngine
from rlhf_drive.training.last_good import LastGoodStep


@pytest.fixture
def engine() -> TrainingEngine:
    """An engine that has done a step."""
    policy = Policy(ARCHITECTURE, TrajectoryTokenizer("displacements", -5.0, 15.0, 0.5))
    made = TrainingEngine(policy, learning_rate=0.1, weight_decay=0.0, accelerator=build_accelerator("cpu"))
    move(made)
    return made


def move(engine: TrainingEngine) -> None:
    torch.autograd.backward(sum((p * torch.rand_like(p)).square().sum() for p in engine.parameters))
    engine.step(1.0)


def state(engine: TrainingEngine) -> list[torch.Tensor]:
    moments = [t for values in engine.optimizer.state.values() for t in values.values()]
    return [t.detach().clone() for t in [*engine.parameters, *moments]]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("hold", [True, False])
def test_the_state_before_the_step_is_kept(engine: TrainingEngine, tmp_path: Path, hold: bool) -> None:
    store = CheckpointStore(tmp_path, 2)
    last = LastGoodStep(store, engine, hold_weights=hold)
    average, visits = torch.ones(3), {"seen": [1]}
    last.note(6, {}, {})
    move(engine)
    last.note(7, visits, {"ema": average})
    before, drawn = state(engine), torch.rand(4)  # what a user's reward drew in the step that fails
    visits["seen"].append(2)
    if hold:
        move(engine)
        average.add_(1.0)
    torch.autograd.backward(engine.parameters[0].sum())  # a gradient that was never used
    assert last.save() == "The state after step 7 is kept as a checkpoint."
    move(engine)
    found = store.load(engine)
    assert found is not None
    assert (found.step, found.values, found.tensors["ema"].tolist()) == (7, {"seen": [1]}, [1.0, 1.0, 1.0])
    assert same(state(engine), before)
    assert torch.equal(torch.rand(4), drawn)
    assert last.save() == "The state after step 7 is kept as a checkpoint."  # it is there already


def test_a_step_that_moved_weights_leaves_none_unless_they_are_held(engine: TrainingEngine, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 2)
    last = LastGoodStep(store, engine, hold_weights=False)
    assert last.save() == ""
    last.note(0, {}, {})
    assert last.save() == "No step was done before it."
    move(engine)
    assert last.save() == "The step had changed weights already. There is no checkpoint."
    store.save(3, engine)
    last.note(4, {}, {})
    move(engine)
    assert last.save() == "The step had changed weights already. The newest checkpoint is that of step 3."
    assert store.steps() == [3]


def test_a_full_disk_does_not_hide_the_failure(engine: TrainingEngine, tmp_path: Path) -> None:
    last = LastGoodStep(CheckpointStore(tmp_path, 2), engine, hold_weights=True)
    last.note(4, {}, {})
    with failing_write(2):
        said = last.save()
    assert said.startswith("The state after step 4 is lost: ")
    assert "the disk or its quota is full" in said
    assert CheckpointStore(tmp_path, 2).steps() == []
