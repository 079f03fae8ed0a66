"""Several processes that run one command: one voice, one error, one folder, and nothing left running."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from rlhf_drive.config import load_recipe
from rlhf_drive.errors import ConfigError, TrainingError
from rlhf_drive.scenes.store import SceneStore
from rlhf_drive.training.launch import check_shared, is_main, launched, one_voice, process_group, quiet_unless_main
from rlhf_drive.training.metrics import read_metrics
from rlhf_drive.training.pipeline import run
from rlhf_drive.training.ray_launch import RayProcesses, run_on_ray
from rlhf_drive.training.run_folder import RunFolder
from rlhf_drive.training.run_lock import run_lock
from rlhf_drive.workers import connect, import_ray

ROOT = Path(__file__).resolve().parents[2]
JOB = ROOT / "tests" / "oracles" / "launched_job.py"


@dataclass(frozen=True)
class Ended:
    """What two processes left."""

    codes: list[int]
    out: list[str]
    err: list[str]
    seconds: float


def environment(**more: str) -> dict[str, str]:
    """Ours, with the source tree and one thread."""
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"} | more


@contextmanager
def ended_in_any_case(processes: list[subprocess.Popen[str]]) -> Iterator[None]:
    """No process outlives the test."""
    try:
        yield
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def two_processes(case: str, folder: Path) -> Ended:
    """Run the job in two processes with the environment of a launcher, whose store is here."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    launcher = {
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
    }  # fmt: skip
    started = time.monotonic()
    processes = [
        subprocess.Popen(
            [sys.executable, str(JOB), case, str(folder)], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=environment(**launcher, RANK=str(rank), LOCAL_RANK=str(rank)),
        )
        for rank in (0, 1)
    ]  # fmt: skip
    with ended_in_any_case(processes):
        said = [process.communicate(timeout=90) for process in processes]
    codes = [process.returncode for process in processes]
    return Ended(codes, [out for out, _ in said], [err for _, err in said], time.monotonic() - started)


def test_only_the_main_process_speaks(tmp_path: Path) -> None:
    ended = two_processes("fine", tmp_path)
    assert (ended.codes, ended.err) == ([0, 0], ["", ""])
    assert ended.out == ["all here: [0, 1]\n", ""]
    assert [path.name for path in tmp_path.iterdir()] == ["closed"]  # no marker is left


def test_an_error_of_one_ends_all_with_its_message_alone(tmp_path: Path) -> None:
    ended = two_processes("one", tmp_path)
    assert ended.err == ["", "Error: process 1 lacks a file\n"]
    assert ended.codes == [1, 2]
    # Launchers end all processes when one has ended: process 1 stays until the main one's service is closed.
    assert (tmp_path / "at-exit").read_text() == "closed: True"
    assert ended.seconds < 25  # nobody waited for the group's 60 s, or for all of the time to close services


def test_the_same_error_of_all_is_said_once(tmp_path: Path) -> None:
    ended = two_processes("wrong", tmp_path)
    assert sorted(ended.err) == ["", "Error: everybody reads the same wrong recipe\n"]
    assert sorted(ended.codes) == [1, 2]


def test_a_defect_shows_one_trace(tmp_path: Path) -> None:
    ended = two_processes("defect", tmp_path)
    assert ended.err[1] == ""
    assert ended.err[0].count("Traceback") == 1
    assert ended.err[0].endswith("ZeroDivisionError: a defect\n")
    assert ended.codes == [1, 1]


def test_machines_that_do_not_share_the_folder_are_told_so(tmp_path: Path) -> None:
    ended = two_processes("elsewhere", tmp_path)
    assert "".join(ended.err).count("Error: ") == 1
    assert "is not the same folder on all machines: 1 of 2 processes, the first on " in "".join(ended.err)
    assert sorted(ended.codes) == [1, 2]
    assert not list(tmp_path.rglob(".seen-*"))


