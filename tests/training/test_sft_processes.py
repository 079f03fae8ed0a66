"""Supervised training in two processes is that of one process with the same micro-batches, and resumes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from oracles.process_runs import largest, launch, metric_gap
from oracles.sft_runs import SftJob, SftOutcome, at, run_all, run_sft

from rlhf_drive.config import load_recipe
from rlhf_drive.errors import ConfigError
from rlhf_drive.policies import load_policy
from rlhf_drive.scenes.store import SceneStore
from rlhf_drive.training.build import build_policy, sft_settings
from rlhf_drive.training.ranks import Ranks

EPOCHS = 4
STEPS = 12
STOP = 7
SMALL = (
    "policy.d_model=32", "policy.num_heads=2", "policy.encoder_layers=1", "policy.decoder_layers=1",
    "policy.num_experts=4", "policy.expert_dim=16", "policy.max_agents=6", "policy.max_polylines=8",
    "policy.points_per_polyline=5", "policy.dropout=0.2", "tokenizer.step=0.1", "sft.learning_rate=3e-3",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sft")


@pytest.fixture(scope="module")
def job(tiny_store: SceneStore, folder: Path) -> SftJob:
    """Three steps an epoch; 13 scenes in micro-batches of 5, 5 and 3, with dropout and mirrored scenes."""
    recipe = load_recipe("quickstart", SMALL)
    settings = replace(
        sft_settings(recipe), batch_size=13, micro_batch_scenes=5, max_epochs=EPOCHS, patience=9,
        save_steps=1000, mirror=True,
    )  # fmt: skip
    assert 26 < len(tiny_store.indices("train")) <= 39
    return SftJob(build_policy(recipe, torch.device("cpu")), settings, tiny_store.path, folder / "one")


@pytest.fixture(scope="module")
def alone(job: SftJob) -> SftOutcome:
    return run_sft(job, Ranks())


@pytest.fixture(scope="module")
def together(job: SftJob, folder: Path) -> list[list[SftOutcome]]:
    """By process: DDP, FSDP2, DDP until it is asked to stop, and what another session makes of that."""
    (folder / "launch").mkdir()
    jobs = [
        at(job, folder / "ddp"),
        at(job, folder / "fsdp2", strategy="fsdp2"),
        at(job, folder / "stopped", stop_after=STOP),
        at(job, folder / "stopped"),
        at(job, folder / "stopped_later", stop_after=STOP),
    ]
    return launch(partial(run_all, jobs), folder / "launch")


def published(folder: Path) -> dict[str, torch.Tensor]:
    """The best weights, as they were written."""
    return dict(load_policy(folder / "policy").state_dict())


@pytest.mark.parametrize(("which", "name"), [(0, "ddp"), (1, "fsdp2")])
def test_two_processes_train_as_one_does(
    alone: SftOutcome, together: list[list[SftOutcome]], folder: Path, which: int, name: str
) -> None:
    main, other = (found[which] for found in together)
    assert len(main.lines) == len(alone.lines) == STEPS
    assert metric_gap(alone.lines, main.lines)[0] < 1e-5, metric_gap(alone.lines, main.lines)
    assert alone.lines[0]["loss/train"] - alone.lines[-1]["loss/train"] > 0.1  # there was something to learn
    gap, where = largest(published(folder / name), published(folder / "one"))
    assert gap < 1e-5, where
    assert main.result is not None
    assert main.result == other.result
    assert main.result.epoch == alone.result.epoch  # type: ignore[union-attr]
    assert other.lines == []  # the main process alone keeps the journal


def test_all_processes_end_with_the_best_weights(together: list[list[SftOutcome]], folder: Path) -> None:
    for found in together:
        assert largest(found[0].weights, published(folder / "ddp"))[0] == 0.0


def test_a_training_that_was_asked_to_stop_goes_on_bit_for_bit(together: list[list[SftOutcome]], folder: Path) -> None:
    whole, _, before, after, _ = together[0]
    assert (len(before.lines), before.result) == (STOP, None)
    assert together[1][2].result is None  # the signal reached the main process alone, and all have stopped
    assert (after.first, together[1][3].first) == (STOP, 0)  # only the main one resumes a journal
    assert before.lines + after.lines == whole.lines
    assert after.result == whole.result
    assert largest(published(folder / "stopped"), published(folder / "ddp"))[0] == 0.0


def test_one_process_goes_on_where_two_were_stopped(
    job: SftJob, alone: SftOutcome, together: list[list[SftOutcome]], folder: Path
) -> None:
    after = run_sft(at(job, folder / "stopped_later"), Ranks())
    lines = together[0][4].lines + after.lines
    assert (after.first, len(lines)) == (STOP, STEPS)
    assert metric_gap(alone.lines, lines)[0] < 1e-5
    assert largest(published(folder / "stopped_later"), published(folder / "one"))[0] < 1e-5


@pytest.mark.parametrize(
    ("micro", "processes", "message"),
    [
        (0, 2, r"sft.micro_batch_scenes is 0 \(the whole batch\): the 13 scenes of a step make 1 micro-batch, too few "
               r"for 2 processes. Set sft.micro_batch_scenes to 6 or less, or start fewer processes"),
        (5, 4, r"is 5: the 13 scenes of a step make 3 micro-batches, too few for 4 processes. Set "
               r"sft.micro_batch_scenes to 3 or less"),
        (1, 14, r"make 13 micro-batches, too few for 14 processes. Raise sft.batch_size, or"),
    ],
)  # fmt: skip
def test_processes_without_work_are_refused(job: SftJob, micro: int, processes: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(job.settings, micro_batch_scenes=micro).check_processes(processes)
    replace(job.settings, micro_batch_scenes=5).check_processes(3)
    replace(job.settings, micro_batch_scenes=0).check_processes(1)
