"""Peak memory of an update, beside the version that keeps the logits of all states for the backward pass.

Run: ``OMP_NUM_THREADS=1 python tests/benchmarks/bench_update_memory.py [--quick]``. Each way runs in a process of its
own, which makes one small update (gradients and optimizer state exist from then on), notes its peak resident memory,
makes the update that counts, and reports by how much the peak grew. Ways at one vocabulary see the same rollouts and
must give the same loss. Rollouts are masked diffusion's: each of K = 8 states has L/K of its positions scored.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WAYS = (
    "full [N, K, L, V] logits kept",
    "logits of drawn tokens kept",
    "logits made again (ours)",
    "and 2048 tokens a pass (ours)",
)
STEPS, D_MODEL = 8, 96
CASES = ((0.1, 64), (0.0025, 32))
"""Token width (m) in a range of 50 m, which gives V = 501 and 20,001, and number of rollouts."""


def peak_mb() -> float:
    """Peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024.0 if sys.platform != "darwin" else 1024.0**2)


def child(way: int, step: float, rows: int) -> None:
    """One update in this process; prints how the peak grew (MB), seconds and loss."""
    import torch
    from bench_sampling import noise_scenes
    from torch import Tensor

    from rlhf_drive.likelihood import make_likelihood, scoring, tempered_logp
    from rlhf_drive.policies import Architecture, DecodeTrace, Decoding, Policy, TrajectoryTokenizer

    torch.manual_seed(0)
    torch.set_num_threads(1)
    architecture = Architecture(
        d_model=D_MODEL, num_heads=4, encoder_layers=2, decoder_layers=2, num_experts=8, experts_per_token=2,
        expert_dim=64, max_agents=60, max_polylines=64, points_per_polyline=5, dropout=0.0,
    )  # fmt: skip
    policy = Policy(architecture, TrajectoryTokenizer("displacements", -10.0, 40.0, step)).eval()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4)
    scenes = noise_scenes(4, 5, policy.tokenizer.length)
    trace_likelihood = make_likelihood("trace")
    if way == 1:
        scoring.score_draws.__kwdefaults__["limit"] = 10**12  # the limit is a constant on purpose

    def logp(trace: DecodeTrace) -> Tensor:
        context = policy.encode(scenes)
        if way:
            return trace_likelihood(policy, context, trace, max_tokens=2048 if way == 3 else 0).logp.sum(1)
        states = trace.state.transpose(0, 1).flatten(0, 1)
        everywhere = torch.ones_like(states, dtype=torch.bool)
        logits = policy.action_logits(states, trace.time.repeat(len(trace)), context, everywhere)
        action = trace.action.transpose(0, 1).flatten()
        values = tempered_logp(logits, action, 1.0, 0).view(len(trace), -1)
        return torch.where(trace.scored.transpose(0, 1).flatten(1), values, 0.0).sum(1)

    def update(trace: DecodeTrace) -> float:
        ratio = (logp(trace) - trace.logp.sum((0, 2))).exp()
        loss = -(ratio * torch.linspace(-1.0, 1.0, len(ratio))).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    def sample(count: int) -> DecodeTrace:
        uniforms = torch.rand(count, 2, policy.tokenizer.length, generator=torch.Generator().manual_seed(1))
        parts = []
        for chunk in uniforms.split(4):  # sampling must not set the peak
            parts.append(policy.process.sample(policy, policy.encode(scenes), chunk, Decoding(STEPS, "causal", 1.0, 0)))
        return DecodeTrace.concatenate(parts)

    with torch.no_grad():
        small, whole = sample(4), sample(rows)
    # Rollouts of four at a time are in scene order; the batch must be scene-major.
    whole = whole.rows(torch.arange(rows).view(-1, 4).T.flatten())
    update(small)
    before, start = peak_mb(), time.thread_time()
    loss = update(whole)
    print(json.dumps([peak_mb() - before, time.thread_time() - start, loss]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a quarter of the rollouts")
    parser.add_argument("--child", nargs=3, type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(int(options.child[0]), options.child[1], int(options.child[2]))
        return
    for step, rows in CASES:
        rows = rows // 4 if options.quick else rows
        print(f"\nV = {round(50 / step) + 1}, {rows} rollouts x {STEPS} states x 16 tokens")
        print(f"{'':34}{'peak grew by':>14}{'share':>8}{'processor time':>17}")
        results = [run(way, step, rows) for way in range(len(WAYS))]
        for name, (grown, seconds, loss) in zip(WAYS, results, strict=True):
            assert abs(loss - results[0][2]) < 1e-4, f"{name}: loss {loss} instead of {results[0][2]}"
            print(f"{name:34}{grown:11.0f} MB{grown / results[0][0]:8.2f}{seconds:15.1f} s")


def run(way: int, step: float, rows: int) -> tuple[float, float, float]:
    """Growth of the peak (MB), processor time (s) and loss of one way, in a process of its own."""
    paths = os.pathsep.join([str(Path(__file__).parent), *(p for p in sys.path if p)])
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "MALLOC_TRIM_THRESHOLD_": "0"}
        command = [sys.executable, __file__, "--child", str(way), str(step), str(rows)]
        found = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, cwd=folder)
    grown, seconds, loss = json.loads(found.stdout.splitlines()[-1])
    return grown, seconds, loss


if __name__ == "__main__":
    main()