def test_a_process_alone_has_no_group_and_speaks(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert (launched(), is_main()) == (False, True)
    with process_group("cpu", 1.0) as ranks, quiet_unless_main():
        print("here")
        check_shared(tmp_path / "nowhere", ranks)  # nobody to share it with
    assert (ranks.index, ranks.count, dist.is_initialized()) == (0, 1, False)
    assert capsys.readouterr().out == "here\n"


def test_a_process_alone_reports_errors_on_purpose_and_lets_others_through() -> None:
    seen: list[str] = []

    def report(error: Exception) -> int:
        seen.append(str(error))
        return 7

    with pytest.raises(SystemExit) as ended, one_voice(report):
        raise ConfigError("wrong")
    assert (ended.value.code, seen) == (7, ["wrong"])
    with pytest.raises(ZeroDivisionError), one_voice(report):
        raise ZeroDivisionError


def test_a_launched_process_other_than_the_main_one_is_quiet(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("WORLD_SIZE", "3"), ("RANK", "2")):
        monkeypatch.setenv(name, value)
    assert (launched(), is_main()) == (True, False)
    with quiet_unless_main():
        print("nobody hears this")
    print("but this")
    assert capsys.readouterr().out == "but this\n"


SMALL = (
    "policy.d_model=32", "policy.num_heads=2", "policy.encoder_layers=1", "policy.decoder_layers=1",
    "policy.num_experts=4", "policy.expert_dim=16", "policy.max_agents=6", "policy.max_polylines=8",
    "policy.points_per_polyline=5", "policy.dropout=0.1", "tokenizer.step=0.1", "sft.batch_size=13",
    "sft.micro_batch_scenes=5", "sft.max_epochs=2", "sft.save_steps=2", "scenes.source=store",
)  # fmt: skip


@pytest.fixture(scope="module")
def alone(tiny_store: SceneStore, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """What the recipe measures in one process."""
    folder = tmp_path_factory.mktemp("alone")
    return measured(run(load_recipe("sft", overrides(tiny_store, folder))))


def overrides(store: SceneStore, folder: Path, *more: str) -> list[str]:
    """A recipe of seconds, whose run goes to `folder`."""
    return [*SMALL, f"scenes.store={store.path}", f"output_dir={folder}", *more]


def measured(folder: Path) -> list[dict[str, float]]:
    """A run's metrics without times."""
    lines = read_metrics(folder, phase="sft")
    return [{k: v for k, v in line.items() if isinstance(v, int | float) and "time" not in k} for line in lines]


def agree(left: list[dict[str, float]], right: list[dict[str, float]]) -> bool:
    """Whether two runs measured the same to rounding, step by step."""
    assert [line["step"] for line in left] == [line["step"] for line in right]
    return all(a == pytest.approx(b, rel=1e-5, abs=1e-6) for a, b in zip(left, right, strict=True))


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_torchrun_trains_a_recipe_in_two_processes(
    tiny_store: SceneStore, tmp_path: Path, alone: list[dict[str, float]]
) -> None:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    command = ["-m", "rlhf_drive.cli", "train", "sft", *overrides(tiny_store, tmp_path)]
    process = subprocess.Popen(
        [sys.executable, *launcher, *command], env=environment(), text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    with ended_in_any_case([process]):
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert [path.name for path in tmp_path.iterdir()] == ["sft"]  # one run folder
    assert out.count("run folder: ") == out.count("Run folder: ") == out.count("scenes: ") == 1
    assert agree(alone, measured(tmp_path / "sft"))


@pytest.fixture
def stand_ins(tmp_path: Path) -> Path:
    """Slurm's commands as far as a job on one node needs them; what is put back into the queue is noted."""
    folder = tmp_path / "bin"
    folder.mkdir()
    scripts = {
        "srun": 'while [[ "$1" == --* ]]; do shift; done; exec "$@"',
        "scontrol": f'if [ "$1" = show ]; then echo 127.0.0.1; else echo "$*" >> {tmp_path / "queue"}; fi',
        "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
    }
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(600)  # on a machine that does much else
def test_a_slurm_job_stops_in_time_and_goes_on(
    tiny_store: SceneStore, tmp_path: Path, stand_ins: Path, alone: list[dict[str, float]]
) -> None:
    number = str(free_port() - 20000 + 20000 * 7)
    slurm = {
        "SLURM_JOB_ID": number, "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "here", "SLURM_CPUS_PER_TASK": "2",
        "PROCESSES_PER_NODE": "2", "OUTPUT_DIR": str(tmp_path / "runs"), "STOP_WITHIN_S": "60",
    }  # fmt: skip
    where = environment(**slurm, PATH=f"{stand_ins}:{os.environ['PATH']}")
    given = [item for item in overrides(tiny_store, tmp_path, "sft.max_epochs=8") if "output_dir" not in item]
    command = ["bash", str(ROOT / "examples" / "slurm.sh"), "sft", *given]
    folder = tmp_path / "runs" / f"slurm-{number}"

    first = subprocess.Popen(command, env=where, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with ended_in_any_case([first]):
        deadline = time.monotonic() + 90
        while len(steps_of(folder)) < 3 and time.monotonic() < deadline:
            time.sleep(0.1)
        first.send_signal(signal.SIGUSR1)
        out, err = first.communicate(timeout=120)
    done = steps_of(folder)
    assert 3 <= len(done) < 24, err
    assert f"Stopped by SIGUSR1 after step {len(done)} of sft; its checkpoint is written." in err
    assert (first.returncode, out.count("back into the queue")) == (1, 1)
    assert (tmp_path / "queue").read_text() == f"requeue {number}\n"

    second = subprocess.run(command, env=where, text=True, capture_output=True, timeout=200, check=False)
    assert second.returncode == 0, second.stderr
    assert (tmp_path / "queue").read_text() == f"requeue {number}\n"
    assert steps_of(folder) == list(range(1, 25))
    one = measured(run(load_recipe("sft", overrides(tiny_store, tmp_path / "one", "sft.max_epochs=8"))))
    assert agree(one, measured(folder))


def steps_of(folder: Path) -> list[float]:
    """Steps that a run has written so far."""
    return [line["step"] for line in measured(folder)] if (folder / "metrics.jsonl").exists() else []


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)  # on a machine that does much else
def test_ray_trains_a_recipe_in_two_processes_and_leaves_nothing(
    tiny_store: SceneStore, tmp_path: Path, alone: list[dict[str, float]]
) -> None:
    command = [sys.executable, "-m", "rlhf_drive.cli", "train", "sft", *overrides(tiny_store, tmp_path)]
    ray = ["--ray", "--processes", "2", "--cpus-per-process", "0.5"]
    process = subprocess.Popen(
        [*command, *ray], env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    before: list[psutil.Process] = []
    with ended_in_any_case([process]):
        deadline = time.monotonic() + 120
        while not before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.5)
            if steps_of(tmp_path / "sft"):
                before = psutil.Process(process.pid).children(recursive=True)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.count("run folder: ") == out.count("Run folder: ") == out.count("scenes: ") == 1
    assert agree(alone, measured(tmp_path / "sft"))
    assert len(before) >= 4  # the store, the node's process and two workers at least
    assert psutil.wait_procs(before, timeout=20)[1] == []
    assert not (tmp_path / "sft" / ".ray-train").exists()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)  # on a machine that does much else
def test_errors_on_ray_end_the_run(
    tiny_store: SceneStore, tmp_path: Path, alone: list[dict[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe("sft", overrides(tiny_store, tmp_path, "sft.max_epochs=40"))
    two = RayProcesses(2, cpus=0.5)
    folder = RunFolder.create(recipe).path
    ray = import_ray()
    connection = connect(ray, "local", 2, failure=TrainingError)
    try:
        # An error on purpose keeps its class and message.
        wrong = replace(recipe, sft=replace(recipe.sft, micro_batch_scenes=0))
        with pytest.raises(ConfigError, match=r"^sft.micro_batch_scenes is 0 \(the whole batch\): the 13 scenes"):
            run_on_ray(wrong, RunFolder.create(wrong).path, two)
        with pytest.raises(ConfigError, match=r"^9000 processes with 0.5 CPUs each need 4500, and Ray has "):
            run_on_ray(recipe, folder, RayProcesses(9000, cpus=0.5))
        with pytest.raises(ConfigError, match=r"^1 processes with 1 GPUs each need 1, and Ray has 0"):
            run_on_ray(recipe, folder, RayProcesses(1, gpus=1.0))
        # A process that is lost ends the run, which says how to go on.
        killer = threading.Thread(target=kill_a_worker, args=(folder,))
        killer.start()
        again = rf"Go on from the last checkpoint with: rlhf-drive train --resume {folder} --ray --processes 2"
        with pytest.raises(TrainingError, match=rf"^Process \d of 2 ended: .*{again}"):
            run_on_ray(recipe, folder, two)
        killer.join()
        done = len(steps_of(folder))
        assert 3 <= done < 120
        assert ray.is_initialized()  # it was not run_on_ray that started it
    finally:
        connection.leave()
    assert agree(steps := measured(folder), steps)
    assert not (folder / ".ray-train").exists()


def kill_a_worker(folder: Path) -> None:
    """Kill a process that trains, once there are three steps."""
    deadline = time.monotonic() + 120
    while len(steps_of(folder)) < 3 and time.monotonic() < deadline:
        time.sleep(0.1)
    for child in psutil.Process().children(recursive=True):
        if "RayTrainWorker" in " ".join(child.cmdline()):
            child.kill()
            return


def test_a_run_that_goes_on_keeps_what_ray_has_noted_of_it(tiny_store: SceneStore, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    recipe = load_recipe("sft", overrides(tiny_store, tmp_path))
    folder = RunFolder.create(recipe).path
    (folder / ".ray-train").mkdir()
    with (
        run_lock(folder),
        pytest.raises(ConfigError, match=f"^Another process works in {folder}: process {os.getpid()}"),
    ):
        run_on_ray(recipe, folder, RayProcesses(1), address="127.0.0.1:1")
    assert (folder / ".ray-train").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"processes": 0}, "--processes 0: a run needs at least one"),
        ({"gpus": 0.5}, "--gpus-per-process 0.5: give 1, or 0"),
        ({"cpus": 0.0}, "--cpus-per-process 0: a process needs a core"),
    ],
)
def test_what_ray_cannot_be_asked_for(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RayProcesses(**{"processes": 1, **changes})  # type: ignore[arg-type]
