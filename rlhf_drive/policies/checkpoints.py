"""Policy checkpoints: `policy.safetensors` and a manifest that rebuilds the policy, with its adapters if it has any."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_drive.disk import replace_folder, restore_folder, writing
from rlhf_drive.errors import CheckpointError, RlhfDriveError
from rlhf_drive.policies.adapters import adapter_state, base_state, load_adapter_state
from rlhf_drive.policies.lora import LoraSettings, add_lora, lora_settings
from rlhf_drive.policies.policy import Architecture, Policy
from rlhf_drive.policies.processes import build_process
from rlhf_drive.policies.tokenizer import TrajectoryTokenizer

__all__ = [
    "check_same",
    "complete_description",
    "describe_difference",
    "describe_policy",
    "load_policy",
    "read_manifest",
    "read_manifest_file",
    "read_tensors",
    "replace_folder",
    "restore_adapters",
    "restore_folder",
    "save_policy",
    "sha256",
    "write_tensors",
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


def describe_policy(policy: Policy) -> dict[str, dict[str, object]]:
    """What rebuilds a policy, its adapters included: :meth:`Policy.describe` and, with adapters, section `lora`."""
    lora = lora_settings(policy)
    return {**policy.describe(), **({} if lora is None else {"lora": dataclasses.asdict(lora)})}


def save_policy(
    policy: Policy,
    folder: Path,
    *,
    info: Mapping[str, Any] | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write weights, then the manifest that vouches for them. The folder must exist and be the caller's own.

    Args:
        policy: The policy; weights are stored in their own dtype. Adapters are stored beside the base that they change;
            to publish a plain policy, save :func:`~rlhf_drive.policies.lora.merged`.
        folder: Existing folder.
        info: What the writer wants remembered (recipe, step, scores): plain JSON data.
        weights: A state dict of `policy` to write in place of its own, as where a process holds a part of it only.

    Raises:
        StorageError: They cannot be written.
    """
    tensors = {**base_state(policy, weights), **adapter_state(policy, weights)}
    manifest = {
        "format": FORMAT,
        **describe_policy(policy),
        "sha256": write_tensors(tensors, folder / WEIGHTS),
        "trained_on": sorted(policy.trained_on),
        "info": dict(info or {}),
    }
    with writing("A policy", folder):
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> str:
    """Write tensors as safetensors; the file's :func:`sha256`.

    Raises:
        StorageError: They cannot be written.
    """
    from safetensors.torch import save_file

    with writing("Weights", path):
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
        return sha256(path)


def read_tensors(path: Path, digest: str, manifest: str) -> dict[str, Tensor]:
    """Tensors of a safetensors file whose :func:`sha256` the file called `manifest` vouches for.

    Raises:
        CheckpointError: The file is missing, truncated or altered.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise CheckpointError(f"{path} is missing; the checkpoint is incomplete.")
    if sha256(path) != digest:
        raise CheckpointError(f"{path} does not match the checksum in {manifest}: truncated or altered.")
    try:
        return dict(load_file(path))
    except SafetensorError as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder; CheckpointError names the file and what is wrong with it."""
    if (folder / "adapter.json").is_file() and not (folder / MANIFEST).exists():
        raise CheckpointError(
            f"{folder} holds adapters alone, which change a policy and are none. Give the folder `policy` beside it, "
            "into which `rlhf-drive train` has merged them; or put them into their base with load_adapter, and save "
            "that with save_policy."
        )
    return read_manifest_file(
        folder / MANIFEST,
        {"architecture", "tokenizer", "process", "sha256"},
        "Give a folder that `rlhf-drive train` wrote, such as RUN/sft/policy or RUN/rl-seed0/policy.",
    )


def read_manifest_file(path: Path, keys: set[str], advice: str) -> dict[str, Any]:
    """A manifest of this version's format that has `keys`.

    Raises:
        CheckpointError: It is missing (`advice` says what to do), damaged, or of another format.
    """
    try:
        manifest = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"No checkpoint in {path.parent}: {path.name} is missing. {advice}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); the checkpoint is damaged.") from None
    if not isinstance(manifest, dict):
        raise CheckpointError(f"{path} holds no JSON object; the checkpoint is damaged.")
    missing = keys - set(manifest)
    if missing or manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has format {manifest.get('format')!r} and lacks {sorted(missing)}; this version "
            f"reads format {FORMAT}."
        )
    return manifest


