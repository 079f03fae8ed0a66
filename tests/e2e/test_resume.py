"""A run that is killed at any moment and resumed ends like one that was left alone, bit for bit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_drive.config import load_recipe
from rlhf_drive.policies import load_policy
from rlhf_drive.policies.checkpoints import sha256
from rlhf_drive.scenes.store import SceneStore
from rlhf_drive.training import pipeline
from rlhf_drive.training.metrics import read_metrics
from rlhf_drive.training.scenes import build_scenes

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 100.0
"""Longest wait for one process; a hang fails the test instead of stopping the suite."""
STAGES = ("sft", "rl-seed0")
# 38 training scenes in batches of 16: epochs end at SFT steps 3, 6, 9 and 12, none of which is saved.
OVERRIDES = (
    "policy.d_model=32", "policy.num_heads=2", "policy.encoder_layers=1", "policy.decoder_layers=1",
    "policy.num_experts=4", "policy.expert_dim=16", "policy.max_agents=6", "policy.max_polylines=8",
    "policy.points_per_polyline=5", "policy.dropout=0.1", "tokenizer.low=-5", "tokenizer.high=15",
    "tokenizer.step=0.1", "sft.max_epochs=4", "sft.batch_size=16", "sft.save_steps=5", "sft.learning_rate=3e-3",
    "rollout.num_generations=4", "rollout.scenes_per_step=8", "rollout.steps=4", "rl.max_steps=7", "rl.save_steps=3",
    "rl.micro_batch_scenes=3", "rl.learning_rate=1e-3", "rl.seeds=[0]", "compare.samples=1", "compare.steps=4",
    "compare.bootstrap_samples=100", "compare.pictures=0", "logging.tensorboard=false", "device=cpu",
)  # fmt: skip

TRAP = """
import os, signal, sys, time
from pathlib import Path
from rlhf_drive.cli import main
from rlhf_drive.training import checkpoint, journal

kind, target = sys.argv[1].split("@")

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def after_step(log=journal.RunJournal.log):
    def wrapped(self, step, metrics):
        log(self, step, metrics)
        if f"{self.phase}/{step}" == target:
            die()
    journal.RunJournal.log = wrapped

def around_saving(replace=checkpoint.replace_folder):
    def wrapped(temporary, final):
        if kind == "written" and "/".join(final.parts[-3:]) == target:
            die()
        replace(temporary, final)
        if kind == "saved" and "/".join(final.parts[-3:]) == target:
            die()
    checkpoint.replace_folder = wrapped

def between_renames(replace=Path.replace):
    def wrapped(self, to):
        result = replace(self, to)
        if "/".join(Path(to).parts[-2:]) == target:
            die()
        return result
    Path.replace = wrapped

def slow_disk(fsync=os.fsync):
    def wrapped(descriptor):
        time.sleep(float(target))
        fsync(descriptor)
    os.fsync = wrapped

