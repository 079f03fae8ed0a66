"""Policies: tokenizer, sparse-MoE backbone, decoding processes, checkpoints, LoRA adapters."""

from rlhf_drive.policies.adapter_files import load_adapter, save_adapter
from rlhf_drive.policies.adapters import disable_adapter
from rlhf_drive.policies.checkpoints import load_policy, save_policy
from rlhf_drive.policies.lora import LoraSettings, add_lora, merged
from rlhf_drive.policies.policy import Architecture, Policy
from rlhf_drive.policies.process import DECODE_ORDERS, Decoding, Denoiser
from rlhf_drive.policies.tokenizer import TrajectoryTokenizer
from rlhf_drive.policies.trace import DecodeTrace
from rlhf_drive.policies.transformer import SceneContext

__all__ = [
    "DECODE_ORDERS",
    "Architecture",
    "DecodeTrace",
    "Decoding",
    "Denoiser",
    "LoraSettings",
    "Policy",
    "SceneContext",
    "TrajectoryTokenizer",
    "add_lora",
    "disable_adapter",
    "load_adapter",
    "load_policy",
    "merged",
    "save_adapter",
    "save_policy",
]
