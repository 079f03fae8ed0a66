"""The driving policy: encoder, decoder, numeric head, with its tokenizer. It knows no loss."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from rlhf_drive.errors import ConfigError, did_you_mean
from rlhf_drive.policies.inputs import ObservationBatch, stack_features, tensorise
from rlhf_drive.policies.moe import ROUTINGS, RouterRecord
from rlhf_drive.policies.processes import build_process
from rlhf_drive.policies.route import anchor_path
from rlhf_drive.policies.tokenizer import TrajectoryTokenizer
from rlhf_drive.policies.transformer import DecoderLayer, PlanPast, SceneContext, SceneEncoder, TrajectoryDecoder
from rlhf_drive.scenes import POSE_DT_S, Observation, Scene
from rlhf_drive.scenes.split import clusters_of

__all__ = ["Architecture", "Policy"]


@dataclass(frozen=True)
class Architecture:
    """Sizes of the network; stored in the checkpoint's manifest and enough, with the tokenizer, to rebuild it."""

    d_model: int
    """Width of all tokens."""
    num_heads: int
    """Attention heads."""
    encoder_layers: int
    """Transformer layers over scene tokens."""
    decoder_layers: int
    """Layers over plan tokens, each with a sparse MoE."""
    num_experts: int
    """E experts a layer, beside the shared one."""
    experts_per_token: int
    """k experts a token."""
    expert_dim: int
    """Hidden width of an expert."""
    max_agents: int
    """Nearest agents kept."""
    max_polylines: int
    """Nearest map pieces (about 25 m) kept."""
    points_per_polyline: int
    """Points of a map piece."""
    dropout: float
    """Dropout in SFT; RL runs without, so that ratios measure the update alone."""
    routing: str = "token_choice"
    """Who chooses: a token its experts (`token_choice`), or an expert its tokens of each plan (`expert_choice`)."""
    capacity_factor: float = 0.25
    """Share of a plan's tokens that each expert takes under expert choice, in (0, 1]."""

    def __post_init__(self) -> None:
        if self.d_model % self.num_heads:
            raise ConfigError(f"d_model {self.d_model} must be a multiple of num_heads {self.num_heads}.")
        if not 1 <= self.experts_per_token <= self.num_experts:
            raise ConfigError(
                f"experts_per_token {self.experts_per_token} must lie in 1 … num_experts ({self.num_experts})."
            )
        if self.routing not in ROUTINGS:
            raise ConfigError(f"Unknown routing {self.routing!r}. {did_you_mean(self.routing, ROUTINGS)}")
        if not 0.0 < self.capacity_factor <= 1.0:
            raise ConfigError(f"capacity_factor {self.capacity_factor} must lie above 0 and not above 1.")


def _fingerprint(cluster: str) -> str:
    """Twelve hexadecimal digits that stand for a cluster's name."""
    return hashlib.blake2b(cluster.encode(), digest_size=6).hexdigest()


