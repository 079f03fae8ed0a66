"""What `rlhf-drive estimate` says of a step's time and memory, beside what steps take.

Run: ``OMP_NUM_THREADS=1 python tests/benchmarks/bench_estimate.py [--recordings FOLDER] [--steps 8]``. Three recipes:
`quickstart` (masked), `real_scenes` (autoregressive) and `real_scenes_flow`, these two on generated scenes where no
recordings are given. Each runs in processes of its own. A policy learns for some seconds, so that groups differ in
reward as those of a policy after SFT do; then single pieces are timed, the recipe's own RL steps run, and pieces are
timed again; the two measurements of pieces are averaged, since the speed of a shared machine drifts. Nothing is fitted
to steps.

Times are processor time, with one thread of torch and one that scores: other work on the machine does not count, and
what overlaps adds up. One number is taken from the run, since it is the data's and not the machine's: the share of
groups without spread. All scenes were met before. Memory is by how much the peak of the resident set exceeds what was
resident before, beside the predicted bytes without the policy's weights.
"""

from __future__ import annotations

import argparse
import copy
import gc
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

RECIPES = ("quickstart", "real_scenes", "real_scenes_flow")
WARM = 2
WALLS = {"sampling": "rollout", "scoring": "reward"}
"""Parts as metrics call them."""


def setup(name: str, recordings: str, steps: int) -> tuple[Any, Any, Any, Any]:
    """Recipe, scenes, features' cache and a policy that has learned for some seconds."""
    import torch
    from bench_step import generated, learn

    from rlhf_drive.config import load_recipe
    from rlhf_drive.estimate.samples import sample_scenes
    from rlhf_drive.policies.feature_cache import FeatureCache
    from rlhf_drive.training.build import build_policy

    torch.set_num_threads(1)
    overrides = ["device=cpu", "reward.workers=1", "rl.monitor_steps=0", f"rl.max_steps={WARM + steps}"]
    if name != "quickstart":
        overrides.append(f"scenes.path={recordings or '.'}")
    recipe = load_recipe(name, overrides)
    count = recipe.rollout.scenes_per_step
    scenes = sample_scenes(recipe, count) if recordings and name != "quickstart" else generated(count)
    features = FeatureCache()
    policy = build_policy(recipe, torch.device("cpu"))
    learn(policy, scenes, features, recipe.sft.mask_order)
    return recipe, scenes, features, policy


def train(recipe: Any, scenes: Any, features: Any, policy: Any) -> list[tuple[float, Mapping[str, float]]]:
    """The recipe's RL steps: processor time at the end of each, and its metrics."""
    from rewards.from_recipe import build_service, reward_config
    from rlhf_drive.training.build import build_accelerator, build_trainer, sampling_of, visiting_of
    from rlhf_drive.training.journal import RunJournal
    from rlhf_drive.training.live import RL_COLUMNS, LiveTable
    from rlhf_drive.training.metrics import MetricsWriter
    from rlhf_drive.training.rl import train_rl
    from rollout import LocalRolloutService

    marks: list[tuple[float, Mapping[str, float]]] = []

    class Marks(RunJournal):
        def log(self, step: int, metrics: Mapping[str, float]) -> None:
            super().log(step, metrics)
            marks.append((time.process_time(), dict(metrics)))

    with (
        tempfile.TemporaryDirectory() as folder,
        build_service(reward_config(recipe.reward), recipe.reward) as service,
        MetricsWriter(folder, tensorboard=False) as writer,
        LiveTable("rl", recipe.rl.max_steps, RL_COLUMNS, stream=io.StringIO()) as table,
    ):
        trainer = build_trainer(
            recipe.rl, policy, seed=0, accelerator=build_accelerator("cpu"), features=features, folder=Path(folder),
            reward_weights={term.name: term.weight for term in recipe.reward.terms},
        )  # fmt: skip
        train_rl(
            trainer, LocalRolloutService(policy, seed=0, features=features), service, scenes, Path(folder),
            sampling=sampling_of(recipe.rollout), visiting=visiting_of(recipe.rl),
            max_invalid_fraction=recipe.reward.max_invalid_fraction, seed=0, save_steps=10**6, keep_checkpoints=1,
            journal=Marks(writer, table, "rl"),
        )  # fmt: skip
    return marks


