"""Sampling against one cached scene context, beside encoding the scene anew for every sample and every decode step.

Run: ``OMP_NUM_THREADS=1 python tests/benchmarks/bench_sampling.py [--quick] [--recipe NAME]``. The network has the
recipe's sizes, random weights, and 512 scene tokens of noise; 16 samples a scene. What a sampler without the isolation
of scene from plan has to do is the last row: scene tokens that see the plan change with every token, in every sample.
The rows between say which part of the gain comes from where. Every way must draw the same plans, or the run fails.
Times are this thread's processor time, so that other processes do not count; ways take turns, and the median counts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import fields, replace

import numpy as np
import torch
from torch import Tensor

from rlhf_drive.config import load_recipe
from rlhf_drive.policies import Architecture, DecodeTrace, Decoding, Policy, TrajectoryTokenizer
from rlhf_drive.policies.inputs import AGENT_FEATURES, EGO_FEATURES, ROUTE_FEATURES, ObservationBatch, polyline_features
from rlhf_drive.policies.moe import RouterRecord
from rlhf_drive.policies.route import ROUTE_PIECES

SCENE_TOKENS, SAMPLES, AGENTS = 512, 16, 60
AGREEMENT = 1e-3
"""Most that log-probabilities of the same plan may differ between two ways (nats, float32)."""


class Reencoding:
    """A policy that encodes its scenes anew at every question: those it is sampled in, or one for every row."""

    def __init__(self, policy: Policy, scenes: ObservationBatch) -> None:
        self.policy, self.scenes, self.vocab_size = policy, scenes, policy.vocab_size

    def action_features(
        self, state: Tensor, time: Tensor, context: object, where: Tensor, record: RouterRecord | None = None
    ) -> Tensor:
        return self.policy.action_features(state, time, self.policy.encode(self.scenes), where, record)

    def logits(self, features: Tensor) -> Tensor:
        return self.policy.logits(features)

    def action_logits(
        self, state: Tensor, time: Tensor, context: object, where: Tensor, record: RouterRecord | None = None
    ) -> Tensor:
        return self.logits(self.action_features(state, time, context, where, record))


class Forgetful(Reencoding):
    """A policy with the context encoded once, but without memory of the plan's first tokens."""

    def __init__(self, policy: Policy, scenes: ObservationBatch) -> None:
        super().__init__(policy, scenes)
        self.context = policy.encode(scenes)

    def action_features(
        self, state: Tensor, time: Tensor, context: object, where: Tensor, record: RouterRecord | None = None
    ) -> Tensor:
        return self.policy.action_features(state, time, self.context, where, record)


def noise_scenes(count: int, points: int, length: int) -> ObservationBatch:
    """Scenes of 512 tokens: one global, the route's, 60 agents, map pieces."""
    generator = torch.Generator().manual_seed(0)
    lines = SCENE_TOKENS - 1 - ROUTE_PIECES - AGENTS

    def noise(*shape: int) -> Tensor:
        return torch.randn(count, *shape, generator=generator)

    return ObservationBatch(
        ego=noise(EGO_FEATURES),
        anchor=noise(length).abs(),
        route=noise(ROUTE_PIECES, ROUTE_FEATURES),
        agents=noise(AGENTS, AGENT_FEATURES),
        agents_mask=torch.ones(count, AGENTS, dtype=torch.bool),
        lines=noise(lines, polyline_features(points)),
        lines_mask=torch.ones(count, lines, dtype=torch.bool),
    )


def per_row(scenes: ObservationBatch) -> ObservationBatch:
    """Each scene as many times as it is sampled."""
    parts = {f.name: getattr(scenes, f.name).repeat_interleave(SAMPLES, dim=0) for f in fields(scenes)}
    return ObservationBatch(**parts)


def make_policy(process: str, recipe: str) -> Policy:
    """The recipe's network, room made for 512 scene tokens, with weights off their start."""
    settings = load_recipe(recipe)
    names = {f.name for f in fields(Architecture)}
    sizes = {name: value for name, value in vars(settings.policy).items() if name in names}
    architecture = replace(Architecture(**sizes), max_agents=AGENTS, max_polylines=SCENE_TOKENS)
    t = settings.tokenizer
    torch.manual_seed(0)
    policy = Policy(architecture, TrajectoryTokenizer(t.encoding, t.low, t.high, t.step), process).eval()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return policy


def ways(policy: Policy, scenes: ObservationBatch, decoding: Decoding) -> dict[str, Callable[[], DecodeTrace]]:
    """Samplers by description, the shipped one first and the plain one last."""
    rows = SAMPLES * len(scenes)
    shape = policy.process.uniforms_shape(policy.tokenizer.length, decoding)
    uniforms = torch.rand(rows, *shape, generator=torch.Generator().manual_seed(1))
    repeated = per_row(scenes)

    def sample(denoiser: Reencoding | Policy, context: object) -> DecodeTrace:
        return policy.process.sample(denoiser, context, uniforms, decoding)

    found = {"scene encoded once": lambda: sample(policy, policy.encode(scenes))}
    if policy.process.causal:
        found["  without memory of the plan"] = lambda: sample(Forgetful(policy, scenes), None)
    found["scene encoded every step"] = lambda: sample(Reencoding(policy, scenes), None)
    found["scene encoded every step and sample"] = lambda: sample(Reencoding(policy, repeated), None)
    return found


@torch.no_grad()
def measure(policy: Policy, scenes: ObservationBatch, decoding: Decoding, repeats: int) -> None:
    """One table row per way: milliseconds a scene, and the ratio to the shipped way within each repeat."""
    found = ways(policy, scenes, decoding)
    reference = next(iter(found.values()))()
    times: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(repeats):
        for name, run in found.items():
            start = time.thread_time()
            trace = run()
            times[name].append(time.thread_time() - start)
            assert torch.equal(trace.tokens, reference.tokens), f"{name}: other plans"
            difference = (trace.logp - reference.logp).abs().max().item()
            assert difference < AGREEMENT, f"{name}: log-probabilities differ by {difference}"
    print(f"\n{policy.process.name}, {decoding.steps} steps: ms a scene, times as long (least … most of {repeats})")
    ours = np.array(next(iter(times.values())))
    for name, seconds in times.items():
        ratio = np.array(seconds) / ours
        milliseconds = 1e3 * float(np.median(seconds)) / len(scenes)
        print(f"  {name:38}{milliseconds:9.1f}{np.median(ratio):9.1f}x  ({ratio.min():.1f} … {ratio.max():.1f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="quickstart", help="whose network sizes and tokenizer are taken")
    parser.add_argument("--scenes", type=int, default=2, help="scenes sampled together")
    parser.add_argument("--quick", action="store_true", help="three repeats instead of seven")
    options = parser.parse_args()
    for process, steps in (("masked", 8), ("masked", 16), ("autoregressive", 16)):
        policy = make_policy(process, options.recipe)
        scenes = noise_scenes(options.scenes, policy.architecture.points_per_polyline, policy.tokenizer.length)
        measure(policy, scenes, Decoding(steps, "causal", 1.0, 0), 3 if options.quick else 7)
    print(f"\n{SAMPLES} samples a scene, {SCENE_TOKENS} scene tokens, {torch.get_num_threads()} thread(s)")


if __name__ == "__main__":
    main()
