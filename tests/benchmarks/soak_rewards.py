"""A long run of the reward service on Ray whose workers are killed and whose reward fails on schedule.

Run: ``OMP_NUM_THREADS=1 python tests/benchmarks/soak_rewards.py --rows 100000``. Each plan carries its number, which
says what the reward does with it: nothing, raise, return NaN, sleep for long, freeze the interpreter, end the process.
Meanwhile workers are killed at random. Every batch is compared with the in-process engine, whose reward does none of
this: rows that are not scheduled to fail must have the same scores bit for bit, the others must be invalid. At the
end memory must not have grown since the warm-up. Exits with an AssertionError where anything of this does not hold.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import itertools
import os
import random
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rewards import LocalRewardService, RewardInputs, RewardSpec, Scores, build_reward
from rewards.pdm_closed import attach_references
from rewards.ray_service import RayRewardService
from rlhf_drive.scenes import Scene, Trajectories
from rlhf_drive.scenes.generator import generate_scenes

FATES = {
    "raises": (400, "scheduled", "raised"),
    "nan": (400, "scheduled", "not_finite"),
    "sleeps": (60, "scheduled", "timeout"),
    "freezes": (5, "worker", "timeout"),
    "dies": (5, "worker", "worker_died"),
}
"""Rows in 100,000 that meet it, and source and kind of the failure that is due."""
ROW_RAD = 1e-9
"""The heading of a plan's first pose is its number times this."""


def fate_of(row: int, seed: int) -> str:
    """What is scheduled for a row; "" for most."""
    draw = random.Random(row * 1_000_003 + seed).randrange(100_000)
    for name, (share, _, _) in FATES.items():
        if draw < share:
            return name
        draw -= share
    return ""


def scheduled(inputs: RewardInputs, *, seed: int = 0, act: bool = True) -> NDArray[np.float64]:
    """Half the score plus the initial speed; with `act`, does with each row what is scheduled."""
    rows = np.round(inputs.trajectories.poses[:, 0, 2] / ROW_RAD).astype(int).tolist()
    fates = [fate_of(row, seed) if act else "" for row in rows]
    for fate in fates:
        if fate == "raises":
            raise ValueError("on schedule")
        if fate == "sleeps":
            time.sleep(60.0)
        if fate == "freezes":
            ctypes.PyDLL(None).sleep(600)
        if fate == "dies":
            os._exit(9)
    speed = np.array([scene.observation.speed_mps for scene in inputs.scenes])
    value = 0.5 * inputs.components["pdms"] + 0.01 * speed[inputs.trajectories.scene_index]
    return np.where(np.array(fates) == "nan", np.nan, value)