def _full(values: Tensor) -> Tensor:
    """At least float32: what comes after the decoder is exact to rounding."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _log_add(parts: Sequence[Tensor]) -> Tensor:
    """``log(sum of exp(part))``, elementwise and finite. What is less than ``exp(-40)`` of the largest counts as that,
    with gradient 0: float32 cannot tell, and an `exp` that underflows takes a CPU tens of times as long."""
    top = functools.reduce(torch.maximum, [part.detach() for part in parts])
    total = functools.reduce(torch.add, [(part - top).clamp_min(-40.0).exp() for part in parts])
    return top + total.log()


class NumericHead(nn.Module):
    """Categorical over V numbers: a discretised Gaussian mixture around the anchor, plus a learned free term.

    ``logit_v = logsumexp_m(log w_m - (x_v - a - mu_m)^2 / (2 s_m^2) - log s_m) + h^T W e_v`` with numbers ``x_v`` in
    metres and anchor ``a`` (driving on along the route at the present speed). The mixture carries the order of the
    numbers, so that few scenes suffice; the free term, zero at first, makes the family as rich as a plain softmax.
    """

    COMPONENTS = 3
    FREE_DIM = 16

    def __init__(self, dim: int, vocab: int, step: float) -> None:
        super().__init__()
        self.step = step
        self.mixture = nn.Linear(dim, 3 * self.COMPONENTS)
        self.free = nn.Linear(dim, self.FREE_DIM)
        self.table = nn.Parameter(torch.zeros(vocab, self.FREE_DIM))
        nn.init.normal_(self.mixture.weight, std=0.02)
        with torch.no_grad():
            self.mixture.bias.zero_()
            self.mixture.bias[self.COMPONENTS : 2 * self.COMPONENTS] = torch.linspace(-0.5, 0.5, self.COMPONENTS)

    def forward(self, hidden: Tensor, anchor: Tensor, values: Tensor) -> Tensor:
        """``[M, d]``, anchors ``[M]`` and numbers ``[V]`` (m) to logits ``[M, V]`` float32."""
        weight, mean, spread = self.mixture(hidden).float().chunk(3, dim=-1)
        deviation = functional.softplus(spread) + 0.5 * self.step
        log_weight = weight.log_softmax(dim=-1) - deviation.log()
        centre, inverse = anchor[:, None] + mean, 1.0 / deviation
        components = []
        for m in range(self.COMPONENTS):
            z = (values - centre[:, m, None]) * inverse[:, m, None]
            components.append(torch.addcmul(log_weight[:, m, None], z, z, value=-0.5))
        return _log_add(components) + self.free(hidden).float() @ self.table.float().T


class Policy(nn.Module):
    """A driving policy that decodes discrete numeric tokens. Implements :class:`~rlhf_drive.policies.process.Denoiser`.

    Example::

        context = policy.encode([scene.observation for scene in scenes])
        trace = policy.process.sample(policy, context, uniforms, Decoding(8, "causal", 1.0, 0))
        poses = policy.tokenizer.decode(trace.tokens.numpy())
    """

    values: Tensor

    def __init__(
        self,
        architecture: Architecture,
        tokenizer: TrajectoryTokenizer,
        process: str = "masked",
        options: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        a = architecture
        self.architecture, self.tokenizer = architecture, tokenizer
        self.process = build_process(process, options or {}, tokenizer)
        if self.process.causal and a.routing == "expert_choice":
            raise ConfigError(
                f"Process {process!r} may not look ahead, but with expert_choice later tokens decide whether an expert "
                "takes one. Set policy.routing: token_choice, or take another process."
            )
        self.encoder = SceneEncoder(a.d_model, a.num_heads, a.encoder_layers, a.points_per_polyline, a.dropout)
        self.decoder = TrajectoryDecoder(
            tokenizer.vocab_size, tokenizer.length, tokenizer.encoding, a.d_model, a.num_heads, a.decoder_layers,
            a.num_experts, a.experts_per_token, a.expert_dim, a.dropout, causal=self.process.causal,
            routing=a.routing, capacity_factor=a.capacity_factor,
        )  # fmt: skip
        self.head = NumericHead(a.d_model, tokenizer.vocab_size, tokenizer.step)
        numbers = torch.from_numpy(tokenizer.values(torch.arange(tokenizer.vocab_size).numpy())).float()
        self.register_buffer("values", torch.cat([numbers, torch.zeros(1)]), persistent=False)
        if self.process.timed:
            self.decoder.attend_to_time()
        self.trained_on: frozenset[str] = frozenset()
        self.precision: torch.dtype = torch.float32
        """What matrix products of encoder and decoder are computed in; weights, router, head and log-probabilities are
        float32. Copies have it too, checkpoints do not."""

    @property
    def vocab_size(self) -> int:
        """V; the mask token is V."""
        return self.tokenizer.vocab_size

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.values.device

    def features(self, observation: Observation) -> dict[str, NDArray[np.float32]]:
        """One observation as arrays; :meth:`batch` stacks them. Worth caching: it costs more than a forward pass."""
        a = self.architecture
        arrays = tensorise(
            observation,
            max_agents=a.max_agents,
            max_polylines=a.max_polylines,
            points_per_polyline=a.points_per_polyline,
        )
        path = anchor_path(observation, POSE_DT_S * np.arange(1, self.tokenizer.num_poses + 1))
        arrays["anchor"] = self.tokenizer.path_values(path[None])[0].astype(np.float32)
        return arrays

    def batch(self, observations: Sequence[Observation]) -> ObservationBatch:
        """S observations as tensors on the policy's device."""
        return stack_features([self.features(o) for o in observations]).to(self.device)

    def computing(self) -> AbstractContextManager[object]:
        """Within it matrix products have the policy's precision: everybody who asks it for numbers gets the same."""
        if self.precision == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.precision)

    def encode(self, observations: ObservationBatch | Sequence[Observation]) -> SceneContext:
        """Encode S scenes once, with every decoder layer's cross-attention keys and values."""
        batch = observations if isinstance(observations, ObservationBatch) else self.batch(observations)
        with self.computing():
            tokens, mask = self.encoder(batch)
            cached = [layer.scene(tokens) for layer in self.decoder.layers if isinstance(layer, DecoderLayer)]
        return SceneContext(tuple(k for k, _ in cached), tuple(v for _, v in cached), mask, tokens[:, 0], batch.anchor)

    def action_features(
        self, state: Tensor, time: Tensor, context: SceneContext, where: Tensor, record: RouterRecord | None = None
    ) -> Tensor:
        """Hidden state and anchor, ``[M, d + 1]``; see :class:`~rlhf_drive.policies.process.Denoiser`."""
        with self.computing():
            hidden = _full(self.decoder(state, time, self.values, context, record))
        anchor = context.anchor.repeat_interleave(len(state) // len(context), dim=0)
        return torch.cat([hidden[where], anchor[where][:, None]], dim=-1)

    def logits(self, features: Tensor) -> Tensor:
        """``[M, d + 1]`` to ``[M, V]`` float32."""
        return self.head(features[:, :-1], features[:, -1], self.values[:-1])

    def action_logits(
        self, state: Tensor, time: Tensor, context: SceneContext, where: Tensor, record: RouterRecord | None = None
    ) -> Tensor:
        """``[M, V]`` logits at the positions in `where`."""
        return self.logits(self.action_features(state, time, context, where, record))

    def continuation(self, context: SceneContext) -> Callable[[Tensor, int, RouterRecord | None], Tensor]:
        """``(state [N, L], l, record) -> [N, V]`` logits of positions 0, 1, … of a causal policy, in this order.

        Each call computes one position and remembers its self-attention keys and values.
        """
        past: PlanPast = [[] for _ in context.keys]

        def logits(state: Tensor, position: int, record: RouterRecord | None) -> Tensor:
            with self.computing():
                hidden = _full(self.decoder.next(state, position, self.values, context, past, record))
            anchor = context.anchor[:, position].repeat_interleave(len(state) // len(context), dim=0)
            return self.logits(torch.cat([hidden, anchor[:, None]], dim=-1))

        return logits

    def remember_training(self, scenes: Iterable[Scene]) -> None:
        """Note the clusters of scenes that the weights learn from; a checkpoint carries the notes on."""
        self.trained_on |= {_fingerprint(cluster) for cluster in set(clusters_of(scenes))}

    def has_trained_on(self, scene: Scene) -> bool:
        """Whether the weights, or those they started from, learned from the scene's cluster."""
        return _fingerprint(scene.cluster) in self.trained_on

    def describe(self) -> dict[str, dict[str, object]]:
        """What rebuilds this policy: architecture, tokenizer and process as plain data."""
        return {
            "architecture": dataclasses.asdict(self.architecture),
            "tokenizer": dataclasses.asdict(self.tokenizer),
            "process": {"name": self.process.name, **self.process.options()},
        }
