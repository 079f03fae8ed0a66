"""Training checkpoints: whole or absent, damaged ones refused by name, old ones dropped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rlhf_drive.config import Recipe
from rlhf_drive.errors import CheckpointError
from rlhf_drive.policies import LoraSettings, Policy, add_lora, load_policy
from rlhf_drive.training import checkpoint
from rlhf_drive.training.build import build_accelerator, build_policy
from rlhf_drive.training.checkpoint import CheckpointStore, publish_policy
from rlhf_drive.training.engine import TrainingEngine
from rlhf_drive.training.ranks import Ranks

Start = Callable[[], TrainingEngine]


def engine_of(policy: Policy, ranks: Ranks | None = None) -> TrainingEngine:
    """An engine with a high learning rate."""
    return TrainingEngine(
        policy, learning_rate=1e-2, weight_decay=0.01, accelerator=build_accelerator("cpu"), ranks=ranks
    )


@pytest.fixture
def start(tiny_recipe: Callable[..., Recipe]) -> Start:
    """An engine with a fresh policy, the same one at every call."""
    return lambda: engine_of(build_policy(tiny_recipe(), torch.device("cpu")))


def learn(engine: TrainingEngine) -> torch.Tensor:
    """A step that depends on the weights, the optimizer's state and torch's generator; returns what was drawn."""
    table = engine.policy.head.table
    drawn = torch.rand(table.shape)
    torch.autograd.backward((table * drawn + table.square()).sum())
    engine.optimizer.step()
    engine.optimizer.zero_grad()
    return drawn


def weights(engine: TrainingEngine) -> torch.Tensor:
    """All weights in a row."""
    return torch.cat([parameter.detach().flatten() for parameter in engine.policy.parameters()])


def test_training_goes_on_bit_for_bit(start: Start, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 2)
    engine = start()
    assert store.load(engine) is None
    for _ in range(3):
        learn(engine)
    store.save(3, engine, {"best": 0.1, "losses": [1 / 3]})
    drawn = learn(engine)
    other = start()
    torch.manual_seed(99)
    state = CheckpointStore(tmp_path, 2).load(other)
    assert state is not None
    assert (state.step, state.values) == (3, {"best": 0.1, "losses": [1 / 3]})
    assert not torch.equal(weights(engine), weights(other))
    assert torch.equal(learn(other), drawn)
    assert torch.equal(weights(engine), weights(other))


def test_training_of_adapters_goes_on_bit_for_bit(start: Start, tmp_path: Path) -> None:
    def adapters() -> TrainingEngine:
        return engine_of(add_lora(start().policy, LoraSettings(2, 4.0, True)))

    def learn_adapters(engine: TrainingEngine) -> None:
        moe = engine.policy.decoder.layers[0].moe
        torch.autograd.backward(moe(torch.rand(20, 32)).square().sum())
        engine.optimizer.step()
        engine.optimizer.zero_grad()

    store = CheckpointStore(tmp_path, 2)
    engine = adapters()
    for _ in range(3):
        learn_adapters(engine)
    store.save(3, engine)
    saved = weights(engine)
    learn_adapters(engine)
    other = adapters()
    torch.manual_seed(99)
    assert CheckpointStore(tmp_path, 2).load(other) is not None
    assert torch.equal(weights(other), saved)
    learn_adapters(other)
    assert not torch.equal(weights(other), saved)
    assert torch.equal(weights(other), weights(engine))


def test_the_newest_are_kept(start: Start, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", 2)
    for step in (5, 10, 100, 1_000_000):
        store.save(step, start())
    assert store.steps() == [100, 1_000_000]
    assert sorted(path.name for path in store.folder.iterdir()) == ["step-000100", "step-1000000"]


def test_folders_of_other_names_do_not_count(start: Start, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 1)
    store.save(7, start())
    shutil.copytree(tmp_path / "step-000007", tmp_path / "step-000009.copy")
    (tmp_path / "step-000010").touch()
    assert store.steps() == [7]
    state = store.load(start())
    assert state is not None
    assert state.step == 7
    assert (tmp_path / "step-000009.copy" / "state.json").is_file()


class Crash(BaseException):
    """Stands for the process's end: nothing catches it, and nothing is cleaned up."""


