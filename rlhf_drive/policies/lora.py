"""LoRA (arXiv 2106.09685) on a policy through PEFT: ``W + alpha / rank * B A`` on attention and on expert weights.

    policy = add_lora(load_policy(folder), LoraSettings(rank=8, alpha=16, experts=True))
    ...                            # train: only the adapters have gradients
    with disable_adapter(policy):  # the policy as it was before training: the reference
        ...
    save_policy(merged(policy), out)

What is left alone: embeddings, norms, routers, shared experts and the numeric head. The reference is the policy with
its adapters switched off; a head trained beside them would change the reference too.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import nn

from rlhf_drive.errors import ConfigError
from rlhf_drive.policies.adapters import ADAPTER, adapter_layers, adapter_state
from rlhf_drive.policies.policy import Policy
from rlhf_drive.policies.transformer import DecoderLayer, SelfAttention

__all__ = ["LoraSettings", "add_lora", "lora_settings", "merged"]

EXPERT_WEIGHTS = ("up", "down")


@dataclass(frozen=True)
class LoraSettings:
    """Which adapters a policy has; stored in the manifest of its checkpoints."""

    rank: int
    """r, the rank of every change; for expert weights, of every expert's change."""
    alpha: float
    """The change is ``alpha / rank * B A``."""
    experts: bool
    """Whether routed experts' weights are adapted too, beside attention."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"LoRA rank is {self.rank}; it must be at least 1.")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ConfigError(f"LoRA alpha is {self.alpha}; it must be a positive number, such as twice the rank.")


def lora_settings(policy: Policy) -> LoraSettings | None:
    """The adapters of a policy; None if it has none."""
    configs = getattr(policy, "peft_config", None)
    if configs is None:
        return None
    config = configs[ADAPTER]
    return LoraSettings(config.r, config.lora_alpha, bool(config.target_parameters))


def add_lora(policy: Policy, settings: LoraSettings, *, seed: int = 0) -> Policy:
    """Put adapters into `policy` and freeze everything else. Outputs do not change: every B is zero.

    Args:
        policy: A policy without adapters; it is changed in place.
        settings: Rank, scale, and whether experts are adapted.
        seed: Of the A factors, uniform within ``1 / sqrt(in)``.

    Returns:
        The same policy. Adapters are float32 whatever the weights' own type is.

    Raises:
        ConfigError: PEFT is not installed or too old, the policy has adapters, or the rank exceeds a weight's sides.
    """
    if lora_settings(policy) is not None:
        raise ConfigError("The policy has LoRA adapters already. Merge them first, or start from the base policy.")
    modules = _attention_linears(policy)
    parameters = _expert_weights(policy) if settings.experts else []
    smallest = min(min(policy.get_parameter(name).shape[-2:]) for name in [f"{m}.weight" for m in modules] + parameters)
    if settings.rank > smallest:
        raise ConfigError(
            f"LoRA rank {settings.rank} exceeds {smallest}, the shorter side of an adapted weight: adapters would be "
            f"larger than what they adapt. Use a rank of at most {smallest}."
        )
    _inject(policy, settings, modules, parameters)
    if set(adapter_layers(policy)) != {f"{m}.weight" for m in modules} | set(parameters):
        raise ConfigError("This version of PEFT does not adapt what was asked for. " + _install())
    _start(policy, seed)
    return policy.train(policy.training)


def merged(policy: Policy) -> Policy:
    """A plain copy of a policy whose weights include the adapters' changes; equal to rounding, without PEFT.

    The policy itself keeps its adapters. A policy without adapters is copied as it is.
    """
    plain = copy.deepcopy(policy)
    layers = adapter_layers(plain)
    if not layers:
        return plain
    for layer in layers.values():
        layer.merge()
    wrapped = {layer: layer.get_base_layer() for layer in layers.values()}
    for parent in list(plain.modules()):
        for name, child in list(parent.named_children()):
            if child in wrapped and parent not in wrapped:
                setattr(parent, name, wrapped[child])
    del plain.peft_config
    return plain.requires_grad_(True)


def _attention_linears(policy: Policy) -> list[str]:
    """Names of the projections of all self- and cross-attention."""
    return [
        f"{name}.{child}"
        for name, module in policy.named_modules()
        if isinstance(module, SelfAttention | DecoderLayer)
        for child, linear in module.named_children()
        if isinstance(linear, nn.Linear)
    ]


def _expert_weights(policy: Policy) -> list[str]:
    """Names of the weights ``[E, in, out]`` of all routed experts."""
    layers = [name for name, module in policy.named_modules() if isinstance(module, DecoderLayer)]
    return [f"{name}.moe.{weight}" for name in layers for weight in EXPERT_WEIGHTS]


def _inject(policy: Policy, settings: LoraSettings, modules: list[str], parameters: list[str]) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError("LoRA needs the package peft. " + _install()) from error
    for module in policy.modules():
        if isinstance(module, DecoderLayer):
            # PEFT takes 3-D weights for [E, out, in] unless told; then A would act on the expert's output.
            vars(module.moe)["is_transposed"] = True
    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=0.0, bias="none",
        target_modules=modules, target_parameters=parameters,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):  # PEFT draws from torch's own generator
        inject_adapter_in_model(config, policy, ADAPTER)


@torch.no_grad()
def _start(policy: Policy, seed: int) -> None:
    """B zero, A drawn from `seed` on the CPU, so that all devices start alike."""
    generator = torch.Generator().manual_seed(seed)
    for name, factor in adapter_state(policy).items():
        factor.data = factor.data.float()
        if name.endswith("lora_B"):
            factor.zero_()
        else:
            bound = factor.shape[1] ** -0.5
            factor.copy_(torch.rand(factor.shape, generator=generator) * (2 * bound) - bound)


def _install() -> str:
    return 'Install it: pip install "rlhf-drive[lora]"'