def batches(
    scenes: list[Scene], rows: int, per_batch: int, group: int, seed: int
) -> Iterator[tuple[range, Trajectories]]:
    """Numbers and plans of each batch: `group` plans around the human's for each of the scenes that it draws."""
    for start in range(0, rows, per_batch):
        numbers = range(start, min(start + per_batch, rows))
        rng = np.random.default_rng((seed, start))
        index = np.repeat(rng.permutation(len(scenes))[: -(-len(numbers) // group)], group)[: len(numbers)]
        human = np.stack([scenes[i].reference.human_poses for i in index])
        poses = human + rng.normal(0.0, [1.0, 0.3, 0.02], human.shape)
        poses[:, 0, 2] = np.array(numbers) * ROW_RAD
        yield numbers, Trajectories(poses, index)


@dataclass
class Record:
    """What has been seen so far."""

    fates: Counter[str] = field(default_factory=Counter)
    collateral: int = 0
    """Rows that failed because a worker was killed each time it had them alone."""
    kills: int = 0
    rows: int = 0
    zeros: int = 0
    memory: list[tuple[int, float, float, float]] = field(default_factory=list)
    """Rows done, MB of this process, of the largest worker, and of Ray's own processes together."""


def check(scores: Scores, expected: Scores, numbers: range, seed: int, record: Record) -> None:
    """Compare a batch with the in-process engine's, row by row."""
    assert len(scores) == len(numbers) == len(scores.failures) + int(scores.valid.sum())
    for row, number in enumerate(numbers):
        fate, failure = fate_of(number, seed), scores.failures.get(row)
        if fate:
            assert failure is not None, f"row {number} should fail ({fate}) but has the score {scores.total[row]}"
            lost = (failure.source, failure.kind)
            assert lost in (FATES[fate][1:], ("worker", "worker_died")), f"row {number} ({fate}): {failure}"
            assert np.isnan(scores.total[row])
            record.fates[fate] += 1
        elif failure is not None:
            assert (failure.source, failure.kind) == ("worker", "worker_died"), f"row {number}: {failure}"
            record.collateral += 1
    good = scores.valid
    assert expected.valid.all()
    assert np.array_equal(scores.total[good], expected.total[good]), "a score differs from the in-process engine's"
    assert np.array_equal(scores.components[good], expected.components[good])
    record.zeros += int((scores.total[good] == 0.0).sum())
    record.rows += len(numbers)


def resident_mb(pid: int) -> float:
    """Resident memory without what is shared with other processes; 0 for a process that is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def children() -> list[int]:
    """Processes that this one has started: Ray's own."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.append(int(stat.parent.name))
        except OSError:
            continue
    return found


def sample(service: RayRewardService, record: Record) -> str:
    """Note the memory now; returns it in words."""
    workers = max([resident_mb(worker.pid) for worker in service.workers], default=0.0)
    now = (record.rows, resident_mb(os.getpid()), workers, sum(map(resident_mb, children())))
    record.memory.append(now)
    return f"driver {now[1]:.0f} MB, largest worker {now[2]:.0f} MB, ray {now[3]:.0f} MB"


def kill_workers(service: RayRewardService, stop: threading.Event, every_s: float, seed: int, record: Record) -> None:
    """End a random worker every few seconds."""
    rng = random.Random(seed)
    while not stop.wait(rng.uniform(0.5, 1.5) * every_s):
        if workers := service.workers:
            pid = rng.choice(workers).pid
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            record.kills += 1


def report(service: RayRewardService, record: Record, seconds: float) -> None:
    """Print where the run is."""
    stats, rate = service.stats, record.rows / seconds
    print(
        f"{seconds:5.0f} s  {record.rows} rows, {rate:.0f}/s, {record.kills} kills, {stats.restarts} restarts, "
        f"{stats.retries} retries, {stats.timeouts} timeouts; {sample(service, record)}",
        flush=True,
    )


def soak(args: argparse.Namespace, scenes: list[Scene], service: RayRewardService, record: Record) -> None:
    """Score all batches, several under way at a time."""
    started = time.monotonic()
    due = started + args.print_every
    waiting: deque[tuple[range, Trajectories, Future[Scores]]] = deque()
    plans_left = batches(scenes, args.rows, args.batch, args.group, args.seed)
    with LocalRewardService(build_reward(specs(args.seed, act=False)), workers=1) as local:
        while waiting or record.rows < args.rows:
            for numbers, plans in itertools.islice(plans_left, args.ahead - len(waiting)):
                waiting.append((numbers, plans, service.submit(scenes, plans)))
            numbers, plans, future = waiting[0]
            with contextlib.suppress(TimeoutError):
                scores = future.result(max(0.0, due - time.monotonic()))
                check(scores, local.score(scenes, plans), numbers, args.seed, record)
                waiting.popleft()
            if (now := time.monotonic()) >= due:
                due = now + args.print_every
                report(service, record, now - started)


def specs(seed: int, *, act: bool) -> list[RewardSpec]:
    """PDMS, and the reward of this file."""
    return [
        RewardSpec("pdms", 1.0),
        RewardSpec(f"{Path(__file__).resolve()}:scheduled", 0.5, {"seed": seed, "act": act}),
    ]


def judge(args: argparse.Namespace, record: Record, service: RayRewardService, seconds: float) -> None:
    """Print the result, and assert what holds for the whole run."""
    stats = service.stats
    due = Counter(fate for row in range(args.rows) if (fate := fate_of(row, args.seed)))
    print(f"\n{args.rows} rows in {seconds:.0f} s = {args.rows / seconds:.0f} rows/s on {args.workers} workers")
    print(f"scheduled failures: {dict(due)}, found {dict(record.fates)}")
    print(f"{record.collateral} other rows lost to kills; {record.zeros} zeros, all of them the engine's own")
    print(f"{record.kills} kills; {stats}")
    assert record.rows == stats.rows == args.rows
    assert record.fates == due
    assert stats.failures == due.total() + record.collateral
    assert record.collateral <= 1e-4 * args.rows, "killing workers costs more rows than chance explains"
    assert stats.deaths + stats.hangs >= 0.9 * record.kills
    assert stats.restarts >= stats.deaths + stats.hangs
    warm = [sample for sample in record.memory if sample[0] >= 0.25 * args.rows and sample[2]]
    if len(warm) < 6:
        print("too short a run to judge memory")
        return
    third = len(warm) // 3
    for i, (name, allowed_mb) in enumerate((("driver", 40), ("largest worker", 60), ("ray", 60)), 1):
        early, late = (float(np.median([sample[i] for sample in part])) for part in (warm[:third], warm[-third:]))
        print(f"memory of {name}: {early:.0f} MB after the warm-up, {late:.0f} MB at the end")
        assert late - early < allowed_mb, f"memory of {name} has grown"


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--scenes", type=int, default=48)
    parser.add_argument("--group", type=int, default=32, help="plans for each scene of a batch")
    parser.add_argument("--batch", type=int, default=1024, help="rows for each call")
    parser.add_argument("--ahead", type=int, default=4, help="batches under way at a time")
    parser.add_argument("--timeout", type=float, default=0.2, help="seconds that the reward may take for a row")
    parser.add_argument("--kill-every", type=float, default=5.0, help="seconds between kills, on average")
    parser.add_argument("--print-every", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    scenes = [attach_references(scene) for scene in generate_scenes(args.scenes, seed=args.seed)]
    print(f"{len(scenes)} scenes; starting Ray", flush=True)
    record, stop = Record(), threading.Event()
    config = build_reward(specs(args.seed, act=True)).config
    with RayRewardService(
        config, workers=args.workers, timeout_s=args.timeout, stall_s=2.0, address="local"
    ) as service:
        killer = threading.Thread(target=kill_workers, args=(service, stop, args.kill_every, args.seed, record))
        killer.start()
        started = time.monotonic()
        try:
            soak(args, scenes, service, record)
        finally:
            stop.set()
            killer.join()
        judge(args, record, service, time.monotonic() - started)
        left = [worker.pid for worker in service.workers] + children()
    assert not [pid for pid in left if resident_mb(pid) > 0.0], "processes were left behind"
    print("soak passed")


if __name__ == "__main__":
    main()
