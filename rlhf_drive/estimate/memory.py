"""Bytes of a training process, of a sampler, and of what is written and sent, counted from sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rlhf_drive.estimate.counts import Parameters, decode_visits, visits_of
from rlhf_drive.estimate.sizes import NetworkSizes, StepSizes
from rlhf_drive.likelihood.scoring import LOGITS_LIMIT

__all__ = [
    "Memory",
    "checkpoint_bytes",
    "decode_passes",
    "decoder_saved",
    "encoder_saved",
    "experience_bytes",
    "sampler_memory",
    "trainer_memory",
]

LOGITS_KEPT = 16
"""Arrays of ``[positions, V]`` that the head and a log-probability keep for the backward pass, and `ENTROPY_KEPT` more
with entropies."""
ENTROPY_KEPT = 3
LOGITS_DRAWN = 8
"""Such arrays at once in drawing, one of float64 counted twice."""
FEATURE_BYTES = 30_000
"""Network inputs of a scene in the cache."""


@dataclass(frozen=True)
class Memory:
    """Bytes by what holds them, largest when all are there at once."""

    weights: float = 0.0
    """Of the policy, float32; with bfloat16 products also their copies."""
    gradients: float = 0.0
    """Of trained weights."""
    moments: float = 0.0
    """Of AdamW."""
    average: float = 0.0
    """Moving average of the weights."""
    reference: float = 0.0
    """The frozen reference policy."""
    snapshot: float = 0.0
    """Weights and optimizer as they were before the step."""
    gathered: float = 0.0
    """FSDP2: the whole policy, to sample from or to push, and two layers at work; DDP: the buckets of gradients."""
    activations: float = 0.0
    """What a micro-batch keeps for the backward pass."""
    logits: float = 0.0
    """What the head keeps, or what drawing needs."""
    traces: float = 0.0
    """The step's rollouts: states and actions of all decode steps."""

    @property
    def total(self) -> float:
        """All of them."""
        return math.fsum(vars(self).values())


def encoder_saved(net: NetworkSizes, element: int = 4) -> float:
    """Bytes that encoding one scene keeps for the backward pass, keys and values of the decoder's layers included."""
    d, m = net.width, net.scene_tokens
    layer = 12 * d + net.heads + 4
    return element * m * (net.encoder_layers * layer + 4 * d + 2 * d * net.decoder_layers)


def decoder_saved(net: NetworkSizes, element: int = 4, *, checkpointing: bool = False) -> float:
    """Bytes that a decoder pass keeps for the backward pass, for one state of L tokens.

    Per token and layer: both attentions 12 d, the shared expert 2 f, and for each routed expert its input and output
    (2 d) and its hidden numbers before and after the activation (2 f). With checkpointing a layer keeps its input, and
    one layer at a time is there in full.
    """
    d, f, p = net.width, net.expert_width, net.experts_of_token
    layer = 13 * d + 2 * f + p * (2 * d + 2 * f) + 2 * net.experts + net.heads
    layers = layer + net.decoder_layers * d if checkpointing else net.decoder_layers * layer
    return element * net.length * (layers + 2 * d + 40)


def trainer_memory(
    net: NetworkSizes,
    params: Parameters,
    step: StepSizes,
    *,
    processes: int = 1,
    sharded: bool = False,
    element: int = 4,
    samples: bool = True,
) -> Memory:
    """Of one training process.

    Args:
        net: The policy's sizes.
        params: Its parameters.
        step: What an RL step asks for.
        processes: Training processes.
        sharded: Whether weights, gradients and moments are divided among them (FSDP2).
        element: Bytes of a number in matrix products: 4, or 2 for bfloat16.
        samples: Whether it samples too (rollout engine `local`).
    """
    part = 1.0 / processes if sharded else 1.0
    trained, whole = 4.0 * params.trained, 4.0 * params.total
    copies = element * params.total if element < 4 and not sharded else 0.0
    layer = whole / max(1, net.decoder_layers)
    seen, scenes = visits_of(net, step), step.micro_scenes
    states = seen.states * step.group * scenes
    limit = step.max_tokens // net.length if step.max_tokens else states
    in_pass = min(states, max(limit, scenes))
    positions = seen.positions * step.group * scenes * in_pass / states
    kept = 4.0 * net.vocabulary * min(positions, max(1, LOGITS_LIMIT // net.vocabulary))
    drawn = 0.0
    if samples:
        visits = decode_visits(net, step)
        rows = min(step.chunk * step.group, 2048)
        drawn = 4.0 * net.vocabulary * LOGITS_DRAWN * rows * visits.positions / decode_passes(net, step)
    entropy = ENTROPY_KEPT  # the first update of a step always computes them
    return Memory(
        weights=whole * part + copies,
        gradients=trained * part,
        moments=2 * trained * part,
        average=trained * part if step.ema else 0.0,
        reference=whole if step.reference and not step.lora_rank else 0.0,  # whole on every process, FSDP2 or not
        snapshot=3 * trained * part if step.snapshot else 0.0,
        gathered=whole + 2 * layer if sharded else (trained if processes > 1 else 0.0),
        activations=in_pass * decoder_saved(net, element, checkpointing=step.checkpointing)
        + scenes * encoder_saved(net, element),
        logits=max(kept * (LOGITS_KEPT + entropy), drawn),
        traces=experience_bytes(net, step),
    )


def decode_passes(net: NetworkSizes, step: StepSizes) -> int:
    """Forward passes of a decode."""
    return step.decode_steps if net.process == "flow" else min(step.decode_steps, net.length)


def sampler_memory(net: NetworkSizes, params: Parameters, step: StepSizes, *, element: int = 4) -> Memory:
    """Of one rollout worker, which samples a chunk at a time."""
    visits, rows = decode_visits(net, step), min(step.chunk * step.group, 2048)
    # Without gradients a layer's numbers are there one layer at a time.
    layer = decoder_saved(net, element, checkpointing=True) * rows
    return Memory(
        weights=4.0 * params.total + (element * params.total if element < 4 else 0.0),
        activations=layer + min(step.chunk, 256) * encoder_saved(net, element),
        logits=4.0 * net.vocabulary * LOGITS_DRAWN * rows * visits.positions / decode_passes(net, step),
        traces=experience_bytes(net, step) * step.chunk / step.scenes,
    )


def experience_bytes(net: NetworkSizes, step: StepSizes) -> float:
    """Of a step's rollouts and scores: what every process holds, and what is sent to it.

    A slot of a trace: state and action int64, scored bool, log-probability float32. A plan: 8 poses of three float64,
    tokens int64, some 20 scores. Routing, where it is kept, is int16.
    """
    slots = decode_passes(net, step) * net.length
    row = 1.0 * slots * (8 + 8 + 1 + 4) + net.length // 2 * 3 * 8 + net.length * 8 + 20 * 8
    if step.keep_experts:
        passes = 1 if net.process == "autoregressive" else decode_passes(net, step)
        row += passes * net.decoder_layers * net.length * net.experts_of_token * 2
    return row * step.rows


def checkpoint_bytes(params: Parameters, step: StepSizes) -> float:
    """Of a checkpoint on disk: weights, moments, averages."""
    return 4.0 * (params.total + 2 * params.trained + (params.trained if step.ema else 0))
