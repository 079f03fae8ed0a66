"""Adapters alone on disk: `adapter.safetensors`, and a manifest that names the base policy they belong to."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_drive.errors import CheckpointError, ConfigError
from rlhf_drive.policies.adapters import adapter_state, base_state
from rlhf_drive.policies.checkpoints import (
    FORMAT,
    complete_description,
    describe_difference,
    read_manifest_file,
    read_tensors,
    restore_adapters,
    write_tensors,
)
from rlhf_drive.policies.lora import LoraSettings, lora_settings
from rlhf_drive.policies.policy import Policy

__all__ = ["load_adapter", "save_adapter"]

ADAPTER_WEIGHTS = "adapter.safetensors"
ADAPTER_MANIFEST = "adapter.json"


def save_adapter(policy: Policy, folder: Path | str, *, info: Mapping[str, Any] | None = None) -> None:
    """Write the adapters of `policy` without the weights they change.

    Args:
        policy: A policy with adapters.
        folder: Made if absent; an adapter in it is overwritten.
        info: What the writer wants remembered: plain JSON data.

    Raises:
        ConfigError: The policy has no adapters.
    """
    lora = lora_settings(policy)
    if lora is None:
        raise ConfigError("The policy has no adapters to save. Save it whole with save_policy.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    manifest = {
        "format": FORMAT,
        "base": {**policy.describe(), "weights": _digests(base_state(policy))},
        "lora": dataclasses.asdict(lora),
        "sha256": write_tensors(adapter_state(policy), folder / ADAPTER_WEIGHTS),
        "trained_on": sorted(policy.trained_on),
        "info": dict(info or {}),
    }
    (folder / ADAPTER_MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def load_adapter(base: Policy, folder: Path | str) -> Policy:
    """Put saved adapters into the policy that they were trained on.

    Args:
        base: That policy, with the very same weights and no adapters; it is changed in place.
        folder: What :func:`save_adapter` wrote.

    Returns:
        The same policy; it also remembers the scenes that the adapters learned from.

    Raises:
        CheckpointError: PEFT is not installed, a file is missing or damaged, or this is another base: the message names
            every difference.
        ConfigError: `base` has adapters.
    """
    folder = Path(folder)
    path = folder / ADAPTER_MANIFEST
    advice = "Give a folder that save_adapter wrote."
    manifest = read_manifest_file(path, {"base", "lora", "sha256"}, advice)
    tensors = read_tensors(folder / ADAPTER_WEIGHTS, manifest["sha256"], ADAPTER_MANIFEST)
    if not (isinstance(manifest["base"], dict) and isinstance(manifest["base"].get("weights"), dict)):
        raise CheckpointError(f"{path} does not name the base's weights; the checkpoint is damaged.")
    described = complete_description({**manifest["base"], "lora": manifest["lora"]}, path)
    settings = LoraSettings(**described.pop("lora"))
    if lora_settings(base) is not None:
        raise ConfigError(f"The policy has adapters already; {folder} needs its base without any.")
    _check_base(base, described, manifest["base"]["weights"], folder)
    restore_adapters(base, settings, tensors, folder / ADAPTER_WEIGHTS)
    base.trained_on |= frozenset(manifest.get("trained_on", ()))
    return base


def _check_base(base: Policy, described: Mapping[str, Any], weights: Mapping[str, str], folder: Path) -> None:
    difference = describe_difference(described, base.describe())
    if not difference:
        own = _digests(base_state(base))
        differing = [name for name in sorted(set(weights) | set(own)) if weights.get(name) != own.get(name)]
        if differing:
            difference = f"{len(differing)} of {len(own)} weights, first {', '.join(differing[:3])}"
    if difference:
        raise CheckpointError(
            f"The adapters in {folder} belong to another base policy ({difference}). Load the policy that they were "
            "trained on."
        )


def _digests(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Sixteen hexadecimal digits of SHA-256 over type, shape and content of every tensor."""
    return {name: _digest(tensor) for name, tensor in state.items()}


def _digest(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().flatten()
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