def complete_description(manifest: Mapping[str, Any], path: Path) -> dict[str, dict[str, Any]]:
    """A manifest's sections with today's defaults for what an older version did not write.

    Raises:
        CheckpointError: An entry is unknown to this version, or unusable; the message starts with `path`.
    """
    try:
        tokenizer = TrajectoryTokenizer(**_known(manifest, "tokenizer", TrajectoryTokenizer, path))
        options = dict(manifest["process"])
        process = build_process(options.pop("name"), options, tokenizer)
        described: dict[str, dict[str, Any]] = {
            "architecture": dataclasses.asdict(Architecture(**_known(manifest, "architecture", Architecture, path))),
            "tokenizer": dataclasses.asdict(tokenizer),
            "process": {"name": process.name, **process.options()},
        }
        if "lora" in manifest:
            described["lora"] = dataclasses.asdict(LoraSettings(**_known(manifest, "lora", LoraSettings, path)))
    except CheckpointError:
        raise
    except (TypeError, ValueError, KeyError, RlhfDriveError) as error:
        raise CheckpointError(f"{path} does not describe a policy: {error}") from error
    return described


def _known(manifest: Mapping[str, Any], section: str, kind: type, path: Path) -> dict[str, Any]:
    """A section's entries; CheckpointError if `kind` has no such field."""
    entries = dict(manifest[section])
    unknown = sorted(set(entries) - {field.name for field in dataclasses.fields(kind)})
    if unknown:
        raise CheckpointError(
            f"{path} has {', '.join(f'{section}.{name}' for name in unknown)}, which this version does not know: a "
            "newer version of rlhf-drive wrote it. Install that version to use the checkpoint."
        )
    return entries


def load_policy(folder: Path | str, *, device: torch.device | str = "cpu") -> Policy:
    """Rebuild a policy from its checkpoint folder, with the adapters it was saved with.

    Raises:
        CheckpointError: Missing or damaged file, wrong format, or weights that do not fit the manifest.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    weights = read_tensors(folder / WEIGHTS, manifest["sha256"], MANIFEST)
    described = complete_description(manifest, folder / MANIFEST)
    options = dict(described["process"])
    try:
        policy = Policy(
            Architecture(**described["architecture"]), TrajectoryTokenizer(**described["tokenizer"]),
            options.pop("name"), options,
        )  # fmt: skip
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: torch refuses the sizes
        raise CheckpointError(f"{folder} cannot be rebuilt: {error}") from error
    expected = policy.state_dict()
    adapters = {name: weights.pop(name) for name in list(weights) if name.endswith((".lora_A", ".lora_B"))}
    differing = sorted(
        set(weights) ^ set(expected)
        | {n for n in set(weights) & set(expected) if weights[n].shape != expected[n].shape}
    )
    if differing or (adapters and "lora" not in described):
        raise CheckpointError(
            f"{folder / WEIGHTS} does not fit its manifest; differing tensors: "
            f"{', '.join((differing or sorted(adapters))[:5])}."
        )
    policy.load_state_dict(weights)
    if "lora" in described:
        restore_adapters(policy, LoraSettings(**described["lora"]), adapters, folder / WEIGHTS)
    policy.trained_on = frozenset(manifest.get("trained_on", ()))
    return policy.to(device)


def restore_adapters(policy: Policy, settings: LoraSettings, state: Mapping[str, Tensor], path: Path) -> None:
    """Add adapters to `policy` and fill them with what the file at `path` holds.

    Raises:
        CheckpointError: They cannot be added, as where PEFT is not installed, or do not fit.
    """
    try:
        add_lora(policy, settings)
    except (TypeError, RlhfDriveError) as error:
        raise CheckpointError(f"The adapters of {path} cannot be used: {error}") from error
    load_adapter_state(policy, state, str(path))


def check_same(found: Policy, expected: Policy, what: str, advice: str = "") -> None:
    """Refuse a policy of another architecture, tokenizer, process or adapters.

    Args:
        found: The policy that was loaded.
        expected: The policy that it should be like; weights are not compared.
        what: The message's beginning, such as ``"sft.policy runs/a does not fit the recipe"``.
        advice: The message's end: what to do.

    Raises:
        CheckpointError: They differ; the message names every difference.
    """
    there, here = describe_policy(found), describe_policy(expected)
    if there == here:
        return
    difference = describe_difference(there, here)
    if found.vocab_size != expected.vocab_size:
        difference += f"; vocabulary: {found.vocab_size} numbers there, {expected.vocab_size} here"
    raise CheckpointError(f"{what} ({difference}). {advice}".rstrip())


def describe_difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """The entries in which two policy descriptions differ, as text."""
    parts = []
    for section in sorted(set(a) | set(b)):
        left, right = dict(a.get(section, {})), dict(b.get(section, {}))
        parts += [
            f"{section}.{key}: {left.get(key, 'nothing')} there, {right.get(key, 'nothing')} here"
            for key in sorted(set(left) | set(right))
            if left.get(key, "nothing") != right.get(key, "nothing")
        ]
    return "; ".join(parts)
