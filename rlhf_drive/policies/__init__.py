"""Policies: tokenizer, sparse-MoE backbone, decoding processes, checkpoints."""

from rlhf_drive.policies.checkpoints import load_policy, save_policy
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
    "Policy",
    "SceneContext",
    "TrajectoryTokenizer",
    "load_policy",
    "save_policy",
]
