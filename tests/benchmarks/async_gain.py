"""Asynchronous against synchronous RL at equal numbers of rollouts: held-out score, wall time, idle shares.

Run: ``python tests/benchmarks/async_gain.py --store STORE --policy SFT --steps 40 --seeds 0 1 2``. The recipe `rl` is
trained twice with each seed: synchronous on the local engines, and asynchronous with one rollout worker on Ray and
`rollout.max_staleness` 1. Both then plan for every held-out scene; the difference is paired by scene and its interval
resamples clusters. It fails where the interval says that asynchronous is worse; that it contains zero is no proof of
the contrary, its width says how much worse it could be. Times mean something only on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from watched_run import conclude, finished, run_script, working_folder

from rewards import LocalRewardService
from rewards.from_recipe import metric_config
from rlhf_drive.compare import Difference, evaluate, paired_difference
from rlhf_drive.compare.planners import PolicyPlanner
from rlhf_drive.policies import Decoding, load_policy
from rlhf_drive.policies.feature_cache import FeatureCache
from rlhf_drive.scenes.store import SceneStore
from rlhf_drive.training.metrics import read_metrics

ARMS = {
    "synchronous": ("rollout.engine=local", "rollout.max_staleness=0"),
    "asynchronous": ("rollout.engine=ray", "rollout.workers=1"),
}
"""What differs; the asynchronous arm's staleness is an option."""
HEADLINE = "pdms"
IDLE = ("async/trainer_idle_frac", "async/sampler_idle_frac")
Scores = dict[str, NDArray[np.float64]]


def train(arm: str, folder: Path, args: argparse.Namespace) -> Path:
    """One arm with all seeds; its run folder."""
    staleness = [f"rollout.max_staleness={args.staleness}"] if arm == "asynchronous" else []
    seeds = f"rl.seeds=[{', '.join(map(str, args.seeds))}]"
    finished(
        [
            "train", "rl", f"scenes.store={args.store.resolve()}", f"rl.policy={args.policy.resolve()}",
            f"rl.max_steps={args.steps}", seeds, "rl.monitor_steps=0", "logging.tensorboard=false",
            "logging.picture_steps=0", f"output_dir={folder}", f"name={arm}", *args.set, *ARMS[arm], *staleness,
        ],
        folder / f"{arm}-log", args.patience,
    )  # fmt: skip
    return folder / arm


def heldout_scores(policies: dict[str, Path], args: argparse.Namespace) -> tuple[Scores, list[str]]:
    """Headline of each policy on each held-out scene, in points of 100, and the scenes' clusters."""
    scenes = SceneStore.open(args.store).split("heldout")
    features = FeatureCache()
    decoding = Decoding(args.decode_steps, args.order, args.temperature, 0)
    planners = [
        PolicyPlanner(name, load_policy(folder), decoding, args.samples, 0, features)
        for name, folder in policies.items()
    ]
    with LocalRewardService(metric_config(HEADLINE).build(), workers=1) as service:
        evaluation = evaluate(planners, scenes, service)
    scores = {name: 100.0 * evaluation.column(name, HEADLINE) for name in evaluation.planners}
    return scores, list(evaluation.clusters)


def arm_scores(scores: Scores, arm: str, seeds: Sequence[int]) -> NDArray[np.float64]:
    """``[R, S]`` scores of an arm's seeds."""
    return np.stack([scores[f"{arm}-{seed}"] for seed in seeds])


def print_scores(scores: Scores, clusters: list[str], seeds: Sequence[int]) -> Difference:
    """Means, gains over SFT, and differences seed by seed and pooled; returns the pooled one."""
    start = scores["sft"]
    count = f"{len(start)} scenes in {len(set(clusters))} clusters"
    print(f"\nheld-out {HEADLINE.upper()}, {count}; SFT {np.nanmean(start):.2f}")
    for arm in ARMS:
        gain = paired_difference(arm_scores(scores, arm, seeds), start, clusters)
        print(f"{arm:13s} {np.nanmean(arm_scores(scores, arm, seeds)):6.2f}   gain over SFT {interval(gain)}")
    pairs = [(seed, scores[f"asynchronous-{seed}"], scores[f"synchronous-{seed}"]) for seed in seeds]
    for seed, a, b in pairs:
        print(f"seed {seed}: asynchronous - synchronous {interval(paired_difference(a, b, clusters))}")
    pooled = paired_difference(
        arm_scores(scores, "asynchronous", seeds), arm_scores(scores, "synchronous", seeds).mean(0), clusters
    )
    print(f"all seeds: asynchronous - synchronous {interval(pooled)}")
    return pooled


