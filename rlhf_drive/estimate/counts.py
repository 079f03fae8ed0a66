"""Parameters, floating-point operations and logits of a policy, counted from its sizes.

Operations are those of matrix products and attention, two for a multiply-add, as ``torch.utils.flop_counter`` counts
them; element by element work is counted in bytes instead (:mod:`~rlhf_drive.estimate.traffic`).
"""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_drive.estimate.sizes import NetworkSizes, StepSizes
from rlhf_drive.policies.inputs import AGENT_FEATURES, EGO_FEATURES, ROUTE_FEATURES, polyline_features
from rlhf_drive.policies.plan_state import DEVIATION_FEATURES
from rlhf_drive.policies.policy import NumericHead
from rlhf_drive.policies.route import ROUTE_PIECES
from rlhf_drive.policies.time_conditioning import TimeConditioning
from rlhf_drive.policies.transformer import TrajectoryDecoder

__all__ = [
    "Parameters",
    "Visits",
    "count_parameters",
    "decode_flops",
    "decode_visits",
    "encode_flops",
    "head_flops",
    "visits_of",
]

MIXTURE = 3 * NumericHead.COMPONENTS
FREE = NumericHead.FREE_DIM
VALUE_FEATURES = 4 * len(TrajectoryDecoder.WAVELENGTHS_M) + 1
TIME_FEATURES = 2 * len(TimeConditioning.CYCLES)


@dataclass(frozen=True)
class Parameters:
    """Numbers in a policy's weights."""

    encoder: int
    """Of the scene encoder."""
    decoder: int
    """Of the trajectory decoder without its routed experts."""
    experts: int
    """Of all routed experts."""
    routers: int
    """Of the routers."""
    head: int
    """Of the numeric head."""
    adapters: int
    """Of the low-rank adapters; 0 without."""
    trained: int
    """Of what RL trains."""

    @property
    def total(self) -> int:
        """All, adapters included."""
        return self.encoder + self.decoder + self.experts + self.routers + self.head + self.adapters

    @property
    def pushed(self) -> int:
        """What samplers are sent: adapters where there are any, else everything."""
        return self.adapters or self.total


def _linear(inputs: int, outputs: int) -> int:
    return (inputs + 1) * outputs


def _mlp(inputs: int, d: int) -> int:
    return _linear(inputs, d) + _linear(d, d)


def count_parameters(
    net: NetworkSizes, *, lora_rank: int = 0, lora_experts: bool = True, frozen_router: bool = False
) -> Parameters:
    """Parameters of a policy, and how many of them RL trains.

    Args:
        net: Its sizes.
        lora_rank: Of adapters on attention; 0 = none, all weights are trained.
        lora_experts: Whether routed experts have adapters too.
        frozen_router: Whether router weights stay (without adapters, which freeze everything else anyway).
    """
    d, f, e, layers = net.width, net.expert_width, net.experts, net.decoder_layers
    inputs = (EGO_FEATURES + ROUTE_PIECES * ROUTE_FEATURES, ROUTE_FEATURES, AGENT_FEATURES)
    encoder = sum(_mlp(n, d) for n in (*inputs, polyline_features(net.line_points))) + ROUTE_PIECES * d + 2 * d
    attention = _linear(d, 3 * d) + _linear(d, d)
    encoder += net.encoder_layers * (4 * d + attention + _linear(d, 2 * d) + _linear(2 * d, d))
    decoder = (net.vocabulary + 1) * d + _linear(VALUE_FEATURES, d) + _linear(DEVIATION_FEATURES, d)
    decoder += net.length * d + _linear(d, d) + _linear(1, d) + 2 * d
    shared = _linear(d, f) + _linear(f, d)
    decoder += layers * (6 * d + attention + 2 * _linear(d, d) + _linear(d, 2 * d) + shared)
    if net.process == "flow":
        decoder += _linear(TIME_FEATURES, d) + _linear(d, 2 * d)
    experts, routers = layers * 2 * e * d * f, layers * e * d
    head = _linear(d, MIXTURE) + _linear(d, FREE) + net.vocabulary * FREE
    adapters = 0
    if lora_rank:
        # Self-attention qkv and out in both stacks; query, key_value and out of the cross-attention.
        own, cross = 4 * d + 2 * d, 2 * d + 3 * d + 2 * d
        adapters = lora_rank * ((net.encoder_layers + layers) * own + layers * cross)
        adapters += lora_rank * layers * 2 * e * (d + f) if lora_experts else 0
    whole = encoder + decoder + experts + head
    trained = adapters or whole + (0 if frozen_router else routers)
    return Parameters(encoder, decoder, experts, routers, head, adapters, trained)


