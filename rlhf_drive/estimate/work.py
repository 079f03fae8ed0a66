"""An RL step as calls of pieces: how often each is called, and with how many units.

This page follows the code: sampling (`rollout.service`, the processes' `sample`), log-probabilities (`likelihood`),
and the update (`training.trainer`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from rlhf_drive.estimate.counts import decode_visits, visits_of
from rlhf_drive.estimate.memory import decode_passes
from rlhf_drive.estimate.sizes import NetworkSizes, StepSizes
from rlhf_drive.likelihood.scoring import LOGITS_LIMIT

__all__ = ["Calls", "micro_batches", "reference_work", "sampling_work", "update_work"]


@dataclass(frozen=True)
class Calls:
    """Calls of one piece."""

    piece: str
    """Its name."""
    calls: float
    """How often."""
    units: float
    """Units of one call."""


def sampling_work(net: NetworkSizes, step: StepSizes, scenes: float, group: int | None = None) -> list[Calls]:
    """Sampling one chunk of `scenes`: encode once a scene, then K passes."""
    rows = scenes * (group or step.group)
    passes, visits = decode_passes(net, step), decode_visits(net, step)
    found = [Calls("encode", 1, scenes), Calls("plans", 1, rows)]
    if net.process == "autoregressive":
        found += [Calls("next", passes, rows)]
    else:
        found += [Calls("decode", passes, rows)]
    return [*found, Calls("draw", passes, rows * visits.positions / passes)]


def micro_batches(step: StepSizes, kept: float, processes: int) -> float:
    """Micro-batches of the process that has most of them."""
    return float(math.ceil(math.ceil(kept / step.micro_scenes) / processes)) if kept > 0 else 0.0


def _logp(net: NetworkSizes, step: StepSizes, scenes: float) -> tuple[float, float, float]:
    """Passes of a micro-batch's likelihood, states and positions of each."""
    seen = visits_of(net, step)
    states = seen.states * step.group * scenes
    most = max(step.max_tokens // net.length, scenes) if step.max_tokens else states
    passes = max(1, math.ceil(states / most))
    return passes, states / passes, seen.positions * step.group * scenes / passes


def reference_work(net: NetworkSizes, step: StepSizes, kept: float) -> list[Calls]:
    """Log-probabilities of the whole batch, without gradients, on every process that holds it alone."""
    scenes = min(step.micro_scenes, max(kept, 1.0))
    parts = kept / scenes
    passes, states, positions = _logp(net, step, scenes)
    return [
        Calls("encode", parts, scenes),
        Calls("decode", parts * passes, states),
        Calls("logp", parts * passes, positions),
    ]


def update_work(net: NetworkSizes, step: StepSizes, parts: float, scenes: float) -> Mapping[str, list[Calls]]:
    """All updates of a step, of a process with `parts` micro-batches of `scenes` each: `likelihood` and `update`."""
    passes, states, positions = _logp(net, step, scenes)
    again = passes > 1  # each pass is computed without a graph, and again in the backward pass
    chunked = positions * net.vocabulary > LOGITS_LIMIT
    forward, backward = [], []
    for iteration in range(step.iterations):
        entropy = iteration == 0 or step.entropy
        head = "entropy_forward" if entropy else "logp_forward"
        if chunked or again:
            head = "logp"
        forward += [
            Calls("encode_forward", parts, scenes),
            Calls("decode" if again else "decode_forward", parts * passes, states),
            Calls(head, parts * passes, positions),
        ]
        backward += [
            Calls("encode_backward", parts, scenes),
            Calls("decode_backward", parts * passes, states),
            Calls("logp_backward", parts * passes, positions),
            Calls("objective", parts, scenes * step.group),
            Calls("optimizer", 1, 1),
        ]
        if again or step.checkpointing:
            backward.append(Calls("decode_forward", parts * passes, states))
        if again or chunked:
            backward.append(Calls("entropy_forward" if entropy else "logp_forward", parts * passes, positions))
    return {"likelihood": forward, "update": backward}