traps = {"logged": after_step, "written": around_saving, "saved": around_saving, "moved": between_renames}
traps |= {"slow": slow_disk, "none": lambda: None}
traps[kind]()
main(sys.argv[2:])
"""
"""The command line in a process that kills itself at `kind@target`, or whose disk takes `target` seconds."""


def start(folder: Path, *arguments: str, trap: str = "") -> subprocess.Popen[str]:
    """`rlhf-drive ARGUMENTS` as a process of its own, with one thread."""
    command = ["-c", TRAP, trap] if trap else ["-m", "rlhf_drive.cli"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *command, *arguments], cwd=folder, env=environment, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> int:
    """Exit code, once the process has ended by itself; it is ended when it takes too long."""
    try:
        _, errors = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
        process.wait()
    assert process.returncode in (0, -9), errors
    return process.returncode


@pytest.fixture(scope="module")
def new_run(tiny_store: SceneStore) -> Callable[[Path], list[str]]:
    """Arguments that start the shrunk quickstart in a folder."""
    return lambda folder: [
        "train", "quickstart", f"output_dir={folder}", "name=run", "scenes.source=store",
        f"scenes.store={tiny_store.path}", *OVERRIDES,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(new_run: Callable[[Path], list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert finish(start(folder, *new_run(folder))) == 0
    return folder / "run"


def lasting(run: Path) -> dict[str, Any]:
    """All that a run leaves behind except for times, rates and its random name."""
    metrics = [
        {k: v for k, v in line.items() if not k.startswith("time/") and "idle" not in k} for line in read_metrics(run)
    ]
    summary = json.loads((run / "summary.json").read_text())
    assert summary.pop("minutes") > 0
    weights = {stage: (run / stage / "policy" / "policy.safetensors").read_bytes() for stage in STAGES}
    # The state files hold a checksum of the optimizer's state and the generators.
    states = {
        str(path.relative_to(run)): json.loads(path.read_text())
        for path in run.glob("*/checkpoints/step-*/state.json")
    }  # fmt: skip
    for state in states.values():
        owner = state.pop("run")  # its id is random, and its recipe names another output_dir
        assert (len(owner["id"]), owner["phase"] in STAGES) == (16, True)
    report = json.loads((run / "report.json").read_text())
    return {"metrics": metrics, "summary": summary, "weights": weights, "states": states, "report": report}


def assert_same(run: Path, other: Path) -> None:
    """Compare piece by piece, so that a failure names the piece."""
    left, right = lasting(run), lasting(other)
    for a, b in zip(left["metrics"], right["metrics"], strict=True):
        assert a == b
    for key in ("summary", "states", "report", "weights"):
        assert left[key] == right[key], key
    assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in other.iterdir())


def checkpoints(run: Path, stage: str) -> list[int]:
    """Steps of the checkpoints that count; each must be whole."""
    folders = sorted((run / stage / "checkpoints").glob("step-*"))
    for folder in folders:
        load_policy(folder)
        assert sha256(folder / "trainer.pt") == json.loads((folder / "state.json").read_text())["sha256"]
    return [int(folder.name[-6:]) for folder in folders]


def test_the_run_is_worth_comparing(uninterrupted: Path) -> None:
    lines = read_metrics(uninterrupted)
    assert [(line["phase"], line["step"]) for line in lines] == [
        *(("sft", step) for step in range(1, 13)), *(("rl-seed0", step) for step in range(1, 8))
    ]  # fmt: skip
    assert checkpoints(uninterrupted, "sft") == [5, 10]
    assert checkpoints(uninterrupted, "rl-seed0") == [6, 7]
    assert len({line["loss/train"] for line in lines if line["phase"] == "sft"}) == 12
    learned = [line for line in lines if line["phase"] == "rl-seed0" and line["optim/grad_norm"] > 0]
    assert len(learned) >= 5


# In order: a better policy about to replace the old one, which is away already; a checkpoint written but not in place;
# RL between checkpoints; the last checkpoint in place while the oldest is still there, and no policy written yet.
KILLS = (
    ("moved@sft/.policy.old", "sft", [5]),
    ("written@sft/checkpoints/step-000010", "sft", [5]),
    ("logged@rl-seed0/5", "rl-seed0", [3]),
    ("saved@rl-seed0/checkpoints/step-000007", "rl-seed0", [3, 6, 7]),
)


def test_killed_at_awkward_moments(uninterrupted: Path, new_run: Callable[[Path], list[str]], tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = new_run(tmp_path)
    for trap, stage, saved in KILLS:
        assert finish(start(tmp_path, *arguments, trap=trap)) == -9, f"{trap} was never reached"
        assert checkpoints(run, stage) == saved, trap
        arguments = ["train", "--resume", str(run)]
    assert not (run / "rl-seed0" / "policy").exists()
    assert finish(start(tmp_path, *arguments)) == 0
    assert_same(run, uninterrupted)


def steps_logged(run: Path, stage: str) -> int:
    """Whole lines of a stage so far."""
    return len(read_metrics(run, phase=stage)) if (run / "metrics.jsonl").is_file() else 0


def when_logged(process: subprocess.Popen[str], run: Path, stage: str, step: int) -> None:
    """Wait until a step was logged."""
    deadline = time.monotonic() + PATIENCE_S
    while steps_logged(run, stage) < step and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    assert steps_logged(run, stage) >= step, process.stderr.read() if process.stderr and process.poll() else ""


def when_writing(process: subprocess.Popen[str], run: Path, stage: str) -> None:
    """Wait until a checkpoint is being written."""
    assert wait_for(lambda: any(run.glob(f"{stage}/checkpoints/.step-*.tmp")) or process.poll() is not None)
    assert process.poll() is None, process.stderr.read() if process.stderr else ""


def killed(process: subprocess.Popen[str], delay_s: float) -> None:
    """SIGKILL after some time."""
    time.sleep(delay_s)
    process.kill()
    process.communicate(timeout=PATIENCE_S)


def test_killed_from_outside_at_random_moments(
    uninterrupted: Path, new_run: Callable[[Path], list[str]], tmp_path: Path
) -> None:
    """Somewhere in SFT, somewhere in RL, and somewhere in the writing of a checkpoint to a slow disk."""
    seed = time.time_ns()
    generator = random.Random(seed)
    run = tmp_path / "run"
    arguments = new_run(tmp_path)
    print(f"seed {seed}")
    for stage, last, trap in (("sft", 11, "none@"), ("rl-seed0", 0, "slow@0.1"), ("rl-seed0", 6, "none@")):
        process, delay_s = start(tmp_path, *arguments, trap=trap), 0.0
        try:
            if last:
                when_logged(process, run, stage, generator.randint(1, last))
                delay_s = generator.uniform(0.0, 0.05)
            else:  # four files and three folders are synced
                when_writing(process, run, stage)
                delay_s = generator.uniform(0.0, 0.7)
        finally:
            killed(process, delay_s)
        logged = {name: steps_logged(run, name) for name in STAGES}
        print(f"killed after {1000 * delay_s:.0f} ms {trap}: {logged}, saved {checkpoints(run, stage)}")
        arguments = ["train", "--resume", str(run)]
    assert finish(start(tmp_path, *arguments)) == 0
    assert_same(run, uninterrupted)


def test_asked_to_stop_and_started_twice(
    uninterrupted: Path, new_run: Callable[[Path], list[str]], tmp_path: Path
) -> None:
    """SIGTERM in SFT and SIGINT in RL leave a checkpoint of the very step; a second resume meanwhile is refused."""
    run = tmp_path / "run"
    arguments, resume = new_run(tmp_path), ["train", "--resume", str(run)]
    for stage, step, number, code in (("sft", 2, signal.SIGTERM, 143), ("rl-seed0", 1, signal.SIGINT, 130)):
        process = start(tmp_path, *arguments)
        try:
            when_logged(process, run, stage, step)
            if stage == "sft":
                process.send_signal(signal.SIGSTOP)  # it holds the folder for as long as the other one needs to start
                _, refusal = (second := start(tmp_path, *resume)).communicate(timeout=PATIENCE_S)
                assert second.returncode == 2
                assert f"Error: Another process works in {run}: process {process.pid} on " in refusal
                process.send_signal(signal.SIGCONT)
            process.send_signal(number)
            errors = process.communicate(timeout=PATIENCE_S)[1]
        finally:
            process.kill()
            process.wait()
        assert process.returncode == code, errors
        done = steps_logged(run, stage)
        assert step <= done <= step + 2  # the one in progress; what was asked in the last moment
        assert checkpoints(run, stage)[-1] == done
        name = signal.Signals(number).name
        assert f"Stopped by {name} after step {done} of {stage}; its checkpoint is written." in errors
        assert f"Go on with: rlhf-drive train --resume {run}" in errors
        assert "Traceback" not in errors
        arguments = resume
    assert finish(start(tmp_path, *arguments)) == 0
    assert_same(run, uninterrupted)


def children(pid: int) -> list[int]:
    """Processes that a process has started."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


