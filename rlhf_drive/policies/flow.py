"""Discrete flow matching over numeric tokens: corruption, SFT loss, and decoding with an exact augmented trace.

WAM-Flow (2512.06112) on the metric-induced path of :mod:`rlhf_drive.policies.numeric_path`: plans start as uniform
noise, and every number may jump towards the end point that the network predicts, at every step.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rlhf_drive.errors import ConfigError
from rlhf_drive.policies.masked import draw
from rlhf_drive.policies.moe import RouterRecord
from rlhf_drive.policies.numeric_path import EulerStep, NumericPath
from rlhf_drive.policies.process import Decoding, Denoiser
from rlhf_drive.policies.tokenizer import TrajectoryTokenizer
from rlhf_drive.policies.trace import DecodeTrace

__all__ = ["START_TIME", "DiscreteFlow", "decode_times"]

START_TIME = 1e-3
"""Decoding starts here: at t = 0 the rate of beta is infinite (a < 1), and solvers that set it to 0 can never jump in
their first step. At this time the path is still uniform to 1 %."""
DRAW_NUMBERS = 1 << 22
"""Logits held at once while drawing; changes memory only."""


def decode_times(steps: int) -> Tensor:
    """``[K]`` float32: times before each of K equal steps from `START_TIME` to 1."""
    return START_TIME + (1.0 - START_TIME) * torch.arange(steps) / steps


class DiscreteFlow:
    """The discrete-flow process: a plan of random numbers to a plan, every number at every step.

    Args:
        tokenizer: Gives the grid of numbers.
        beta_scale: See :class:`~rlhf_drive.policies.numeric_path.NumericPath`; the defaults c and a are WAM-Flow's.
        beta_power: The same.
        distance_scale_m: The same.

    Raises:
        ConfigError: An option is not positive and finite.
    """

    name, causal, timed = "flow", False, True

    def __init__(
        self,
        tokenizer: TrajectoryTokenizer,
        *,
        beta_scale: float = 3.0,
        beta_power: float = 0.9,
        distance_scale_m: float = 4.0,
    ) -> None:
        self.path = NumericPath(tokenizer.vocab_size, tokenizer.step, beta_scale, beta_power, distance_scale_m)

    def options(self) -> Mapping[str, float]:
        """The path's numbers."""
        path = self.path
        return {
            "beta_scale": path.beta_scale,
            "beta_power": path.beta_power,
            "distance_scale_m": path.distance_scale_m,
        }

    def uniforms_shape(self, length: int, decoding: Decoding) -> tuple[int, ...]:
        """Numbers for the source; then, for each step, for the end point, whether to jump, and where to."""
        return 1 + 3 * decoding.steps, length

    def check(self, length: int, decoding: Decoding) -> None:
        """ConfigError for any order but `all`. Any number of steps will do."""
        del length
        if decoding.order != "all":
            raise ConfigError(
                f"Order {decoding.order!r} decides each position once; a flow policy decides every position at every "
                "step. Use order 'all'."
            )

    def steps(self, time: Tensor) -> list[EulerStep]:
        """The Euler steps between the times ``[K]`` of a trace; the one from the last of them to 1 draws x1 alone."""
        times = time.double()
        return [EulerStep(self.path, t, after - t) for t, after in itertools.pairwise(times)]

    @torch.no_grad()
    def sample(
        self,
        denoiser: Denoiser,
        context: Any,
        uniforms: Tensor,
        decoding: Decoding,
        *,
        seed: int = 0,
        weight_version: int = 0,
        keep_experts: bool = False,
    ) -> DecodeTrace:
        """Decode one plan per row from uniform noise, recording the end points drawn at each step.

        Given the end points, the steps do not depend on the weights: the product of the probabilities of all end
        points drawn is the part of the path's probability that does, so ratios of traces are exact. The last step
        takes its end points as the plan; one step alone draws the plan from ``p(x1 | x0)``.

        Args:
            denoiser: Network with S scenes encoded in `context`.
            context: Shared scene context; N is a multiple of S.
            uniforms: ``[N, 1 + 3 K, L]`` in [0, 1), as `uniforms_shape` says.
            decoding: Steps, order `all`, temperature, top-k of the end points' distribution.
            seed: Recorded in the trace.
            weight_version: Recorded in the trace.
            keep_experts: Whether the trace takes the routing of each step's forward pass, to be replayed.
        """
        n, _, length = uniforms.shape
        self.check(length, decoding)
        times = decode_times(decoding.steps).to(uniforms.device)
        everywhere = torch.ones(n, length, dtype=torch.bool, device=uniforms.device)
        state = (uniforms[:, 0].double() * self.path.vocab_size).long().clamp(max=self.path.vocab_size - 1)
        records: dict[str, list[Tensor]] = {"state": [], "action": [], "logp": []}
        steps, experts = self.steps(times), []
        for k in range(decoding.steps):
            record = RouterRecord() if keep_experts else None
            end_uniform, whether, where = uniforms[:, 1 + 3 * k : 4 + 3 * k].unbind(dim=1)
            features = denoiser.action_features(state, times[k].expand(n), context, everywhere, record)
            end, logp = _draw_all(denoiser, features, end_uniform.flatten(), decoding)
            for name, value in (("state", state), ("action", end.view_as(state)), ("logp", logp.view(n, length))):
                records[name].append(value)
            if record is not None:
                experts.append(record.choices())
            if k < len(steps):
                state = steps[k].move(state, end.view_as(state), whether, where)
        return DecodeTrace(
            state=torch.stack(records["state"]),
            action=torch.stack(records["action"]),
            scored=everywhere.expand(decoding.steps, n, length).clone(),
            logp=torch.stack(records["logp"]),
            time=times,
            temperature=decoding.temperature,
            top_k=decoding.top_k,
            order=decoding.order,
            seed=seed,
            weight_version=weight_version,
            experts=torch.stack(experts) if experts else None,
        )

    def sft_loss(
        self,
        denoiser: Denoiser,
        tokens: Tensor,
        context: Any,
        order: str,
        generator: torch.Generator,
        record: RouterRecord | None = None,
    ) -> Tensor:
        """``[N]`` nats per token: cross-entropy of ``p(x1 | x_t, t)``, ``x_t ~ p_t(. | x1)``, ``t ~ U(0, 1)``.

        `order` has no effect: every position is noised and scored. At t near 0 the loss is that of predicting the plan
        from the scene alone, near 1 that of copying it, so it is lower than a masked policy's and not comparable.
        """
        del order
        n, length = tokens.shape
        time = torch.rand(n, generator=generator, device=tokens.device)
        uniform = torch.rand(n, length, generator=generator, device=tokens.device, dtype=torch.float64)
        state = self.path.noised(tokens, time, uniform)
        everywhere = torch.ones_like(tokens, dtype=torch.bool)
        logits = denoiser.action_logits(state, time, context, everywhere, record)
        nll = torch.nn.functional.cross_entropy(logits, tokens.flatten(), reduction="none")
        return nll.view(n, length).mean(dim=1)


def _draw_all(denoiser: Denoiser, features: Tensor, uniform: Tensor, decoding: Decoding) -> tuple[Tensor, Tensor]:
    """End points ``[M]`` and their log-probabilities, a bounded number of logits at a time."""
    rows = max(1, DRAW_NUMBERS // denoiser.vocab_size)
    parts = [
        draw(denoiser.logits(some), u, decoding.temperature, decoding.top_k)
        for some, u in zip(features.split(rows), uniform.split(rows), strict=True)
    ]
    return torch.cat([token for token, _ in parts]), torch.cat([logp for _, logp in parts])