def time_child(name: str, recordings: str, steps: int) -> dict[str, Any]:
    """Predicted and measured seconds of one recipe."""
    from rlhf_drive.estimate import Rate, layout_of, network_of, predict, step_of
    from rlhf_drive.estimate.measure import measure
    from rlhf_drive.estimate.predict import Workload

    recipe, scenes, features, policy = setup(name, recordings, steps)
    few = {"policy": policy, "scenes": list(scenes[:8]), "clock": time.process_time, "device": "cpu"}
    machines = [measure(recipe, **few)]
    marks = train(recipe, scenes, features, policy)
    machines.append(measure(recipe, **few))
    seconds = [after[0] - before[0] for before, after in itertools.pairwise(marks[WARM - 1 :])]
    metrics = [found for _, found in marks[WARM:]]
    names = ("rollout", "reward", "reference", "likelihood", "update", "step")
    walls = {part: statistics.median([m.get(f"time/{part}_s", 0.0) for m in metrics]) for part in names}
    rates = {
        key: Rate(*(statistics.mean(getattr(m.rates[key], part) for m in machines) for part in ("fixed_s", "unit_s")))
        for key in machines[0].rates
    }
    machine = replace(machines[0], rates=rates, core_gain=1.0, cores=1)
    flat = statistics.median([m["groups/degenerate_frac"] for m in metrics])
    # All scenes were met in the first steps.
    work = Workload(network_of(recipe), step_of(recipe), scenes=1, max_steps=10**9, flat=flat)
    found = predict(work, machine, layout_of(recipe))
    return {
        "predicted": found.step_s,
        "parts": dict(found.parts),
        "measured": statistics.median(seconds),
        "spread": [min(seconds), max(seconds)],
        "walls": walls,
        "flat": flat,
        "load": os.getloadavg()[0],
    }


def memory_child(name: str, recordings: str, steps: int) -> dict[str, Any]:
    """Predicted and measured growth of the resident set in the steps of one recipe (MB); Linux."""
    from rlhf_drive.estimate import layout_of, network_of, predict, step_of
    from rlhf_drive.estimate.machine import from_sheet
    from rlhf_drive.estimate.measure_scorer import ScorerPieces
    from rlhf_drive.estimate.predict import Workload, parameters_of
    from rlhf_drive.estimate.traffic import costs_of

    recipe, scenes, features, policy = setup(name, recordings, steps)
    with ScorerPieces(recipe, scenes[:8]) as pieces:  # machine code and its libraries are no part of a step
        pieces.prepare_s()
    tiny = {"scenes_per_step": 2, "scenes_per_chunk": 2, "num_generations": 2}
    small = replace(recipe, rollout=replace(recipe.rollout, **tiny), rl=replace(recipe.rl, micro_batch_scenes=1))
    train(small, scenes, features, copy.deepcopy(policy))  # nor is what is imported in the first
    gc.collect()
    before = resident_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    train(recipe, scenes, features, policy)
    work = Workload(network_of(recipe), step_of(recipe), scenes=1, max_steps=10**9)
    costs = costs_of(work.net, parameters_of(work.net, work.step), rows_per_scene=8.0)
    memory = predict(work, from_sheet("CPU", costs, bfloat16=False), layout_of(recipe)).trainer
    return {
        "predicted": (memory.total - memory.weights) / 1e6,
        "measured": resident_mb("VmHWM") - before,
        "activations": memory.activations / 1e6,
        "logits": memory.logits / 1e6,
    }


def resident_mb(field: str) -> float:
    """Resident memory now (`VmRSS`) or at its peak (`VmHWM`)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / 1e6


def run(*arguments: str) -> dict[str, Any]:
    """One child's result."""
    paths = os.pathsep.join([str(Path(__file__).parent), *(p for p in sys.path if p)])
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    # What is freed goes back to the system at once, so that the peak is of what is held.
    environment = os.environ | {"PYTHONPATH": paths, "MALLOC_TRIM_THRESHOLD_": "0"} | threads
    command = [sys.executable, __file__, *arguments]
    found = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recordings", default="", help="folder of recordings for the recipes on real scenes")
    parser.add_argument("--steps", type=int, default=8, help="steps measured, after two")
    parser.add_argument("--recipes", nargs="*", default=RECIPES)
    parser.add_argument("--child", choices=("time", "memory"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    recordings = str(Path(options.recordings).resolve()) if options.recordings else ""
    if options.child:
        child = time_child if options.child == "time" else memory_child
        print(json.dumps(child(options.recipes[0], recordings, options.steps)))
        return
    for name in options.recipes:
        arguments = ("--recordings", recordings, "--recipes", name)
        timed = run("--child", "time", "--steps", str(options.steps), *arguments)
        held = run("--child", "memory", "--steps", "1", *arguments)
        low, high = timed["spread"]
        print(
            f"{name}: step {_beside(timed, 's')} ({low:.3g} to {high:.3g}); memory {_beside(held, 'MB')}; "
            f"{timed['flat']:.0%} of groups flat, load {timed['load']:.1f}"
        )
        for part, seconds in timed["parts"].items():
            wall = timed["walls"].get(WALLS.get(part, part), 0.0)
            if seconds or wall:
                print(f"    {part:12} predicted {seconds:7.3f} s   by the clock {wall:7.3f} s")
        print(f"    activations {held['activations']:.0f} MB, logits {held['logits']:.0f} MB", flush=True)


def _beside(found: Mapping[str, float], unit: str) -> str:
    error = found["predicted"] / found["measured"] - 1
    return f"predicted {found['predicted']:.3g}, measured {found['measured']:.3g} {unit}, {error:+.0%}"


if __name__ == "__main__":
    main()
