"""Several processes that run one command: how they start, which of them speaks, and how an error of one ends all.

`torchrun`, `accelerate launch` and Ray Train each start the same command N times and tell every process its number.
Torch is imported only where processes were launched, so that a command in one process starts as fast as ever.
"""

from __future__ import annotations

import gc
import os
import socket
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_drive.errors import ConfigError, RlhfDriveError, StorageError

if TYPE_CHECKING:
    from rlhf_drive.training.ranks import Ranks

__all__ = ["check_shared", "is_main", "launched", "one_voice", "process_group", "quiet_unless_main"]

EXIT_FAILED = 1
"""Exit code after an error that is not the user's to mend."""
GRACE_S = 30.0
"""How long a process that has failed stays until the main one has closed its services, before launchers end it."""
_STORE_S = 5.0
"""How long to look for the launcher's store, where processes tell each other who failed first."""
SHOW_UP_S = 20.0
"""How long a file may take to show up on another machine: network file systems remember what was not there."""


def launched() -> bool:
    """Whether this process is one of several that a launcher has started."""
    return int(os.environ.get("WORLD_SIZE") or 1) > 1


def is_main() -> bool:
    """Whether this process makes folders, writes files and speaks; true for one that was started alone."""
    return not launched() or int(os.environ.get("RANK") or 0) == 0


@contextmanager
def quiet_unless_main() -> Iterator[None]:
    """Let only the main process's standard output through."""
    if is_main():
        yield
        return
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        yield


@contextmanager
def process_group(device: str, timeout_s: float) -> Iterator[Ranks]:
    """The processes of this run: those that were launched together, or this one alone. Left in any case.

    Args:
        device: `auto`, `cpu` or `cuda`, as in a recipe.
        timeout_s: A process that waits for another for longer ends with an error.

    Raises:
        ConfigError: There are more processes on this machine than GPUs.

    Example:
        >>> with process_group("cpu", 1800.0) as ranks:
        ...     ranks.count
        1
    """
    from rlhf_drive.training.ranks import Ranks

    if not launched():
        yield Ranks(timeout_s)
        return
    import torch.distributed as dist

    started = not dist.is_initialized()  # Ray Train has its own
    if started:
        _start_group(device, timeout_s)
    try:
        yield Ranks(timeout_s)
    finally:
        if started and dist.is_initialized():
            dist.destroy_process_group()


def _start_group(device: str, timeout_s: float) -> None:
    import torch
    import torch.distributed as dist

    backend = "gloo"
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        place, gpus = int(os.environ.get("LOCAL_RANK") or 0), torch.cuda.device_count()
        if place >= gpus:
            raise ConfigError(
                f"Process {place} of {socket.gethostname()}, counted from 0, has no GPU of its own: there are {gpus}. "
                "Start as many processes a machine as it has GPUs, or set device=cpu."
            )
        torch.cuda.set_device(place)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))


def check_shared(folder: Path, ranks: Ranks, *, wait_s: float = SHOW_UP_S) -> None:
    """Make sure that all processes see the same `folder`, before they train towards it.

    Args:
        folder: One that the main process writes to.
        ranks: The processes; all must call this.
        wait_s: Time that a file may take to show up.

    Raises:
        StorageError: A process does not; on all of them alike.
    """
    if ranks.count == 1:
        return
    marker = folder / f".seen-{ranks.first(uuid.uuid4().hex)}"
    problem = ""
    if ranks.main:
        try:
            marker.touch()
        except OSError as error:
            problem = str(error)
    if problem := ranks.first(problem):
        raise StorageError(f"{folder} cannot be written by the main process: {problem}.")
    deadline = time.monotonic() + wait_s
    while not (seen := marker.exists()) and time.monotonic() < deadline:
        time.sleep(0.2)
    blind = [host for host in ranks.gather(None if seen else socket.gethostname()) if host]
    if ranks.main:
        marker.unlink(missing_ok=True)
    if blind:
        raise StorageError(
            f"{folder} is not the same folder on all machines: {len(blind)} of {ranks.count} processes, the first on "
            f"{blind[0]}, do not see what the main one on {ranks.first(socket.gethostname())} writes there. Set "
            "output_dir to a folder on storage that all machines share, given by its full path."
        )


@contextmanager
def one_voice(report: Callable[[RlhfDriveError], int]) -> Iterator[None]:
    """Run a command: on several processes, one speaks, and the first error is the one that is shown.

    When a process fails, those that wait for it fail too, with messages about closed connections. The process that
    failed first shows its error; all others end without a word. Launchers end all processes as soon as one has ended
    with an error: processes but the main one therefore wait up to `GRACE_S` for it to close what it has opened.

    Args:
        report: Shows an error on purpose and gives the exit code.

    Raises:
        SystemExit: After an error.
    """
    if not launched():
        try:
            yield
        except RlhfDriveError as error:
            sys.exit(report(error))
        return
    board = _Board()
    try:
        with quiet_unless_main():
            yield
        return
    except RlhfDriveError as error:
        code = report(error) if board.claim() else int(getattr(error, "exit_code", EXIT_FAILED))
        _let_go(error)
    except SystemExit as end:
        if not end.code:
            raise
        board.claim()  # has spoken already, as the parser of the command line does
        code = end.code if isinstance(end.code, int) else EXIT_FAILED
    except BaseException as error:
        if board.claim():
            traceback.print_exception(error)
        code = EXIT_FAILED
        _let_go(error)
    sys.stderr.flush()
    _leave_group()
    if is_main():
        board.say_closed()
    else:
        board.wait_until_closed()
    sys.exit(code)


def _let_go(error: BaseException | None) -> None:
    """Forget what the functions that an error has left were working on: it holds connections open."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _leave_group() -> None:
    """Close connections, so that processes that wait for this one stop waiting."""
    gc.collect()
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        with suppress(RuntimeError):  # half of the group may be gone
            dist.destroy_process_group()


class _Board:
    """The launcher's store, where processes that fail tell each other; without one, every process speaks for itself."""

    def __init__(self) -> None:
        self._restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store: Any = None

    def _open(self) -> Any:
        """The store of `torchrun` and `accelerate launch`, which outlives the processes; None elsewhere."""
        if self._store is None and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            import torch.distributed as dist

            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            with suppress(RuntimeError, ValueError):  # it is gone with the launcher
                store = dist.TCPStore(  # type: ignore[attr-defined]
                    host, port, is_master=False, timeout=timedelta(seconds=_STORE_S), wait_for_workers=False
                )
                prefix = f"rlhf-drive/{self._restart}"
                self._store = dist.PrefixStore(prefix, store)  # type: ignore[attr-defined]
        return self._store

    def claim(self) -> bool:
        """Whether this process is the first to fail."""
        store = self._open()
        if store is None:
            return True
        try:
            return int(store.add("failed", 1)) == 1
        except RuntimeError:
            return True

    def say_closed(self) -> None:
        """The main process has closed what it had opened."""
        if (store := self._open()) is not None:
            with suppress(RuntimeError):
                store.set("closed", "yes")

    def wait_until_closed(self) -> None:
        """Until the main process has, or `GRACE_S` have passed."""
        if (store := self._open()) is not None:
            deadline = time.monotonic() + GRACE_S
            with suppress(RuntimeError):  # the launcher is gone
                while time.monotonic() < deadline and not store.check(["closed"]):
                    time.sleep(0.1)
