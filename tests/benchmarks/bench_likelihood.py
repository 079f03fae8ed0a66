"""Likelihood of a batch, forward and backward: shared contexts and packed states, beside one state at a time.

Run: ``OMP_NUM_THREADS=1 python tests/benchmarks/bench_likelihood.py [--quick] [--recipe NAME]``. The network has the
recipe's sizes, random weights, and 512 scene tokens of noise; 8 samples a scene, 8 decode steps of masked diffusion.
The last row is what a trainer without the isolation of scene from plan does: it encodes the scene anew for every state.
The rows between say which part of the gain comes from where. Every way must give the same log-probabilities, or the run
fails. Times are this thread's processor time, so that other processes do not count; ways take turns, and the median of
each way's ratios to ours counts, with the smallest and the largest.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import fields

import numpy as np
import torch
from bench_sampling import noise_scenes
from torch import Tensor

from rlhf_drive.config import load_recipe
from rlhf_drive.likelihood import make_likelihood, tempered_logp
from rlhf_drive.policies import Architecture, DecodeTrace, Decoding, Policy, SceneContext, TrajectoryTokenizer
from rlhf_drive.policies.inputs import ObservationBatch

SAMPLES, STEPS = 8, 8
AGREEMENT = 1e-3
"""Most that log-probabilities may differ between two ways (nats, float32)."""

Way = Callable[[], Tensor]
"""A call that gives the rollouts' log-probabilities ``[N]`` with gradient."""


def one_scene(scenes: ObservationBatch, index: int) -> ObservationBatch:
    """One scene's inputs."""
    return ObservationBatch(**{f.name: getattr(scenes, f.name)[index : index + 1] for f in fields(scenes)})


def state_by_state(policy: Policy, trace: DecodeTrace, context_of: Callable[[int], SceneContext]) -> Tensor:
    """``[N]``: each state of each rollout in a forward pass of its own, its drawn positions alone given to the head."""

    def draws(n: int) -> Iterator[Tensor]:
        for k in range(len(trace.time)):
            scored = trace.scored[k, n : n + 1]
            context = context_of(n // SAMPLES)
            logits = policy.action_logits(trace.state[k, n : n + 1], trace.time[k : k + 1], context, scored)
            yield tempered_logp(logits, trace.action[k, n][scored[0]], trace.temperature, trace.top_k).sum()

    return torch.stack([torch.stack(list(draws(n))).sum() for n in range(len(trace))])


def step_by_step(policy: Policy, trace: DecodeTrace, scenes: ObservationBatch) -> Tensor:
    """``[N]``: each decode step in a forward pass of all rollouts, every rollout with a context of its own."""
    own = ObservationBatch(
        **{f.name: getattr(scenes, f.name).repeat_interleave(SAMPLES, dim=0) for f in fields(scenes)}
    )
    total = torch.zeros(len(trace))
    for k in range(len(trace.time)):
        scored = trace.scored[k]
        logits = policy.action_logits(trace.state[k], trace.time[k].expand(len(trace)), policy.encode(own), scored)
        logp = tempered_logp(logits, trace.action[k][scored], trace.temperature, trace.top_k)
        total = total + torch.zeros(scored.shape).masked_scatter(scored, logp).sum(dim=1)
    return total


def ways_of(policy: Policy, scenes: ObservationBatch, trace: DecodeTrace) -> dict[str, Way]:
    """The ways by name, ours first."""
    likelihood = make_likelihood("trace")

    def shared() -> Tensor:
        context = policy.encode(scenes)
        return state_by_state(policy, trace, context.scene)

    return {
        "contexts shared, states packed (ours)": lambda: likelihood(policy, policy.encode(scenes), trace).logp.sum(1),
        "contexts shared, one state at a time": shared,
        "own context a rollout and step, rollouts packed": lambda: step_by_step(policy, trace, scenes),
        "own context a state, one state at a time": lambda: state_by_state(
            policy, trace, lambda s: policy.encode(one_scene(scenes, s))
        ),
    }


def seconds(policy: Policy, way: Way) -> tuple[float, Tensor]:
    """Processor time of forward and backward, and the log-probabilities."""
    policy.zero_grad(set_to_none=True)
    start = time.thread_time()
    logp = way()
    (logp * torch.linspace(-1.0, 1.0, len(logp))).sum().backward()  # type: ignore[no-untyped-call]
    return time.thread_time() - start, logp.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="quickstart", help="recipe that gives the sizes")
    parser.add_argument("--quick", action="store_true", help="2 scenes, once")
    options = parser.parse_args()
    recipe = load_recipe(options.recipe)
    torch.manual_seed(0)
    architecture = Architecture(**{f.name: getattr(recipe.policy, f.name) for f in fields(Architecture)})
    tokenizer = TrajectoryTokenizer(
        recipe.tokenizer.encoding, recipe.tokenizer.low, recipe.tokenizer.high, recipe.tokenizer.step
    )
    policy = Policy(architecture, tokenizer).eval()
    count = 2 if options.quick else 8
    scenes = noise_scenes(count, architecture.points_per_polyline, tokenizer.length)
    uniforms = torch.rand(count * SAMPLES, 2, tokenizer.length, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        trace = policy.process.sample(policy, policy.encode(scenes), uniforms, Decoding(STEPS, "causal", 1.0, 0))
    ways = ways_of(policy, scenes, trace)
    names = list(ways)
    seconds(policy, ways[names[0]])
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(1 if options.quick else 3):
        found = {}
        for name in names:
            taken, found[name] = seconds(policy, ways[name])
            times[name].append(taken)
        for name in names[1:]:
            difference = float((found[name] - found[names[0]]).abs().max())
            assert difference < AGREEMENT, f"{name} differs by {difference} nats"
    print(f"{count} scenes x {SAMPLES} samples x {STEPS} states, d_model {architecture.d_model}, V {policy.vocab_size}")
    print(f"{'':50}{'s':>9}{'ratio':>9}   smallest … largest")
    for name in names:
        ratios = np.array(times[name]) / np.array(times[names[0]])
        print(
            f"{name:50}{np.median(times[name]):9.3f}{np.median(ratios):9.1f}   {ratios.min():.1f} … {ratios.max():.1f}"
        )


if __name__ == "__main__":
    main()