def encode_flops(net: NetworkSizes) -> int:
    """Operations of encoding one scene, with the keys and values of all decoder layers."""
    d, m = net.width, net.scene_tokens
    features = ROUTE_PIECES * ROUTE_FEATURES + net.agents * AGENT_FEATURES
    features += net.lines * polyline_features(net.line_points) + EGO_FEATURES + ROUTE_PIECES * ROUTE_FEATURES
    embedding = 2 * d * (features + m * d)
    layer = 2 * m * 8 * d * d + 4 * m * m * d
    return embedding + net.encoder_layers * layer + net.decoder_layers * 2 * m * 2 * d * d


def decode_flops(net: NetworkSizes, rows_per_scene: float = 1.0) -> float:
    """Operations of one pass of one plan state through the decoder, without the head.

    Causal self-attention counts in full, as it is computed by most kernels. A pass over the positions one by one, with
    earlier keys and values remembered, needs as many but for half of the self-attention.

    Args:
        net: Sizes.
        rows_per_scene: States that share a scene, over which what is computed once a scene is divided.
    """
    d, n, m = net.width, net.length, net.scene_tokens
    tokens = n - 1 if net.process == "autoregressive" else n
    embedding = 2.0 * VALUE_FEATURES * d * tokens + 2 * DEVIATION_FEATURES * d * (n // 2)
    embedding += (2 * d * d + 2 * n * d) / rows_per_scene
    if net.process == "flow":
        embedding += 2 * (TIME_FEATURES * d + 2 * d * d)
    expert = 4 * d * net.expert_width
    layer = n * (2 * 6 * d * d + 2 * d * net.experts + expert * (1 + net.experts_of_token))
    layer += 4 * n * n * d + 4 * n * m * d
    return embedding + net.decoder_layers * layer


def head_flops(net: NetworkSizes) -> int:
    """Operations of the head at one position."""
    return 2 * (net.width * (MIXTURE + FREE) + FREE * net.vocabulary)


@dataclass(frozen=True)
class Visits:
    """What one pass over one plan looks at: decoding it, or its likelihood."""

    states: float
    """Plan states that go through the decoder."""
    positions: float
    """Positions at which the head gives logits."""


def decode_visits(net: NetworkSizes, step: StepSizes) -> Visits:
    """Of decoding one plan."""
    k = step.decode_steps
    if net.process == "autoregressive":
        return Visits(1.0, net.length)
    if net.process == "flow":
        return Visits(k, k * net.length)
    k = min(k, net.length)
    if step.order != "confidence":
        return Visits(k, net.length)
    counts = [net.length // k + (i < net.length % k) for i in range(k)]
    return Visits(k, sum(net.length - sum(counts[:i]) for i in range(k)))


def visits_of(net: NetworkSizes, step: StepSizes) -> Visits:
    """Of one plan's likelihood, by estimator; means where masks are random."""
    n = net.length
    k = step.decode_steps if net.process == "flow" else min(step.decode_steps, n)
    share = min(step.steps_seen or k, k) / k
    scored = share * (k * n if net.process == "flow" else n)
    random = step.draws * (n + 1) / 2
    table = {
        "trace": Visits(1.0 if net.process == "autoregressive" else share * k, scored),
        "marginal": Visits(share * k, scored),
        "mean_field": Visits(1.0, n),
        "coupled": Visits(1.0 + 2.0 * step.draws, n + step.draws * n),
        "elbo": Visits(step.draws, random),
        "sandwich": Visits(step.draws, random),
        "random_mask": Visits(step.draws, random),
    }
    return table[step.likelihood]
