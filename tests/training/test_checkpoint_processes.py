"""Checkpoints of two processes: whole, with everybody's generators, and open to another number of processes."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import checkpoint_runs
from oracles.process_runs import launch

from rlhf_drive.training.checkpoint import CheckpointStore
from rlhf_drive.training.generators import kept_generators
from rlhf_drive.training.ranks import Ranks
from rlhf_drive.training.run_folder import RunIdentity


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]], dict[str, Any]]:
    """Folder of the checkpoints, what two processes found, and what one had saved before."""
    folder = tmp_path_factory.mktemp("processes")
    with kept_generators():
        alone = checkpoint_runs.saved(Ranks(), f"{folder}/rl/one", "ddp")
        foreign = CheckpointStore(folder / "rl" / "foreign", 2, run=RunIdentity("other", "recipe"))
        foreign.save(9, checkpoint_runs.make(Ranks()))
        mine = CheckpointStore(folder / "rl" / "mine", 2, run=checkpoint_runs.RUN)
        shutil.move(mine.save(3, checkpoint_runs.make(Ranks())), folder / "rl" / "foreign" / "step-000003")
    return folder, launch(partial(checkpoint_runs.everything, folder=str(folder)), folder), alone


Found = tuple[Path, list[dict[str, Any]], dict[str, Any]]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_go_on_bit_for_bit_each_with_its_own_generators(found: Found, strategy: str) -> None:
    _, ranks, _ = found
    for rank in ranks:
        first, again = rank[strategy], rank[f"{strategy} again"]
        assert torch.equal(first["at"], again["at"])
        assert torch.equal(first["after"], again["after"])
        assert first["draws"] == again["draws"]
        assert again["state"].notices == ()
        assert again["state"].values == {"rank": 0}  # the main process's
        assert again["state"].tensors["mine"].tolist() == [0]
    assert ranks[0][strategy]["draws"] != ranks[1][strategy]["draws"]
    assert torch.equal(ranks[0][strategy]["at"], ranks[1][strategy]["at"])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_one_process_goes_on_from_two(found: Found, strategy: str) -> None:
    folder, ranks, _ = found
    with kept_generators():
        state = checkpoint_runs.resumed(Ranks(), f"{folder}/rl/{strategy}", "ddp")
    assert torch.equal(state["at"], ranks[0][strategy]["at"])
    assert state["draws"] == ranks[0][strategy]["draws"]
    assert len(state["state"].notices) == 1
    assert "written by 2 process(es), and 1 go on" in state["state"].notices[0]
    assert "not those of an unchanged run bit for bit" in state["state"].notices[0]
    if strategy == "ddp":
        torch.testing.assert_close(state["after"], ranks[0]["ddp"]["after"], atol=1e-6, rtol=1e-6)


def test_two_processes_go_on_from_one(found: Found) -> None:
    _, ranks, alone = found
    for rank in ranks:
        assert torch.equal(rank["from one"]["at"], alone["at"])
        torch.testing.assert_close(rank["from one"]["after"], alone["after"], atol=1e-6, rtol=1e-6)
        assert "written by 1 process(es), and 2 go on" in rank["from one"]["state"].notices[0]
    assert ranks[0]["from one"]["draws"] == alone["draws"]
    assert ranks[1]["from one"]["draws"] != alone["draws"]  # it has no state there, and keeps its own


def test_an_error_of_one_process_is_everybodys(found: Found) -> None:
    folder, ranks, _ = found
    assert ranks[0]["refused"] == ranks[1]["refused"]
    load, save, unread = ranks[0]["refused"]
    assert load == save
    assert "step-000009 is another run's: run other" in load
    assert unread == "OSError: not mounted here"
    assert sorted(path.name for path in (folder / "rl" / "foreign").iterdir()) == ["away", "step-000003"]


def test_a_signal_to_one_process_stops_all_after_the_same_step(found: Found) -> None:
    _, ranks, _ = found
    assert [rank["stopped"] for rank in ranks] == [(3, "SIGUSR1")] * 2
