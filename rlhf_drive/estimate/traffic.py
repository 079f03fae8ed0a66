"""What one call of each piece of work costs a device: operations, bytes moved, kernels started.

A piece is a call of one part of the policy: encoding scenes, one decoder pass, the head. Bytes are estimates: what a
pass keeps for the backward pass is written once and read twice, and the head's element by element work over the
vocabulary is counted operation by operation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rlhf_drive.estimate.counts import Parameters, decode_flops, encode_flops, head_flops
from rlhf_drive.estimate.memory import decoder_saved, encoder_saved
from rlhf_drive.estimate.sizes import NetworkSizes

__all__ = ["PIECES", "Cost", "costs_of"]

PIECES = (
    *("encode", "encode_forward", "encode_backward", "decode", "decode_forward", "decode_backward", "next"),
    *("draw", "logp", "logp_forward", "logp_backward", "entropy_forward", "objective", "optimizer"),
)
"""Pieces of work on the policy's device. `…_forward` keeps what the backward pass needs; `entropy_forward` also
computes entropies; `next` is one position of an autoregressive decode."""
HEAD_PASSES, DRAW_PASSES, LOGP_PASSES, ENTROPY_PASSES = 57, 20, 10, 12
"""Reads and writes of one logit: by the head, in drawing, for a log-probability, for an entropy."""
OPTIMIZER_BYTES = 64
"""Of AdamW and of the gradients' norm, a parameter: 28 for weights, gradients and moments, and as much again between
the operations of a `foreach` optimizer, 8 for the norm."""


@dataclass(frozen=True)
class Cost:
    """Of one call with n units: ``flops * n`` operations, ``fixed_bytes + bytes * n`` moved."""

    unit: str
    """What a unit is."""
    flops: float
    """Operations a unit."""
    bytes: float
    """Bytes a unit."""
    fixed_bytes: float
    """Bytes a call: the weights."""
    kernels: float
    """Kernels a call starts."""


def costs_of(net: NetworkSizes, params: Parameters, *, rows_per_scene: float, element: int = 4) -> Mapping[str, Cost]:
    """Cost by piece.

    Args:
        net: The policy's sizes.
        params: Its parameters.
        rows_per_scene: Plan states that share an encoded scene in a decoder pass.
        element: Bytes of a number in matrix products: 4 or 2.
    """
    encode, decode, head = encode_flops(net), decode_flops(net, rows_per_scene), head_flops(net)
    encoder_bytes, decoder_bytes = 3.0 * encoder_saved(net, element), 3.0 * decoder_saved(net, element)
    enc_kernels, dec_kernels = 40.0 + 16 * net.encoder_layers, 60.0 + 45 * net.decoder_layers
    # Weights are read in float32; for bfloat16 products a copy is written and read in every pass.
    weight = 4 if element == 4 else 8
    encoder, decoder = weight * params.encoder, weight * (params.decoder + params.experts + params.routers)
    weights, v = weight * params.head, 4.0 * net.vocabulary
    forward = (HEAD_PASSES + LOGP_PASSES) * v
    return {
        "encode": Cost("scene", encode, encoder_bytes, encoder, enc_kernels),
        "encode_forward": Cost("scene", encode, encoder_bytes, encoder, enc_kernels),
        "encode_backward": Cost("scene", 2.0 * encode, 2.0 * encoder_bytes, 2.0 * encoder, 2.0 * enc_kernels),
        "decode": Cost("state", decode, decoder_bytes, decoder, dec_kernels),
        "decode_forward": Cost("state", decode, decoder_bytes, decoder, dec_kernels),
        "decode_backward": Cost("state", 2.0 * decode, 2.0 * decoder_bytes, 2.0 * decoder, 2.0 * dec_kernels),
        "next": Cost("position", decode / net.length, decoder_bytes / net.length, decoder, dec_kernels),
        "draw": Cost("position", head, (HEAD_PASSES + DRAW_PASSES) * v, weights, 80.0),
        "logp": Cost("position", head, forward, weights, 70.0),
        "logp_forward": Cost("position", head, forward, weights, 70.0),
        "logp_backward": Cost("position", 2.0 * head, 2.0 * forward, 2.0 * weights, 140.0),
        "entropy_forward": Cost("position", head, forward + ENTROPY_PASSES * v, weights, 80.0),
        "objective": Cost("plan", 0.0, 50.0 * 4 * net.length, 0.0, 300.0),
        "optimizer": Cost("update", 0.0, 0.0, OPTIMIZER_BYTES * params.trained, 60.0),
    }
