"""A run of the command line as a process of its own: started, killed, and what it leaves behind.

The soak scripts are made of this. A run has a folder for temporary files of its own, so that whatever lies there at its
end is the run's; and every process that descends from it is noted while it works, with its start time, so that one
which outlives it is found again, and no other process that got its number is taken for it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from rlhf_drive.policies.checkpoints import sha256
from rlhf_drive.training.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "policy.d_model=32", "policy.num_heads=2", "policy.encoder_layers=1", "policy.decoder_layers=1",
    "policy.num_experts=4", "policy.expert_dim=16", "policy.max_agents=6", "policy.max_polylines=8",
    "policy.points_per_polyline=5",
)  # fmt: skip
"""A policy that samples and learns in a fraction of a second."""
RL_SMALL = (
    "rollout.num_generations=4", "rollout.scenes_per_step=8", "rollout.scenes_per_chunk=4", "rl.micro_batch_scenes=4",
    "rl.learning_rate=1e-3", "rl.monitor_steps=0", "logging.tensorboard=false", "logging.picture_steps=0", "device=cpu",
)  # fmt: skip
"""RL steps of that size."""
PROCESSES = {
    "masked": ("rollout.steps=4",),
    "autoregressive": ("rollout.steps=16",),
}
"""How each decoding process samples."""
UNLIKE = ("time/", "service/", "rollout/", "async/")
"""Areas of metrics that measure the machine."""
RAY_LOGS = "ray"
"""Folder of Ray's sessions among the temporary files: logs, which Ray leaves for whoever wants to read them."""
TORCH_CACHE = "torchinductor_"
"""What the folder of torch's compiler begins with, which it leaves for the next process."""


@dataclass
class WatchedRun:
    """One process of the command line and all that descend from it; a context manager that leaves none behind."""

    arguments: Sequence[str]
    """Of the command line."""
    folder: Path
    """For its temporary files and its log; of this process alone."""
    environment: dict[str, str] = field(default_factory=dict)
    """On top of this process's own."""

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.temporary = Path(tempfile.mkdtemp(prefix="soak-"))  # a short path: Ray's sockets lie in it
        self.log = self.folder / "log.txt"
        here = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT), "RAY_ADDRESS": "local"}
        here |= {name: str(self.temporary) for name in ("TMPDIR", "RAY_TMPDIR")}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "rlhf_drive.cli", *self.arguments], cwd=self.folder, stdout=log, stderr=log,
                env=os.environ | here | self.environment, start_new_session=True,
            )  # fmt: skip
        self._root = psutil.Process(self.process.pid)
        self._known: dict[int, psutil.Process] = {}
        self._lock, self._over = threading.Lock(), threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def _watch(self) -> None:
        while not self._over.wait(0.1):
            self._look()

    def _look(self) -> None:
        with self._lock, contextlib.suppress(psutil.NoSuchProcess):
            for found in self._root.children(recursive=True):
                self._known.setdefault(found.pid, found)

    def descendants(self) -> list[psutil.Process]:
        """Processes that have descended from it so far and are alive."""
        self._look()
        with self._lock:
            return [found for found in self._known.values() if _alive(found)]

    def workers(self, kind: str) -> list[psutil.Process]:
        """Actors of a class in the Ray that this run has started; none where it uses somebody else's."""
        return [found for found in self.descendants() if _title(found).startswith(f"ray::{kind}")]

    def kill(self) -> None:
        """SIGKILL to the process itself; those below are left to notice."""
        self._look()
        self.process.kill()
        self.process.wait()

    def wait(self, timeout_s: float) -> int:
        """Its exit code.

        Raises:
            subprocess.TimeoutExpired: It is still at work.
        """
        return self.process.wait(timeout_s)

    def outliving(self, grace_s: float = 30.0) -> list[str]:
        """Descendants that are alive so long after it has ended, and temporary files but for logs and caches."""
        deadline = time.monotonic() + grace_s
        while (alive := self.descendants()) and time.monotonic() < deadline:
            time.sleep(0.1)
        kept = (RAY_LOGS, TORCH_CACHE)
        files = [path for path in self.temporary.iterdir() if not path.name.startswith(kept)]
        return [f"process {found.pid} {_title(found)}" for found in alive] + [str(path) for path in files]

    def ray_log_mb(self) -> float:
        """Size of Ray's session folders."""
        paths = (self.temporary / RAY_LOGS).rglob("*") if (self.temporary / RAY_LOGS).is_dir() else ()
        return sum(path.stat().st_size for path in paths if path.is_file() and not path.is_symlink()) / 1e6

    def __enter__(self) -> WatchedRun:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End what is left, and drop the temporary files."""
        if self.process.poll() is None:
            self.kill()
        left = self.descendants()
        for found in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                found.kill()
        psutil.wait_procs(left, timeout=10.0)  # one that is still at it would make its files anew
        self._over.set()
        self._watcher.join()
        shutil.rmtree(self.temporary, ignore_errors=True)


def _alive(process: psutil.Process) -> bool:
    """Whether it is the process that was seen, and no zombie."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _title(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline()).strip()[:100]
    return "?"


