"""A disk that fails while a run is written: one clear error, no debris, and the older checkpoints as they were."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from oracles.small_disk import SmallDisk, failing_write, mounted_disk

from rewards.hack_detector import Alert
from rlhf_drive.config import Recipe
from rlhf_drive.errors import StorageError
from rlhf_drive.policies import Policy, load_policy
from rlhf_drive.training.alerts import AlertLog
from rlhf_drive.training.build import build_accelerator, build_policy
from rlhf_drive.training.checkpoint import CheckpointStore, publish_policy
from rlhf_drive.training.engine import TrainingEngine
from rlhf_drive.training.metrics import MetricsWriter, read_metrics
from rlhf_drive.training.run_folder import RunFolder


@pytest.fixture
def run(tiny_recipe: Callable[..., Recipe]) -> RunFolder:
    """A new run's folder."""
    return RunFolder.create(tiny_recipe())


@pytest.fixture
def engine(tiny_recipe: Callable[..., Recipe]) -> TrainingEngine:
    """An engine that has done a step, so that there is optimizer state."""
    made = TrainingEngine(
        build_policy(tiny_recipe(), torch.device("cpu")), learning_rate=1e-2, weight_decay=0.0,
        accelerator=build_accelerator("cpu"),
    )  # fmt: skip
    move(made)
    return made


def move(engine: TrainingEngine) -> None:
    """Another step, with gradients for all weights."""
    torch.autograd.backward(sum(p.square().sum() for p in engine.parameters))
    engine.step(1.0)


def weights(policy: Policy) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in policy.parameters()])


def store_of(run: RunFolder, keep: int = 1) -> CheckpointStore:
    return CheckpointStore(run.path / "rl-seed0" / "checkpoints", keep, run=run.identity)


def failures(attempt: Callable[[], object]) -> Iterator[StorageError]:
    """The errors of the attempt as each of its writes fails in turn, until none does."""
    for number in range(1, 1000):
        with failing_write(number) as count:
            try:
                attempt()
            except StorageError as error:
                yield error
        if count() < number:
            return
    raise AssertionError("it never ends")


def test_whichever_write_of_a_checkpoint_fails(run: RunFolder, engine: TrainingEngine) -> None:
    store = store_of(run)
    store.load(engine)
    store.save(4, engine)
    saved = {4: weights(engine.policy)}
    move(engine)
    saved[8] = weights(engine.policy)
    seen, messages = [], []
    for error in failures(lambda: store.save(8, engine)):
        messages.append(str(error))
        folders = sorted(path.name for path in store.folder.iterdir() if not path.name.endswith(".drop"))
        newest = int(folders[-1][5:])
        seen.append(newest)
        assert folders in (["step-000004"], ["step-000008"], ["step-000004", "step-000008"])  # and no debris
        assert torch.equal(weights(load_policy(store.folder / folders[-1])), saved[newest])
        before = weights(engine.policy)
        assert store_of(run, 9).load(engine).step == newest  # type: ignore[union-attr]
        assert torch.equal(weights(engine.policy), saved[newest])
        with torch.no_grad():
            torch.nn.utils.vector_to_parameters(before, engine.policy.parameters())
        shutil.rmtree(store.folder / "step-000008", ignore_errors=True)
        store.save(4, engine) if newest == 8 else None
        saved[4] = weights(load_policy(store.folder / "step-000004"))
    assert len(seen) >= 15
    assert set(seen) == {4, 8}
    assert seen == sorted(seen)  # once it is in its place it stays there
    assert all("rl-seed0/checkpoints" in message or "checkpoint" in message for message in messages)
    assert all(f"go on with: rlhf-drive train --resume {run.path}" in message for message in messages)
    assert store.steps() == [8]  # the last attempt, in which nothing failed


def test_whichever_write_of_a_policy_fails(run: RunFolder, engine: TrainingEngine) -> None:
    place = run.path / "rl-seed0" / "policy"
    publish_policy(engine.policy, place, info={})
    first = weights(engine.policy)
    move(engine)
    count = 0
    for error in failures(lambda: publish_policy(engine.policy, place, info={})):
        count += 1
        found = weights(load_policy(place))
        assert torch.equal(found, first) or torch.equal(found, weights(engine.policy))
        assert [path.name for path in place.parent.iterdir() if path.name != ".policy.old"] == ["policy"]
        assert "The policy could not be written to" in str(error) or "A policy" in str(error) or "Weights" in str(error)
    assert count >= 7
    assert torch.equal(weights(load_policy(place)), weights(engine.policy))


