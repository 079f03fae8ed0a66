"""What pushing weights to rollout workers costs: seconds to put them into Ray's object store, seconds until the workers
have them, the share of an RL step, and the same with pickled torch tensors.

Run: ``OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python tests/benchmarks/bench_weight_push.py [--mb 100 1000] [--workers
1 2]``. All weights are trained, so all travel each time; with LoRA only the adapters would. The step that the share is
of: 32 plans (8 scenes of 4, in two chunks) sampled on the workers in 4 decode steps, one update of all weights on the
plans' exact log-probabilities (forward, backward, AdamW), and the push. Scoring is left out, and a recipe's step has
more plans and updates: the shares are upper bounds. The driver waits for `put` alone; workers load while it goes on.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from rlhf_drive.likelihood import trace_logp
from rlhf_drive.policies import Architecture, Decoding, Policy, TrajectoryTokenizer
from rlhf_drive.scenes import Scene
from rlhf_drive.scenes.generator import generate_scenes
from rollout import RayRolloutService

DECODING = Decoding(4, "random", 1.0, 0)
TOKENIZER = TrajectoryTokenizer("displacements", -5.0, 15.0, 0.1)
SMALL = Architecture(
    d_model=256, num_heads=4, encoder_layers=2, decoder_layers=4, num_experts=16, experts_per_token=2, expert_dim=8,
    max_agents=16, max_polylines=48, points_per_polyline=10, dropout=0.0,
)  # fmt: skip
SCENES, CHUNK, GROUP = 8, 4, 4


def nbytes(policy: Policy) -> int:
    return sum(weight.numel() * weight.element_size() for weight in policy.state_dict().values())


def policy_of(mb: int) -> Policy:
    """A float32 policy of about that size; experts are made as wide as it takes."""
    sizes = []
    for width in (8, 16):
        with torch.device("cpu"):
            sizes.append(nbytes(Policy(replace(SMALL, expert_dim=width), TOKENIZER)))
    width = 8 + round((mb * 1e6 - sizes[0]) / ((sizes[1] - sizes[0]) / 8))
    torch.manual_seed(0)
    return Policy(replace(SMALL, expert_dim=width), TOKENIZER).eval()


def seconds(action: Callable[[], object], repeats: int) -> tuple[float, float, float]:
    """Median, least and most."""
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        action()
        found.append(time.perf_counter() - started)
    return statistics.median(found), min(found), max(found)


class Step:
    """One RL step without scoring, in parts."""

    def __init__(self, service: RayRolloutService, policy: Policy, scenes: list[Scene]) -> None:
        self.service, self.policy, self.scenes, self.step = service, policy, scenes, 0
        self.optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-5)

    def __call__(self) -> tuple[float, float, float]:
        """Seconds of sampling, of the update, and of the push."""
        self.step += 1
        marks = [time.perf_counter()]
        chunks = [self.scenes[i : i + CHUNK] for i in range(0, SCENES, CHUNK)]
        futures = [self.service.submit(chunk, GROUP, DECODING, step=self.step) for chunk in chunks]
        rollouts = [future.result(600.0) for future in futures]
        marks.append(time.perf_counter())
        for chunk, rollout in zip(chunks, rollouts, strict=True):
            context = self.policy.encode(self.service.features.batch(self.policy, chunk))
            logp, _ = trace_logp(self.policy, context, rollout.trace)
            advantage = torch.linspace(-1.0, 1.0, len(rollout))[:, None]
            (-(advantage * logp).sum() / (SCENES * GROUP)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        marks.append(time.perf_counter())
        self.service.push_weights(self.policy, self.step)
        marks.append(time.perf_counter())
        sampling, update, push = (b - a for a, b in itertools.pairwise(marks))
        return sampling, update, push


def pickled(policy: Policy, workers: int, repeats: int) -> tuple[float, float]:
    """Seconds of put and of load with a dictionary of tensors, as Ray pickles it."""
    import ray

    class Holder:
        def __init__(self) -> None:
            import torch as _torch

            _torch.set_num_threads(1)
            self.own: dict[str, Any] = {}

        def load(self, references: list[Any]) -> None:
            for name, tensor in ray.get(references[0]).items():
                self.own.setdefault(name, tensor.clone()).copy_(tensor)

    actors = [ray.remote(num_cpus=0)(Holder).remote() for _ in range(workers)]
    puts, loads = [], []
    for i in range(repeats + 1):
        started = time.perf_counter()
        reference = ray.put({name: tensor.detach() for name, tensor in policy.state_dict().items()})
        put = time.perf_counter()
        ray.get([actor.load.remote([reference]) for actor in actors], timeout=600.0)
        if i:  # the first one allocates
            puts.append(put - started)
            loads.append(time.perf_counter() - put)
        del reference
    for actor in actors:
        ray.kill(actor)
    return statistics.median(puts), statistics.median(loads)


def measured_step(step: Step) -> str:
    """Median parts of two steps after a first one."""
    step()
    sampling, update, push = (statistics.median(part) for part in zip(*(step() for _ in range(2)), strict=True))
    share = 100 * push / (sampling + update + push)
    return f"sampling {sampling:.2f} s, update {update:.2f} s, push {push:.3f} s = {share:.1f} %"


def measure(mb: int, workers: int, repeats: int, with_step: bool) -> None:
    policy, scenes = policy_of(mb), list(generate_scenes(SCENES, seed=3))
    size = nbytes(policy) / 1e6
    with RayRolloutService(policy, seed=0, workers=workers, cpus_per_worker=1.0, address="local") as service:
        service.sample(scenes[:1], 1, DECODING, step=0)
        sent: list[Any] = [None]

        def put() -> None:
            sent[0] = service._sender.send(policy, 1)

        def load() -> None:
            assert service._dispatcher is not None
            ends = [slot.worker for slot in service._dispatcher._pool.slots]
            for future in [end.load(sent[0]) for end in ends if end is not None]:
                future.result(600.0)

        puts, loads = [], []
        for i in range(repeats + 1):
            one, two = seconds(put, 1)[0], seconds(load, 1)[0]
            if i:  # the first one maps memory
                puts.append(one)
                loads.append(two)
        sent[0] = None
        share = measured_step(Step(service, policy, scenes)) if with_step else "not measured"
        old_put, old_load = pickled(policy, workers, repeats)
    ours, theirs = statistics.median(puts), statistics.median(loads)
    print(
        f"{size:6.0f} MB, {workers} workers: put {ours:.3f} s ({min(puts):.3f} … {max(puts):.3f}), load {theirs:.3f} s "
        f"({min(loads):.3f} … {max(loads):.3f}); step: {share}; pickled tensors: put {old_put:.3f} s "
        f"({old_put / ours:.1f} times), load {old_load:.3f} s ({old_load / theirs:.1f} times)",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-step", action="store_true", help="measure pushes alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for mb in options.mb:
        for workers in options.workers:
            measure(mb, workers, options.repeats, not options.no_step)


if __name__ == "__main__":
    main()
