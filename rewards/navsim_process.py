"""The worker in the other environment, seen from here: started when needed, given up when it hangs, started again."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from rewards.call_thread import CallTimeoutError, WorkerDiedError
from rewards.navsim_worker import pack_message, read_message
from rlhf_drive.errors import RewardError

__all__ = ["NavsimProcess", "refusal"]

Arrays = Mapping[str, NDArray[np.float64]]
Answer = tuple[dict[str, Any], dict[str, NDArray[np.float64]]]
_START_LIMIT_S = 180.0
_CHECK_LIMIT_S = 60.0
_END_LIMIT_S = 2.0
_MOST_FAILED_STARTS = 3
_READ_SIZE = 1 << 16


class _Running:
    """One process and our end of its standard input and output."""

    def __init__(self, command: Sequence[str]) -> None:
        """Start it.

        Raises:
            OSError: It cannot be started.
        """
        self._ours, theirs = socket.socketpair()
        environment = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **os.environ}
        with theirs:
            try:
                self._process = subprocess.Popen(
                    list(command),
                    stdin=theirs.fileno(),
                    stdout=theirs.fileno(),
                    stderr=subprocess.PIPE,
                    env=environment,
                    start_new_session=True,  # Ctrl-C is for us; it ends when we close its input
                )
            except OSError:
                self._ours.close()
                raise
        assert self._process.stderr is not None
        self.owner = os.getpid()
        self._said: deque[str] = deque(maxlen=20)
        self._listener = threading.Thread(target=_listen, args=(self._process.stderr, self._said), daemon=True)
        self._listener.start()

    def ask(self, message: bytes, limit_s: float) -> Answer:
        """Send a message, if there is one, and read the next answer.

        Raises:
            CallTimeoutError: There is none within `limit_s`.
            WorkerDiedError: The process ended, or answered with something that is no message.
        """
        deadline = time.monotonic() + limit_s
        try:
            self._ours.settimeout(limit_s)
            self._ours.sendall(message)
            return read_message(lambda count: self._read(count, deadline))
        except TimeoutError as error:
            raise CallTimeoutError from error
        except (OSError, EOFError, ValueError, KeyError) as error:
            raise WorkerDiedError(f"the process with navsim {self._end(error)}") from error

    def stop(self, *, now: bool = False) -> None:
        """End the process: by closing its input, or at once; one that does not end in time is killed."""
        self._ours.close()
        if self.owner != os.getpid():
            return  # a fork's copy: the process is its parent's
        try:
            self._process.wait(0.0 if now else _END_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._listener.join(_END_LIMIT_S)

    def _read(self, count: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < count:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self._ours.settimeout(left)
            part = self._ours.recv(min(count - len(data), _READ_SIZE))
            if not part:
                raise EOFError
            data += part
        return bytes(data)

    def _end(self, error: Exception) -> str:
        """How the process ended, and the last thing it said."""
        if isinstance(error, (ValueError, KeyError)):
            return f"answered with something that is no message ({error})"
        try:
            status = f"ended with status {self._process.wait(_END_LIMIT_S)}"
            self._listener.join(_END_LIMIT_S)
        except subprocess.TimeoutExpired:
            status = "closed its output"
        last = next((line for line in reversed(self._said) if line), "")
        return f"{status}: {last[:200]}" if last else status


def _listen(stream: IO[bytes], said: deque[str]) -> None:
    with stream:
        for line in stream:
            said.append(line.decode(errors="replace").strip())


def refusal(command: Sequence[str]) -> str:
    """Why the command, a worker that only checks its environment, refuses; or nothing.

    Raises:
        OSError: It cannot be started.
        CallTimeoutError: It does not answer.
        WorkerDiedError: It ended without an answer.
    """
    running = _Running(command)
    try:
        return str(running.ask(b"", _CHECK_LIMIT_S)[0]["reason"])
    finally:
        running.stop()


class NavsimProcess:
    """Requests to one worker, one at a time; threads may share it.

    The worker starts with the first request. One that does not answer in time, or ends, is replaced with the next
    request. One that refuses to start, or fails to three times in a row, is not started again.
    """

    def __init__(self, command: Sequence[str], timeout_s: float) -> None:
        """Start nothing yet.

        Args:
            command: Starts the worker.
            timeout_s: What a request may take; starting the worker does not count.
        """
        self.starts = 0
        """Workers started so far."""
        self._command = tuple(command)
        self._timeout_s = timeout_s
        self._turn = threading.Lock()
        self._running: _Running | None = None
        self._at_exit: Any = None
        self._failed_starts = 0
        self._refusal = ""

    def request(self, header: Mapping[str, object], arrays: Arrays) -> Answer:
        """The worker's answer.

        Raises:
            CallTimeoutError: It took longer than `timeout_s`.
            WorkerDiedError: The worker ended.
            RewardError: There is no worker and none can be started.
        """
        with self._turn:
            running = self._ready()
            try:
                return running.ask(pack_message(dict(header), dict(arrays)), self._timeout_s)
            except BaseException:  # also an interrupt: its answer must not be taken for that of the next request
                self._drop()
                raise

    def close(self) -> None:
        """End the worker; a later request starts another."""
        with self._turn:
            if self._running is not None:
                self._at_exit.detach()
                running, self._running = self._running, None
                running.stop()

    def _ready(self) -> _Running:
        """The worker, started where this process has none."""
        if self._running is not None and self._running.owner == os.getpid():
            return self._running
        if self._refusal:
            raise RewardError(self._refusal)
        self.starts += 1
        try:
            running = _Running(self._command)
        except OSError as error:
            raise self._failed_start(f"{self._command[0]} cannot be started: {error}") from error
        try:
            header, _ = running.ask(b"", _START_LIMIT_S)
        except BaseException as error:
            running.stop(now=True)
            if isinstance(error, (CallTimeoutError, WorkerDiedError)):
                why = str(error) or f"the process with navsim was not ready within {_START_LIMIT_S:g} s"
                raise self._failed_start(why) from error
            raise
        if header["kind"] != "ready":
            running.stop()
            self._refusal = f"NAVSIM's own scorer cannot be used: {header['reason']}"
            raise RewardError(self._refusal)
        self._failed_starts, self._running = 0, running
        self._at_exit = weakref.finalize(self, running.stop)
        return running

    def _failed_start(self, why: str) -> RewardError:
        self._failed_starts += 1
        message = f"NAVSIM's own scorer cannot be started: {why}"
        if self._failed_starts >= _MOST_FAILED_STARTS:
            self._refusal = f"{message} (not tried again after {self._failed_starts} times)"
        return RewardError(message)

    def _drop(self) -> None:
        """End the worker at once, whatever it does."""
        if self._running is not None:
            self._at_exit.detach()
            running, self._running = self._running, None
            running.stop(now=True)
