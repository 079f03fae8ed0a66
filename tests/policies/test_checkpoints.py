"""What a checkpoint says about its policy: compared, completed, and refused by name. Files are in test_policy.py."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.tiny_policy import ARCHITECTURE

from rlhf_drive.errors import CheckpointError
from rlhf_drive.policies import (
    Architecture,
    LoraSettings,
    Policy,
    TrajectoryTokenizer,
    add_lora,
    checkpoints,
    load_policy,
    save_policy,
)
from rlhf_drive.policies.checkpoints import check_same, complete_description

TOKENIZER = TrajectoryTokenizer("displacements", -5.0, 15.0, 0.5)


def make(architecture: Architecture = ARCHITECTURE, tokenizer: TrajectoryTokenizer = TOKENIZER) -> Policy:
    torch.manual_seed(0)
    return Policy(architecture, tokenizer)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of a plain policy."""
    save_policy(make(), tmp_path)
    return tmp_path


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads((folder / "policy.json").read_text())
    change(data)
    (folder / "policy.json").write_text(json.dumps(data))


@dataclass(frozen=True)
class Newer(Architecture):
    """The architecture of a later version: one more field, with a default that means what was before."""

    windows: int = 3
    """Something new."""


def test_an_older_manifest_gets_todays_defaults(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "Architecture", Newer)
    old = load_policy(folder)
    assert old.describe()["architecture"] == {**asdict(ARCHITECTURE), "windows": 3}
    check_same(old, make(Newer(**asdict(ARCHITECTURE))), "It differs")
    with pytest.raises(CheckpointError, match=r"It differs \(architecture.windows: 3 there, 4 here\)"):
        check_same(old, make(Newer(**asdict(ARCHITECTURE), windows=4)), "It differs")


def test_fields_added_since_the_first_checkpoints_have_defaults(folder: Path) -> None:
    """The twelve fields of the first manifests are enough, whatever has been added."""
    first = {
        "d_model", "num_heads", "encoder_layers", "decoder_layers", "num_experts", "experts_per_token", "expert_dim",
        "max_agents", "max_polylines", "points_per_polyline", "dropout",
    }  # fmt: skip
    edit(folder, lambda data: data.update(architecture={k: v for k, v in data["architecture"].items() if k in first}))
    check_same(load_policy(folder), make(), "It differs")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["architecture"].update(windows=3), "architecture.windows, which this version does not know"),
        (lambda d: d["tokenizer"].update(bins=1, axis=2), "has tokenizer.axis, tokenizer.bins, which this version"),
        (lambda d: d["process"].update(name="maksed"), "Unknown decoding process 'maksed'. Did you mean 'masked'"),
        (lambda d: d["process"].update(blocks=2.0), "Process 'masked' does not take the options blocks"),
        (lambda d: d["architecture"].pop("d_model"), "does not describe a policy.*d_model"),
        (lambda d: d["architecture"].update(num_heads=5), "d_model 32 must be a multiple of num_heads 5"),
        (lambda d: d["architecture"].update(expert_dim=24), "differing tensors: decoder.layers.0.moe"),
        (lambda d: d["architecture"].update(expert_dim=-1), "cannot be rebuilt"),
        (lambda d: d.update(tokenizer=5), "does not describe a policy"),
        (lambda d: d.update(lora={"rank": 2, "alpha": 4.0, "experts": False}), "differing tensors: decoder.layers.0"),
        (lambda d: d.update(lora={"rank": 200, "alpha": 4.0, "experts": False}), "cannot be used: LoRA rank 200"),
        (lambda d: d.clear(), r"has format None and lacks \['architecture'"),
    ],
)  # fmt: skip
def test_a_manifest_that_does_not_fit_is_refused_by_name(
    folder: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    edit(folder, change)
    with pytest.raises(CheckpointError, match=message) as raised:
        load_policy(folder)
    assert str(folder) in str(raised.value)


def test_a_manifest_that_is_no_object_is_damaged(folder: Path) -> None:
    (folder / "policy.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="holds no JSON object"):
        load_policy(folder)


def test_adapters_without_a_word_in_the_manifest_are_refused(tmp_path: Path) -> None:
    save_policy(add_lora(make(), LoraSettings(2, 4.0, False)), tmp_path)
    edit(tmp_path, lambda data: data.pop("lora"))
    with pytest.raises(CheckpointError, match=r"differing tensors: decoder.layers.0.attention.out.weight.lora_A"):
        load_policy(tmp_path)


def test_every_difference_is_named_at_once() -> None:
    found = make(replace(ARCHITECTURE, expert_dim=24, max_agents=5), replace(TOKENIZER, step=0.25))
    with pytest.raises(CheckpointError) as raised:
        check_same(found, make(), "a/policy does not fit the recipe", "Name another.")
    # -5 … 15 at 0.25 is 81 numbers, at 0.5 it is 41.
    assert str(raised.value) == (
        "a/policy does not fit the recipe (architecture.expert_dim: 24 there, 16 here; architecture.max_agents: 5 "
        "there, 6 here; tokenizer.step: 0.25 there, 0.5 here; vocabulary: 81 numbers there, 41 here). Name another."
    )


def test_policies_of_the_same_kind_are_the_same_whatever_their_weights() -> None:
    found = make()
    with torch.no_grad():
        found.head.table.add_(1.0)
    found.remember_training([])
    check_same(found, make(), "It differs")


def test_adapters_are_part_of_what_is_compared() -> None:
    plain, settings = make(), LoraSettings(2, 4.0, False)
    adapted = add_lora(copy.deepcopy(plain), settings)
    check_same(adapted, add_lora(copy.deepcopy(plain), settings, seed=8), "It differs")
    with pytest.raises(CheckpointError, match=r"lora.alpha: 4.0 there, 8.0 here; lora.rank: 2 there, 4 here\)"):
        check_same(adapted, add_lora(copy.deepcopy(plain), LoraSettings(4, 8.0, False)), "It differs")
    with pytest.raises(CheckpointError, match=r"lora.rank: 2 there, nothing here"):
        check_same(adapted, plain, "It differs")


def test_a_description_is_complete_and_keeps_what_it_is_given(folder: Path) -> None:
    path = folder / "policy.json"
    assert complete_description(json.loads(path.read_text()), path) == make().describe()
