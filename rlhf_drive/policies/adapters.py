"""What low-rank adapters inside a policy are: which weights they change, their state, and how to switch them off.

PEFT wraps an adapted layer, which puts ``base_layer`` into the names of its weights. Here everything goes by the plain
names that the policy has without adapters, so that files and messages do not depend on how PEFT nests its wrappers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rlhf_drive.errors import CheckpointError, ConfigError
from rlhf_drive.policies.policy import Policy

__all__ = ["ADAPTER", "adapter_layers", "adapter_state", "base_state", "disable_adapter", "load_adapter_state"]

ADAPTER = "default"
"""PEFT's name of the one adapter a policy has."""
FACTORS = ("lora_A", "lora_B")


def adapter_layers(policy: Policy) -> dict[str, Any]:
    """PEFT's adapted layers by the plain name of the weight each one changes; empty without adapters."""
    if not hasattr(policy, "peft_config"):
        return {}
    from peft.tuners.lora import LoraLayer

    found = {}
    for name, module in policy.named_modules():
        if isinstance(module, LoraLayer):
            found[_plain(f"{name}.{getattr(module, 'parameter_name', 'weight')}")] = module
    return found


def adapter_state(policy: Policy, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The factors, ``{weight}.lora_A`` and ``{weight}.lora_B``, as PEFT holds them.

    A matrix ``W [out, in]`` has ``A [r, in]`` and ``B [out, r]``. Expert weights ``W [E, in, out]`` have
    ``A [E * r, in]``, expert by expert, and ``B [out, r * E]``, in which column ``i * E + e`` is factor i of expert e.

    Args:
        policy: A policy; without adapters the result is empty.
        state: A state dict of it to take them from, where its own holds parts only.
    """
    if state is not None:
        names = {layer: name for name, layer in policy.named_modules()}
        return {
            f"{weight}.{factor}": state[f"{names[layer]}.{factor}.{ADAPTER}.weight"]
            for weight, layer in adapter_layers(policy).items()
            for factor in FACTORS
        }
    return {
        f"{weight}.{factor}": getattr(layer, factor)[ADAPTER].weight
        for weight, layer in adapter_layers(policy).items()
        for factor in FACTORS
    }


def base_state(policy: Policy, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The weights below the adapters, by plain name; the whole state of a policy without adapters.

    Args:
        policy: With or without adapters.
        state: A state dict of it to take them from, where its own holds parts only.
    """
    own = policy.state_dict() if state is None else state
    return {_plain(name): tensor for name, tensor in own.items() if not set(name.split(".")) & set(FACTORS)}


@torch.no_grad()
def load_adapter_state(policy: Policy, state: Mapping[str, Tensor], where: str) -> None:
    """Copy factors into the policy's adapters.

    Raises:
        CheckpointError: Names or shapes differ; the message starts with `where`.
    """
    own = adapter_state(policy)
    differing = sorted(set(own) ^ set(state) | {n for n in set(own) & set(state) if own[n].shape != state[n].shape})
    if differing:
        raise CheckpointError(f"{where} does not fit its manifest; differing tensors: {', '.join(differing[:5])}.")
    for name, tensor in own.items():
        tensor.copy_(state[name])


@contextmanager
def disable_adapter(policy: Policy) -> Iterator[Policy]:
    """Within the block `policy` is its own base, bit for bit: a reference policy that costs no memory.

    Encoded scenes depend on the adapters too, so encode inside the block::

        with torch.no_grad(), disable_adapter(policy) as reference:
            context = reference.encode(observations)

    Run no backward pass inside: what activation checkpointing computes again would be the base's.

    Raises:
        ConfigError: The policy has no adapters.
    """
    layers = list(adapter_layers(policy).values())
    if not layers:
        raise ConfigError("The policy has no adapters to switch off. Add them with add_lora, or keep a frozen copy.")
    disabled = [layer.disable_adapters for layer in layers]
    # Switching an adapter off and on again sets requires_grad, also where the caller had frozen it.
    learning = {parameter: parameter.requires_grad for parameter in adapter_state(policy).values()}
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield policy
    finally:
        for layer, off in zip(layers, disabled, strict=True):
            layer.enable_adapters(not off)
        for parameter, requires_grad in learning.items():
            parameter.requires_grad_(requires_grad)


def _plain(name: str) -> str:
    """A weight's name without PEFT's wrappers."""
    return ".".join(part for part in name.split(".") if part != "base_layer")