def shared_memory() -> set[str]:
    """Names in /dev/shm that no living process has open or mapped: whose owner is gone."""
    folder = Path("/dev/shm")
    names = {str(path) for path in folder.iterdir()} if folder.is_dir() else set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            maps = Path(f"/proc/{process.pid}/maps").read_text()
            names -= {name for name in names if name in maps}
            names -= {str(link.readlink()) for link in Path(f"/proc/{process.pid}/fd").iterdir() if link.is_symlink()}
    return names


def finished(arguments: Sequence[str], folder: Path, timeout_s: float) -> None:
    """A run that nobody disturbs.

    Raises:
        RuntimeError: It failed; its last lines are shown.
    """
    with WatchedRun(arguments, folder) as run:
        if run.wait(timeout_s):
            raise RuntimeError(f"{' '.join(arguments)} failed:\n{tail(run.log)}")


def prepared(args: Any, folder: Path) -> list[str]:
    """What an RL run needs beside its recipe, as overrides: `args.store` and `args.policy`, or small ones made here."""
    store, policy = args.store, args.policy
    if store is None:
        scenes = ("scenes.min_human_pdms=0", f"scenes.count={args.scenes}", "name=scenes")
        finished(["train", "scenes", f"output_dir={folder}", *scenes], folder / "scenes-log", args.patience)
        store = folder / "scenes" / "scenes"
    if policy is None:
        sft = ("sft.max_epochs=3", "sft.batch_size=16", "logging.tensorboard=false", "device=cpu", "name=sft")
        process = f"process.name={args.process}"
        where = (f"output_dir={folder}", f"scenes.store={store}")
        finished(["train", "sft", *where, *sft, process, *SMALL], folder / "sft-log", args.patience)
        policy = folder / "sft" / "sft" / "policy"
    return [f"scenes.store={Path(store).resolve()}", f"rl.policy={Path(policy).resolve()}", *PROCESSES[args.process]]


def add_run_options(parser: Any, *, steps: int) -> None:
    """Options that `prepared` and the scripts share."""
    parser.add_argument("--steps", type=int, default=steps, help="RL steps of the run")
    parser.add_argument("--process", choices=list(PROCESSES), default="masked")
    parser.add_argument("--scenes", type=int, default=48, help="scenes to generate, without --store")
    parser.add_argument("--store", type=Path, help="scene store to use instead")
    parser.add_argument("--policy", type=Path, help="SFT policy to start from instead of a small new one")
    parser.add_argument("--out", type=Path, help="folder for the runs, kept; a temporary one without")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes to the recipe rl")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--patience", type=float, default=1800.0, help="seconds that one process may take")


@contextlib.contextmanager
def working_folder(out: Path | None) -> Iterator[Path]:
    """`out`, or a folder that is removed in the end."""
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        yield out.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="soak-runs-") as folder:
        yield Path(folder)


def differences(run: Path, other: Path) -> Iterator[str]:
    """Where two runs of the same recipe are not the same: metrics of their RL steps, bits of their weights."""
    ours, theirs = rl_lines(run), rl_lines(other)
    if len(ours) != len(theirs):
        yield f"{len(ours)} metrics lines, {len(theirs)} undisturbed"
    for one, two in zip(ours, theirs, strict=False):
        if one != two:
            names = sorted(name for name in {*one, *two} if one.get(name) != two.get(name))
            yield f"metrics of step {one['step']} differ: {', '.join(names[:6])}"
    for path in sorted(other.glob("rl-seed0/**/*.safetensors")):
        mine = run / path.relative_to(other)
        if not mine.is_file() or sha256(mine) != sha256(path):
            yield f"{path.relative_to(other)} differs"


def rl_lines(run: Path) -> list[dict[str, Any]]:
    """Metrics of the RL steps logged so far, without those that measure the machine."""
    if not (run / "metrics.jsonl").is_file():
        return []
    lines = [line for line in read_metrics(run) if line["phase"].startswith("rl")]
    return [{name: value for name, value in line.items() if not name.startswith(UNLIKE)} for line in lines]


def tail(log: Path, lines: int = 15) -> str:
    """The last lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def run_script(main: Callable[[], int]) -> None:
    """Run a script; SIGTERM ends it as an error does, with all that it has started."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(main())
    except (RuntimeError, TimeoutError, subprocess.TimeoutExpired) as error:
        sys.exit(f"FAILED: {error}")


def conclude(problems: Iterable[str]) -> int:
    """Print what does not hold; the exit code."""
    found = list(problems)
    print("\n".join(f"FAILED: {problem}" for problem in found) or "all of it holds")
    return 1 if found else 0
