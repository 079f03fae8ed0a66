"""Adapters on disk: the same bits, a small file, and no other base than their own."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.adapted_policy import BASE, SETTINGS, TOKENIZER, adapted, logits, make, move, same_bits
from oracles.tiny_policy import ARCHITECTURE

from rlhf_drive.errors import CheckpointError, ConfigError
from rlhf_drive.policies import (
    LoraSettings,
    Policy,
    add_lora,
    load_adapter,
    load_policy,
    masked,
    merged,
    processes,
    save_adapter,
    save_policy,
)
from rlhf_drive.policies.lora import lora_settings


def test_adapters_alone_come_back_to_the_bit_and_are_small(tmp_path: Path) -> None:
    big = make(architecture=replace(ARCHITECTURE, d_model=128, expert_dim=128, num_experts=8))
    policy = move(add_lora(copy.deepcopy(big), LoraSettings(2, 4.0, True), seed=1))
    policy.trained_on = frozenset({"00112233aabb"})
    save_adapter(policy, tmp_path / "adapter", info={"step": 7})
    big.trained_on = frozenset({"ffeeddccbbaa"})
    back = load_adapter(big, tmp_path / "adapter")
    assert back is big
    assert same_bits(dict(back.state_dict()), dict(policy.state_dict()))
    assert torch.equal(logits(back), logits(policy))
    assert back.trained_on == {"00112233aabb", "ffeeddccbbaa"}
    assert json.loads((tmp_path / "adapter" / "adapter.json").read_text())["info"] == {"step": 7}
    save_policy(policy, tmp_path)
    files = [tmp_path / "adapter" / "adapter.safetensors", tmp_path / "policy.safetensors"]
    small, whole = (file.stat().st_size for file in files)
    # Rank 2 of 128: 2 * 2 / 128 of an adapted square weight; the rest of the policy is not in the file at all.
    assert small < whole / 20


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with adapters of the base."""
    save_adapter(adapted(), tmp_path)
    return tmp_path


def other_process(monkeypatch: pytest.MonkeyPatch) -> Policy:
    class Other(masked.MaskedDiffusion):
        name = "other"

    monkeypatch.setattr(processes, "PROCESSES", {**processes.PROCESSES, "other": Other})
    policy = copy.deepcopy(BASE)
    policy.process = Other(TOKENIZER)
    return policy


def other_weights(_: pytest.MonkeyPatch) -> Policy:
    policy = copy.deepcopy(BASE)
    with torch.no_grad():
        policy.head.table[0, 0] += 1e-6
    return policy


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (other_weights, r"1 of \d+ weights, first head.table\)"),
        (
            lambda _: make(architecture=replace(ARCHITECTURE, expert_dim=24)),
            "architecture.expert_dim: 16 there, 24 here",
        ),
        (lambda _: make(tokenizer=replace(TOKENIZER, step=0.25)), "tokenizer.step: 0.5 there, 0.25 here"),
        (other_process, "process.name: masked there, other here"),
    ],
)
def test_another_base_is_refused_with_the_difference(
    saved: Path, monkeypatch: pytest.MonkeyPatch, base: Callable[[pytest.MonkeyPatch], Policy], message: str
) -> None:
    policy = base(monkeypatch)
    before = list(policy.state_dict())
    with pytest.raises(CheckpointError, match=rf"belong to another base policy \(.*{message}"):
        load_adapter(policy, saved)
    assert list(policy.state_dict()) == before  # nothing was added to it


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: f.with_suffix(".json").unlink(), "adapter.json is missing. Give a folder that save_adapter wrote"),
        (lambda f: f.unlink(), "adapter.safetensors is missing"),
        (lambda f: f.write_bytes(f.read_bytes()[:-8]), "adapter.safetensors does not match the checksum"),
        (lambda f: f.with_suffix(".json").write_text('{"format": 1'), "adapter.json is not valid JSON"),
        (lambda f: edit(f.with_suffix(".json"), lambda d: d.pop("lora")), r"lacks \['lora'\]"),
        (lambda f: edit(f.with_suffix(".json"), lambda d: d["base"].pop("weights")), "not name the base's weights"),
        (lambda f: edit(f.with_suffix(".json"), lambda d: d["lora"].update(rank=3)), "differing tensors: decoder"),
        (lambda f: edit(f.with_suffix(".json"), lambda d: d["lora"].update(rank=0)), "LoRA rank is 0"),
        (lambda f: edit(f.with_suffix(".json"), lambda d: d["lora"].update(dora=1)), "lora.dora, which this version"),
    ],
)  # fmt: skip
def test_damaged_adapters_are_named(saved: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(saved / "adapter.safetensors")
    with pytest.raises(CheckpointError, match=message) as raised:
        load_adapter(copy.deepcopy(BASE), saved)
    assert str(saved) in str(raised.value)


def test_a_policy_checkpoint_keeps_its_adapters(tmp_path: Path) -> None:
    policy = adapted()
    save_policy(policy, tmp_path)
    back = load_policy(tmp_path)
    assert same_bits(dict(back.state_dict()), dict(policy.state_dict()))
    assert lora_settings(back) == SETTINGS
    assert torch.equal(logits(back.eval()), logits(policy))
    assert [n for n, p in back.named_parameters() if p.requires_grad] == [
        n for n, p in policy.named_parameters() if p.requires_grad
    ]
    plain = tmp_path / "plain"
    plain.mkdir()
    save_policy(merged(policy), plain)
    assert torch.equal(logits(load_policy(plain).eval()), logits(merged(policy)))
    assert "lora" not in json.loads((plain / "policy.json").read_text())


def test_adapters_need_a_policy_that_has_some_to_save_and_none_to_load(tmp_path: Path) -> None:
    save_adapter(adapted(), tmp_path)
    with pytest.raises(ConfigError, match="has adapters already"):
        load_adapter(adapted(), tmp_path)
    with pytest.raises(ConfigError, match="no adapters to save"):
        save_adapter(BASE, tmp_path)


def test_adapters_alone_are_no_policy(tmp_path: Path) -> None:
    save_adapter(adapted(), tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="holds adapters alone, which change a policy and are none") as raised:
        load_policy(tmp_path / "adapter")
    assert "Give the folder `policy` beside it" in str(raised.value)