def test_whichever_write_of_metrics_warnings_and_stages_fails(run: RunFolder) -> None:
    for error in failures(lambda: run.mark_done("sft", {}, 1.0)):
        stages = json.loads((run.path / "stages.json").read_text())
        assert stages in ({"id": run.identity.id, "seconds": s, "done": d} for s, d in ((0.0, {}), (1.0, {"sft": {}})))
        assert "go on with" in str(error)
    writer, log = MetricsWriter(run.path, tensorboard=False), AlertLog(run.path)
    writer.log(1, {"a/x": 1.0}, phase="sft")
    for error in failures(lambda: writer.log(2, {"a/x": 2.0}, phase="sft")):
        assert [line["step"] for line in read_metrics(run.path)] == [1]
        assert "Metrics of sft step 2 could not be written" in str(error)
    writer.close()

    def resume() -> None:
        with MetricsWriter(run.path, tensorboard=False) as again:
            again.log(2, {"a/x": 2.0}, phase="sft")
            again.resume(1, phase="sft")

    for _ in failures(resume):
        assert {line["step"] for line in read_metrics(run.path)} in ({1}, {1, 2})
    alert = Alert("drift", "it drifts", 3)
    for error in failures(lambda: log.add(alert, phase="sft")):
        assert (run.path / "alerts.jsonl").read_text() == ""
        assert "A warning of sft step 3" in str(error)
    assert sorted(path.name for path in run.path.iterdir()) == [
        "alerts.jsonl", "metrics.jsonl", "recipe.yaml", "stages.json"
    ]  # fmt: skip


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """Twelve megabytes."""
    with mounted_disk(tmp_path / "small", 12) as found:
        yield found


def test_a_full_disk(
    small_disk: SmallDisk, tiny_recipe: Callable[..., Recipe], engine: TrainingEngine, tmp_path: Path
) -> None:
    run = RunFolder.create(tiny_recipe("quickstart", f"output_dir={small_disk.path / 'my runs'}"))
    store = store_of(run, keep=2)
    assert store.load(engine) is None
    step4 = store.save(4, engine)
    size = sum(path.stat().st_size for path in step4.rglob("*"))
    saved = weights(engine.policy)
    move(engine)
    # From nothing free at all to just too little, so that each of the files is the one that does not fit.
    for leave in (0, 4096, size // 4, size // 2, size - 16384):
        small_disk.fill(leave)
        with pytest.raises(StorageError, match="the disk or its quota is full") as raised:
            store.save(8, engine)
        assert f"go on with: rlhf-drive train --resume '{run.path}'" in str(raised.value)
        assert "of 13 MB are free" in str(raised.value)
        assert [path.name for path in store.folder.iterdir()] == ["step-000004"]
        small_disk.empty()
    writer = MetricsWriter(run.path, tensorboard=False)
    writer.log(1, {"a/x": 1.0})
    small_disk.fill(0)

    def log_many() -> None:
        for step in range(2, 400):  # a page takes several lines
            writer.log(step, {f"a/{name}": 1 / 3 for name in range(9)})

    with pytest.raises(StorageError, match="Metrics of rl step"):
        log_many()
    assert read_metrics(run.path)[-1]["step"] > 1
    assert (run.path / "metrics.jsonl").read_text().endswith("}\n")
    writer.close()
    small_disk.empty()
    small_disk.fill(size // 2)
    with pytest.raises(StorageError, match=r"A checkpoint takes .* MB, and in .* are free\. Free space there"):
        store_of(run).load(engine)  # before any work
    small_disk.empty()
    other = store_of(run)
    assert other.load(engine).step == 4  # type: ignore[union-attr]
    assert torch.equal(weights(engine.policy), saved)
    assert other.save(8, engine).is_dir()


def test_a_read_only_disk(
    small_disk: SmallDisk, tiny_recipe: Callable[..., Recipe], engine: TrainingEngine, tmp_path: Path
) -> None:
    recipe = tiny_recipe("quickstart", f"output_dir={small_disk.path / 'runs'}")
    run = RunFolder.create(recipe)
    store = store_of(run)
    store.save(4, engine)
    leftover = store.folder / ".step-000008.tmp"
    leftover.mkdir()
    small_disk.make_read_only(True)
    try:
        for attempt in (
            lambda: store.save(8, engine),
            lambda: store_of(run).load(engine),
            lambda: publish_policy(engine.policy, run.path / "policy", info={}),
            lambda: MetricsWriter(run.path, tensorboard=False),
            lambda: RunFolder.resume(recipe, run.path),
            lambda: run.note_seconds(3.0),
        ):
            with pytest.raises(StorageError, match=r"it may not be written.*Make it writable, then go on with"):
                attempt()
    finally:
        small_disk.make_read_only(False)
    assert leftover.is_dir()
    assert store_of(run).load(engine).step == 4  # type: ignore[union-attr]


def test_a_folder_that_has_vanished(run: RunFolder, engine: TrainingEngine) -> None:
    writer = MetricsWriter(run.path, tensorboard=False)
    writer.log(1, {"a/x": 1.0})
    shutil.rmtree(run.path)
    with pytest.raises(StorageError, match="the folder has vanished"):
        writer.log(2, {"a/x": 1.0})
    with pytest.raises(StorageError, match="the folder has vanished"):
        run.note_seconds(2.0)
    writer.close()


def test_an_error_that_is_not_the_disks_stays_what_it_is(run: RunFolder, engine: TrainingEngine) -> None:
    with pytest.raises(TypeError):
        store_of(run).save(4, engine, {"values": object()})
    assert not list(store_of(run).folder.iterdir())
    with failing_write(3, errno.EIO), pytest.raises(StorageError, match=r"Input/output error.*Mend that"):
        store_of(run).save(4, engine)
