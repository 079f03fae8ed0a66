"""A run that is killed again and again, and resumed each time, against the same run left alone: equal bit for bit.

Run: ``python tests/benchmarks/soak_kill.py --kills 20`` (about ten minutes on two cores). A small RL run, synchronous,
on the local engine. Kills are SIGKILL; their moments are uniform over the steps of the run, and, where a resumed
process has passed that step already, uniform over its start-up, in which the checkpoint is read; a share of them waits
for the next checkpoint to be written and comes in the middle of that. At the end metrics (but for times and rates) and
weights must be those of the undisturbed run, no file may be there that it has not, and no process may be left.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

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

POLL_S = 0.002
LATE_S = 0.05
"""Within a checkpoint's writing a kill comes up to so much after the first file of it is seen."""


@dataclass
class Record:
    """What the kills did."""

    kills: list[tuple[str, int, int]] = field(default_factory=list)
    """Moment, step logged last, and steps that the checkpoint left there was behind."""
    resumes: int = 0
    left: list[str] = field(default_factory=list)
    """What outlived a killed process."""


def saved_step(run: Path) -> int:
    """Step of the newest whole checkpoint; 0 if there is none."""
    return max((int(path.name[5:]) for path in run.glob("rl-seed0/checkpoints/step-*")), default=0)


def steps_logged(run: Path) -> int:
    """RL steps in the metrics."""
    return len(rl_lines(run))


def wait_for_moment(watched: WatchedRun, run: Path, target: float, args: argparse.Namespace, rng: random.Random) -> str:
    """Return when it is time to kill: at `target` steps, in a checkpoint's writing or at start-up; "" if it ended."""
    deadline = time.monotonic() + args.patience
    at_start, writing = steps_logged(run) >= int(target), rng.random() < args.in_writing
    if at_start and not writing:
        time.sleep(rng.uniform(0.0, args.startup))
        return "" if watched.process.poll() is not None else "start-up"
    while time.monotonic() < deadline:
        if watched.process.poll() is not None:
            return ""
        if writing and list(run.glob("rl-seed0/checkpoints/.step-*.tmp")):
            time.sleep(rng.uniform(0.0, LATE_S))
            return "checkpoint"
        if not writing and steps_logged(run) >= int(target):
            time.sleep(target % 1 * args.step_s)
            return "step"
        time.sleep(POLL_S)
    raise TimeoutError(f"step {target:.1f} was not reached in {args.patience:.0f} s:\n{tail(watched.log)}")


def killed_run(start: list[str], run: Path, folder: Path, args: argparse.Namespace) -> Record:
    """The run, killed `args.kills` times and resumed each time until it is finished."""
    rng, record = random.Random(args.seed), Record()
    targets = sorted(rng.uniform(0, args.steps) for _ in range(args.kills))
    arguments = start
    for target in targets:
        with WatchedRun(arguments, folder) as watched:
            moment = wait_for_moment(watched, run, target, args, rng)
            watched.kill()
            if not moment and watched.process.returncode == 0:
                record.left.append("nothing, but it was done before the last kills: give it more --steps")
                return record
            if not moment:
                raise RuntimeError(f"ended by itself with {watched.process.returncode}:\n{tail(watched.log)}")
            logged, saved = steps_logged(run), saved_step(run)
            record.kills.append((moment, logged, max(0, logged - saved)))
            record.left += watched.outliving()
        print(f"kill {len(record.kills):2d}  {moment:10s}  step {logged:4d}, checkpoint {saved:4d}", flush=True)
        if (run / "recipe.yaml").is_file():  # else it was killed before there was a run to resume
            arguments, record.resumes = ["train", "--resume", str(run)], record.resumes + 1
    with WatchedRun(arguments, folder) as watched:
        if watched.wait(args.patience):
            raise RuntimeError(f"the last resume failed:\n{tail(watched.log)}")
        record.left += watched.outliving()
    return record


def files(run: Path) -> set[str]:
    """Everything in a run folder, by its path there."""
    return {str(path.relative_to(run)) for path in run.rglob("*")}


def file_differences(run: Path, other: Path) -> Iterator[str]:
    """Files that one run folder has and the other has not."""
    yield from (f"left over: {name}" for name in sorted(files(run) - files(other)))
    yield from (f"missing: {name}" for name in sorted(files(other) - files(run)))


def judge(record: Record, args: argparse.Namespace) -> Iterator[str]:
    """Print the table of kills; what does not hold of them."""
    print(f"\n{'moment':12s}{'kills':>6s}{'steps lost, mean':>18s}{'most':>6s}")
    for moment in ("step", "checkpoint", "start-up"):
        lost = [lost for kind, _, lost in record.kills if kind == moment]
        if lost:
            print(f"{moment:12s}{len(lost):6d}{sum(lost) / len(lost):18.2f}{max(lost):6d}")
    lost = [lost for _, _, lost in record.kills]
    print(
        f"{len(lost)} kills, {record.resumes} resumes, {sum(lost)} steps lost of {args.steps} (saved every {args.save})"
    )
    if max(lost) > args.save:
        yield f"a kill lost {max(lost)} steps, more than the {args.save} between two checkpoints"
    yield from (f"outlived a killed run: {name}" for name in record.left)


def main() -> int:
    """Read the options, run, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_options(parser, steps=40)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--save", type=int, default=3, help="steps between two checkpoints")
    parser.add_argument("--in-writing", type=float, default=0.3, help="share of kills while a checkpoint is written")
    args = parser.parse_args()
    before = shared_memory()
    with working_folder(args.out) as folder:
        common = [*prepared(args, folder), *RL_SMALL, f"rl.max_steps={args.steps}", f"rl.save_steps={args.save}"]
        common += [*args.set, f"output_dir={folder}"]
        started = time.monotonic()
        finished(["train", "rl", *common, "name=undisturbed"], folder / "undisturbed-log", args.patience)
        whole = time.monotonic() - started
        args.step_s = step_seconds(folder / "undisturbed")
        args.startup = max(1.0, whole - args.step_s * args.steps)
        print(f"undisturbed: {whole:.1f} s, {args.step_s:.2f} s a step, {args.startup:.1f} s to start", flush=True)
        run = folder / "killed"
        record = killed_run(["train", "rl", *common, "name=killed"], run, folder / "killed-log", args)
        problems = [*judge(record, args), *differences(run, folder / "undisturbed")]
        problems += file_differences(run, folder / "undisturbed")
        problems += [f"/dev/shm: {name}" for name in sorted(shared_memory() - before)]
        return conclude(problems)


def step_seconds(run: Path) -> float:
    """Median time of a step."""
    times = sorted(line["time/step_s"] for line in read_metrics(run))
    return float(times[len(times) // 2])


if __name__ == "__main__":
    run_script(main)
