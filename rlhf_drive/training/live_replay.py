"""The live table fed from a run's metrics file, for somebody who did not start the run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import TracebackType
from typing import Any, TextIO

from rlhf_drive.runs.folders import Run
from rlhf_drive.runs.follow import Followed
from rlhf_drive.runs.series import kind_of
from rlhf_drive.training.live import RL_COLUMNS, SFT_COLUMNS, LiveTable

__all__ = ["Replay"]


class Replay:
    """A table per phase, as the run itself shows it; a context manager.

    Args:
        run: Whose lines are shown; its recipe says how many steps there will be.
        before: The line before the first that is shown, so that counts are known to have risen.
        stream: Where to write; standard output if not given.
    """

    def __init__(self, run: Run, before: Mapping[str, Any] | None = None, stream: TextIO | None = None) -> None:
        self._run, self._stream, self._last = run, stream, dict(before or {})
        self._table: LiveTable | None = None
        self._phase = ""
        self._seconds = 0.0

    def __enter__(self) -> Replay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def show(self, found: Followed) -> None:
        """The next line; after a resume or in another phase in a table of its own."""
        line = found.line
        phase, step = line["phase"], line["step"]
        if phase != self._phase or found.resumed:
            self._open(phase, line)
            if found.resumed:
                assert self._table is not None
                self._table.note(f"the run was resumed; what was shown of {phase} from step {step} on is void")
        assert self._table is not None
        self._seconds += self._took(line)
        metrics = {name: math.nan if value is None else value for name, value in line.items()}
        self._table.update(step, {name: value for name, value in metrics.items() if "/" in name})
        self._last = line

    def _open(self, phase: str, line: Mapping[str, Any]) -> None:
        self._close()
        columns = SFT_COLUMNS if phase == "sft" else RL_COLUMNS
        self._phase = phase
        self._table = LiveTable(
            phase, self._total(phase, line), columns, stream=self._stream, clock=lambda: self._seconds
        )
        self._table.__enter__()
        if self._last.get("phase") == phase:
            self._table.resume(self._last)

    def _close(self) -> None:
        if self._table is not None:
            self._table.__exit__(None, None, None)
        self._table = None

    def _total(self, phase: str, line: Mapping[str, Any]) -> int | None:
        """Last step of a phase; of SFT it is known once a line says which epoch its step ends."""
        if kind_of(phase) == "rl":
            return _whole(self._run.setting("rl.max_steps"))
        epochs, epoch = _whole(self._run.setting("sft.max_epochs")), line.get("sft/epoch")
        return round(line["step"] / epoch * epochs) if phase == "sft" and epoch and epochs else None

    def _took(self, line: Mapping[str, Any]) -> float:
        """Seconds of a step, as far as its line tells."""
        if line.get("time/step_s") is not None:
            return float(line["time/step_s"])
        rate, size = line.get("time/scenes_per_s"), _whole(self._run.setting("sft.batch_size"))
        return size / float(rate) if rate and size else 0.0


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) else None
