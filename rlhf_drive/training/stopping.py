"""Signals that ask a run to stop: it ends after the step in progress, with a checkpoint."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from rlhf_drive.errors import RunStoppedError
from rlhf_drive.training.ranks import Ranks

__all__ = ["StopSignals", "stopped_at_once", "stopped_by"]

ASKING = ("SIGTERM", "SIGINT", "SIGUSR1")
"""Slurm sends SIGUSR1 before a job's time ends if the job says so (`--signal`), and SIGTERM when it has ended."""
SAME_S = 1.0
"""Signals within so many seconds are one: a launcher passes on what the terminal has sent to its processes already."""


class StopSignals:
    """Turns the first SIGTERM, SIGINT or SIGUSR1 into a request that a loop checks between two steps.

    Another SIGTERM or SIGINT, more than a second after the first one, stops at once: ``KeyboardInterrupt`` or
    ``SystemExit``, so that services are still closed. After that the signals do what they did before this block. A
    SIGUSR1 never counts as the second.

    Signals reach Python between two of its instructions: a process that hangs inside a library call hears none, and
    must be killed; its newest checkpoint is whole all the same.

    Example::

        with StopSignals(ranks) as signals:
            for step in range(first, last):
                …
                name = signals.requested            # collective: the same answer on all processes
                if name or step + 1 == last:
                    checkpoints.save(step + 1, engine, values, tensors)
                if name:
                    raise stopped_by(name, phase, step + 1, checkpoints.resume_command)
    """

    def __init__(self, ranks: Ranks | None = None) -> None:
        self.ranks = ranks or Ranks()
        self.seen: str | None = None
        """Name of the first signal that this process got."""
        self._first_at = 0.0
        self._insistent = False
        self._answered = False
        self._before: dict[int, Any] = {}

    @property
    def requested(self) -> str | None:
        """Name of the signal that any process got, or None: the same answer on all processes, which must all ask."""
        name = next((name for name in self.ranks.gather(self.seen) if name), None)
        self._answered = self._answered or name is not None
        return name

    def __enter__(self) -> StopSignals:
        # Python lets the main thread alone install handlers; elsewhere signals keep doing what they did.
        if threading.current_thread() is threading.main_thread():
            for name in ASKING:
                number = signal.Signals[name]
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
        if self.seen and not self._answered and kind is None:
            # It came after the loop had asked for the last time: nobody heard it, so it does what it would have done.
            signal.raise_signal(signal.Signals[self.seen])

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if self.seen is None:
            self.seen = name
            if self.ranks.main:
                # print() may be what was interrupted, and may not be entered twice.
                os.write(2, f"\n{name}: stopping after this step, with a checkpoint; again stops at once\n".encode())
        if name == "SIGUSR1":
            return
        if not self._insistent:
            self._insistent, self._first_at = True, now
        elif now - self._first_at > SAME_S:
            self._restore()
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


def stopped_by(name: str, phase: str, step: int, command: str | None) -> RunStoppedError:
    """The error that a loop ends with when a signal asked for it and the step's checkpoint is written.

    Args:
        name: Of the signal, such as ``"SIGTERM"``.
        phase: Such as ``"rl-seed0"``.
        step: Steps done, as in the checkpoint's name.
        command: What goes on with the run; None outside a run folder.
    """
    advice = f" Go on with: {command}" if command else ""
    return RunStoppedError(
        f"Stopped by {name} after step {step} of {phase}; its checkpoint is written.{advice}",
        exit_code=128 + signal.Signals[name],
    )


@contextmanager
def stopped_at_once(command: str) -> Iterator[None]:
    """Where no loop looks for signals: SIGTERM ends the block as Ctrl-C does, so that what was begun is tidied away.

    Within :class:`StopSignals` it is what the second signal comes to.

    Args:
        command: What goes on with the run.

    Raises:
        RunStoppedError: Ctrl-C or SIGTERM ended the block.
    """
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _end) if main else None
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, SystemExit) and end.code not in (128 + signal.SIGTERM, int(signal.SIGTERM)):
            raise
        number = signal.SIGTERM if isinstance(end, SystemExit) else signal.SIGINT
        raise RunStoppedError(
            f"Stopped at once by {number.name}: what was under way is lost, finished stages and checkpoints are kept. "
            f"Go on with: {command}",
            exit_code=128 + number,
        ) from None
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