def wait_for(condition: Callable[[], bool]) -> bool:
    """Whether it comes true in time."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


@pytest.mark.skipif(
    not Path("/proc/self/task").is_dir() or len(os.sched_getaffinity(0)) < 2, reason="needs /proc and two cores"
)
def test_killed_while_scenes_are_made(tmp_path: Path) -> None:
    """Workers end with the run, and a resumed run makes the same store as one that was left alone."""
    arguments = ["train", "scenes", "scenes.count=26", "scenes.min_human_pdms=0", f"output_dir={tmp_path}"]
    process = start(tmp_path, *arguments, "name=run")
    try:
        assert wait_for(lambda: len(children(process.pid)) >= 2)  # the workers; what else there is ends with them
        workers = children(process.pid)
    finally:
        process.kill()
        process.communicate(timeout=PATIENCE_S)
    assert wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))
    run = tmp_path / "run"
    assert not (run / "scenes").exists()
    recipe = load_recipe(run / "recipe.yaml")
    assert pipeline.run(recipe, resume=run) == run
    store = build_scenes(recipe.scenes, tmp_path / "store", workers=1)
    assert len(store) + len(store.info["refused"]) == 26
    for path in sorted(store.path.iterdir()):
        assert (run / "scenes" / path.name).read_bytes() == path.read_bytes()