def interval(difference: Difference) -> str:
    """Mean and bounds in points."""
    return f"{difference.mean:+6.2f}  95 % [{difference.low:+.2f}, {difference.high:+.2f}]"


def print_times(runs: dict[str, Path], args: argparse.Namespace) -> Iterator[str]:
    """Time and idle shares of each arm without first steps, which compile; whether both saw equally many rollouts."""
    heads = f"{'steps':>7s}{'wall s':>9s}{'s/step':>9s}{'trainer idle':>14s}{'sampler idle':>14s}{'staleness':>11s}"
    print(f"\n{'':13s}{heads}")
    for arm, run in runs.items():
        lines: list[dict[str, Any]] = [line for line in read_metrics(run) if line["phase"].startswith("rl")]
        timed = [line for line in lines if line["step"] > 1] or lines
        wall = sum(line["time/step_s"] for line in timed)
        # Taking turns, the trainer waits for samples and scores, and samplers for everything else.
        waiting = sum(line["time/rollout_s"] + line["time/reward_s"] for line in timed) / wall
        sampling = sum(line["time/rollout_s"] for line in timed) / wall
        turns = {IDLE[0]: waiting, IDLE[1]: 1 - sampling, "async/staleness_mean": 0.0}
        shares = [float(np.mean([line.get(name, usual) for line in timed])) for name, usual in turns.items()]
        print(
            f"{arm:13s}{len(lines):7d}{wall:9.1f}{wall / len(timed):9.2f}{shares[0]:14.1%}{shares[1]:14.1%}"
            f"{shares[2]:11.2f}"
        )
        if len(lines) != args.steps * len(args.seeds):
            yield f"{arm}: {len(lines)} steps, not {args.steps} with each of {len(args.seeds)} seeds"
        stale = sum(line.get("async/staleness_mean", 0.0) for line in lines)
        if arm == "asynchronous" and stale and not any("correction/mean" in line for line in lines):
            yield f"{arm}: rollouts are older than the update, and nothing weighs them"
        invalid = max(line["reward/invalid_frac"] for line in lines)
        if invalid > 0:
            yield f"{arm}: up to {invalid:.1%} of a step's rollouts have no score"


def main() -> int:
    """Read the options, train, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True, help="scene store")
    parser.add_argument("--policy", type=Path, required=True, help="SFT policy to start from")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--staleness", type=int, default=1)
    parser.add_argument("--samples", type=int, default=2, help="plans per held-out scene")
    parser.add_argument("--temperature", type=float, default=0.5, help="of the comparison")
    parser.add_argument("--decode-steps", type=int, default=8, help="of the comparison")
    parser.add_argument("--order", default="causal", help="of the comparison")
    parser.add_argument("--out", type=Path, help="folder for the runs, kept; a temporary one without")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes to the recipe rl")
    parser.add_argument("--patience", type=float, default=7200.0, help="seconds that one arm may take")
    args = parser.parse_args()
    with working_folder(args.out) as folder:
        runs = {arm: train(arm, folder, args) for arm in ARMS}
        policies = {
            f"{arm}-{seed}": run / f"rl-seed{seed}" / "policy" for arm, run in runs.items() for seed in args.seeds
        }
        scores, clusters = heldout_scores({"sft": args.policy, **policies}, args)
        pooled = print_scores(scores, clusters, args.seeds)
        problems = list(print_times(runs, args))
        if pooled.high < 0:
            problems.append(f"asynchronous is worse at equal numbers of rollouts: {interval(pooled)}")
        return conclude(problems)


if __name__ == "__main__":
    run_script(main)
