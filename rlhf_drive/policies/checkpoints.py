"""Policy checkpoints: `policy.safetensors` and a manifest that rebuilds the policy."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rlhf_drive.errors import CheckpointError, RlhfDriveError
from rlhf_drive.policies.policy import Architecture, Policy
from rlhf_drive.policies.tokenizer import TrajectoryTokenizer

__all__ = [
    "describe_difference",
    "load_policy",
    "read_manifest",
    "replace_folder",
    "restore_folder",
    "save_policy",
    "sha256",
]

FORMAT = 1
WEIGHTS = "policy.safetensors"
MANIFEST = "policy.json"


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def replace_folder(temporary: Path, final: Path) -> None:
    """Put a finished folder in its place. A crash never leaves half a folder; between the two renames it leaves the old
    one under another name, which :func:`restore_folder` undoes."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.replace(old)
    temporary.replace(final)
    shutil.rmtree(old, ignore_errors=True)


def restore_folder(final: Path) -> None:
    """Bring back a folder that a crash inside :func:`replace_folder` left under its other name."""
    old = final.with_name(f".{final.name}.old")
    if old.exists() and not final.exists():
        old.replace(final)


def save_policy(policy: Policy, folder: Path, *, info: Mapping[str, Any] | None = None) -> None:
    """Write weights, then the manifest that vouches for them. The folder must exist and be the caller's own.

    Args:
        policy: The policy; weights are stored in their own dtype.
        folder: Existing folder.
        info: What the writer wants remembered (recipe, step, scores): plain JSON data.
    """
    from safetensors.torch import save_file

    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in policy.state_dict().items()}
    save_file(weights, folder / WEIGHTS)
    manifest = {
        "format": FORMAT,
        **policy.describe(),
        "sha256": sha256(folder / WEIGHTS),
        "trained_on": sorted(policy.trained_on),
        "info": dict(info or {}),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder; CheckpointError names the file and what is wrong with it."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(
            f"No policy checkpoint in {folder}: {MANIFEST} is missing. Give a folder that `rlhf-drive train` wrote, "
            "such as RUN/sft/policy or RUN/rl-seed0/policy."
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); the checkpoint is damaged.") from None
    missing = {"format", "architecture", "tokenizer", "process", "sha256"} - set(manifest)
    if missing or manifest["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has format {manifest.get('format')!r} and lacks {sorted(missing)}; this version "
            f"reads format {FORMAT}."
        )
    return dict(manifest)


def load_policy(folder: Path | str, *, device: torch.device | str = "cpu") -> Policy:
    """Rebuild a policy from its checkpoint folder.

    Raises:
        CheckpointError: Missing or damaged file, wrong format, or weights that do not fit the manifest.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    manifest = read_manifest(folder)
    weights_path = folder / WEIGHTS
    if not weights_path.is_file():
        raise CheckpointError(f"{weights_path} is missing; the checkpoint is incomplete.")
    if sha256(weights_path) != manifest["sha256"]:
        raise CheckpointError(f"{weights_path} does not match the checksum in {MANIFEST}: truncated or altered.")
    try:
        architecture, tokenizer = Architecture(**manifest["architecture"]), TrajectoryTokenizer(**manifest["tokenizer"])
        options = dict(manifest["process"])
        policy = Policy(architecture, tokenizer, options.pop("name"), options)
        weights = load_file(weights_path)
    except (TypeError, KeyError, SafetensorError, RlhfDriveError) as error:
        raise CheckpointError(f"{folder} cannot be rebuilt: {error}") from error
    expected = policy.state_dict()
    differing = sorted(
        set(weights) ^ set(expected)
        | {n for n in set(weights) & set(expected) if weights[n].shape != expected[n].shape}
    )
    if differing:
        raise CheckpointError(
            f"{weights_path} does not fit its manifest; differing tensors: {', '.join(differing[:5])}."
        )
    policy.load_state_dict(weights)
    policy.trained_on = frozenset(manifest.get("trained_on", ()))
    return policy.to(device)


def describe_difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """The entries in which two policy descriptions differ, as text."""
    parts = []
    for section in sorted(set(a) | set(b)):
        left, right = dict(a.get(section, {})), dict(b.get(section, {}))
        parts += [
            f"{section}.{key}: {left.get(key)} there, {right.get(key)} here"
            for key in sorted(set(left) | set(right))
            if left.get(key) != right.get(key)
        ]
    return "; ".join(parts)
