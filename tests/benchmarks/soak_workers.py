"""A run on Ray whose rollout and reward workers are killed at random, against one that nobody disturbs.

Run: ``python tests/benchmarks/soak_workers.py --steps 200 --every 20`` (with ``--store`` and ``--policy`` for real
scenes and a trained policy). Workers are found below the run's own process, so that those of nobody else are touched,
and end by SIGKILL. At the end every step must have scored all of its rollouts, and metrics (but for times and rates)
and weights must be those of the same run on the local engines, bit for bit; no process that descends from the run, no
temporary file and nothing in /dev/shm may be left. The run's actors live in a Ray of its own, whose processes are among
those. Ray's session folder, its logs, is Ray's to keep: its size is said, and here it goes with the run's folder for
temporary files. With ``--set rollout.max_staleness=1`` the run is asynchronous and has nothing to be equal to.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from watched_run import (
    RL_SMALL,
    WatchedRun,
    add_run_options,
    conclude,
    differences,
    finished,
    prepared,
    rl_lines,
    run_script,
    shared_memory,
    tail,
    working_folder,
)

from rlhf_drive.training.metrics import read_metrics

KINDS = {"rollout": "RolloutWorker", "reward": "RewardWorker"}
"""Classes of the actors."""


@dataclass
class Killer:
    """Ends a random worker now and then, from the first step on; one of the kind that has met it less often."""

    watched: WatchedRun
    """The run."""
    run: Path
    """Its run folder."""
    every_s: float
    """Mean time between two kills."""
    rng: random.Random
    """Draws moments and victims."""
    kills: Counter[str] = field(default_factory=Counter)
    """So far, by kind."""
    missed: int = 0
    """Times when no worker of the kind was up, its replacement still starting."""
    stop: threading.Event = field(default_factory=threading.Event)
    """Ends it."""

    def work(self) -> None:
        """Body of a thread."""
        while not rl_lines(self.run) and not self.stop.wait(0.2):
            continue
        while not self.stop.wait(self.rng.uniform(0.5, 1.5) * self.every_s):
            kind = min(KINDS, key=lambda name: (self.kills[name], self.rng.random()))
            victims = self.watched.workers(KINDS[kind])
            if not victims:
                self.missed += 1
                continue
            with contextlib.suppress(psutil.NoSuchProcess):
                victim = self.rng.choice(victims)
                victim.kill()
                self.kills[kind] += 1
                step = len(rl_lines(self.run))
                print(f"kill {self.kills.total():3d}  {kind:8s} pid {victim.pid}, step {step}", flush=True)


def disturbed(arguments: list[str], run: Path, folder: Path, args: argparse.Namespace) -> tuple[Killer, list[str]]:
    """The run on Ray with its killer; what outlived it."""
    with WatchedRun(arguments, folder) as watched:
        killer = Killer(watched, run, args.every, random.Random(args.seed))
        thread = threading.Thread(target=killer.work)
        thread.start()
        try:
            code = watched.wait(args.patience)
        finally:
            killer.stop.set()
            thread.join()
        if code:
            raise RuntimeError(f"the run failed after {dict(killer.kills)}:\n{tail(watched.log)}")
        left = watched.outliving()
        print(f"Ray's session folder: {watched.ray_log_mb():.1f} MB of logs", flush=True)
    return killer, left


def judge(run: Path, killer: Killer, args: argparse.Namespace) -> Iterator[str]:
    """What does not hold of the run itself."""
    lines = read_metrics(run)
    if [line["step"] for line in lines] != list(range(1, args.steps + 1)):
        yield f"{len(lines)} steps in the metrics, not {args.steps}"
    for line in lines:
        if line["reward/invalid_frac"] > 0:
            yield f"step {line['step']}: {line['reward/invalid_frac']:.1%} of its rollouts have no score"
    yield from (f"no {kind} worker was killed" for kind in KINDS if not killer.kills[kind])


def table(run: Path, killer: Killer, seconds: float, undisturbed_s: float | None) -> None:
    """Kills, time, and what the services say of themselves."""
    lines: list[dict[str, Any]] = read_metrics(run)
    kills = ", ".join(f"{count} {kind}" for kind, count in sorted(killer.kills.items()))
    print(
        f"\n{len(lines)} steps in {seconds:.0f} s, {killer.kills.total()} kills ({kills}), {killer.missed} met nobody"
    )
    if undisturbed_s is not None:
        print(f"the same run on the local engines, undisturbed: {undisturbed_s:.0f} s")
    for name, value in lines[-1].items():
        if name.startswith(("service/", "rollout/", "async/", "correction/", "failures/")):
            print(f"  {name:32s}{value:10.3f}")


def main() -> int:
    """Read the options, run, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_options(parser, steps=200)
    parser.add_argument("--every", type=float, default=20.0, help="seconds between two kills, on average")
    parser.add_argument("--rollout-workers", type=int, default=2)
    parser.add_argument("--reward-workers", type=int, default=2)
    args = parser.parse_args()
    before = shared_memory()
    engines = [
        "rollout.engine=ray", f"rollout.workers={args.rollout_workers}", "rollout.cpus_per_worker=0.5",
        "reward.engine=ray", f"reward.workers={args.reward_workers}",
    ]  # fmt: skip
    asynchronous = any(item.startswith("rollout.max_staleness=") and not item.endswith("=0") for item in args.set)
    with working_folder(args.out) as folder:
        common = [*prepared(args, folder), *RL_SMALL, f"rl.max_steps={args.steps}", *args.set, f"output_dir={folder}"]
        undisturbed_s = None
        if not asynchronous:
            started = time.monotonic()
            finished(["train", "rl", *common, "name=undisturbed"], folder / "undisturbed-log", args.patience)
            undisturbed_s = time.monotonic() - started
        run, started = folder / "disturbed", time.monotonic()
        arguments = ["train", "rl", *common, *engines, "name=disturbed"]
        killer, left = disturbed(arguments, run, folder / "disturbed-log", args)
        table(run, killer, time.monotonic() - started, undisturbed_s)
        problems = [*judge(run, killer, args), *(f"outlived the run: {name}" for name in left)]
        problems += [f"/dev/shm: {name}" for name in sorted(shared_memory() - before)]
        if not asynchronous:
            problems += differences(run, folder / "undisturbed")
        return conclude(problems)


if __name__ == "__main__":
    run_script(main)