@pytest.mark.parametrize("point", ["save_policy", "torch.save", "sha256", "replace_folder", "shutil.rmtree"])
def test_a_crash_while_saving_leaves_the_checkpoint_before(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    store = CheckpointStore(tmp_path, 1)
    engine = start()
    learn(engine)
    store.save(4, engine)
    saved = weights(engine)
    learn(engine)

    def crash(*_: object, **__: object) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        if point == "shutil.rmtree":  # the new one is in place, the old one is about to be removed
            rmtree = shutil.rmtree
            patch.setattr(shutil, "rmtree", lambda path, **how: rmtree(path, **how) if how else crash())
        else:
            patch.setattr(torch if point == "torch.save" else checkpoint, point.removeprefix("torch."), crash)
        with pytest.raises(Crash):
            store.save(8, engine)
    assert any(path.name.startswith(".step-") for path in tmp_path.iterdir())
    other = start()
    state = CheckpointStore(tmp_path, 1).load(other)
    assert state is not None
    assert state.step == (8 if point == "shutil.rmtree" else 4)
    assert torch.equal(weights(other), weights(engine) if point == "shutil.rmtree" else saved)
    assert [path.name for path in tmp_path.iterdir()] == [f"step-{state.step:06d}"]  # leftovers are gone
    store.save(8, engine)
    assert store.steps() == [8]


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("trainer.pt", "trainer.pt is missing or does not match its checksum"),
        ("state.json", "state.json cannot be read"),
        ("policy.safetensors", "policy.safetensors does not match the checksum"),
        ("policy.json", "policy.json is not valid JSON"),
    ],
)
def test_a_truncated_file_is_named(start: Start, tmp_path: Path, file: str, message: str) -> None:
    store = CheckpointStore(tmp_path, 2)
    engine = start()
    learn(engine)
    store.save(2, engine)
    path = store.save(4, engine) / file
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match=message) as raised:
        store.load(start())
    assert "step-000004" in str(raised.value)
    path.unlink()
    with pytest.raises(CheckpointError, match=file):
        store.load(start())
    shutil.rmtree(path.parent)  # what the messages recommend
    state = store.load(start())
    assert state is not None
    assert state.step == 2


def test_a_state_without_a_key_is_refused(start: Start, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 2)
    path = store.save(4, start()) / "state.json"
    state = json.loads(path.read_text())
    for broken, reason in (({"step": 4, "values": {}}, "lacks sha256"), (4, "cannot be read"), ([], "lacks sha256")):
        path.write_text(json.dumps(broken))
        with pytest.raises(CheckpointError, match=reason):
            store.load(start())
    path.write_text(json.dumps(state))
    assert store.load(start()) is not None


def test_another_policy_is_refused_with_the_difference(
    start: Start, tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    store = CheckpointStore(tmp_path, 2)
    store.save(4, start())
    recipe = tiny_recipe("quickstart", "policy.expert_dim=24", "tokenizer.encoding=waypoints")
    engine = engine_of(build_policy(recipe, torch.device("cpu")))
    before = weights(engine)
    with pytest.raises(CheckpointError, match="holds another policy") as raised:
        store.load(engine)
    assert "architecture.expert_dim: 16 there, 24 here" in str(raised.value)
    assert "tokenizer.encoding: displacements there, waypoints here" in str(raised.value)
    assert torch.equal(weights(engine), before)


def test_publishing_replaces_the_policy_as_a_whole(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start()
    publish_policy(engine.policy, tmp_path / "policy", info={"epoch": 0})
    first = weights(engine)
    learn(engine)

    def half(policy: Policy, folder: Path, *, info: object) -> None:
        (folder / "policy.safetensors").write_bytes(b"half")
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_policy", half)
        with pytest.raises(Crash):
            publish_policy(engine.policy, tmp_path / "policy", info={"epoch": 1})
    assert torch.equal(weights(engine_of(load_policy(tmp_path / "policy"))), first)
    publish_policy(engine.policy, tmp_path / "policy", info={"epoch": 1})
    assert torch.equal(weights(engine_of(load_policy(tmp_path / "policy"))), weights(engine))
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]
