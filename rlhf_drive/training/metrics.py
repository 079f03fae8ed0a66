"""Metrics of a run: one JSON line per step in `metrics.jsonl`, and whatever else the recipe logs to beside it.

A line is flat: ``{"phase": "rl", "step": 3, "reward/pdms": 0.71, …}``. Floats are written with all their digits, so two
runs are equal exactly when their lines are; a value that is not finite is written as null.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rlhf_drive.disk import LineFile, write_text, writing
from rlhf_drive.errors import DataError
from rlhf_drive.runs.lines import METRICS_FILE, complete_lines, read_metrics
from rlhf_drive.training.trackers import TensorBoard, Tracker, Trackers

__all__ = ["METRICS_FILE", "MetricsWriter", "read_metrics"]


class MetricsWriter:
    """Appends metrics to a run folder; use it as a context manager or call :meth:`close`.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> with MetricsWriter(folder, tensorboard=False) as writer:
        ...     writer.log(1, {"ratio/mean": 1.0}, phase="rl")
        >>> read_metrics(folder)
        [{'phase': 'rl', 'step': 1, 'ratio/mean': 1.0}]
    """

    def __init__(
        self,
        run_dir: str | Path,
        tensorboard: bool,
        trackers: Sequence[Tracker] = (),
        *,
        say: Callable[[str], None] = print,
    ) -> None:
        """Open the files of `run_dir`, which is made if need be; lines already there are kept.

        Args:
            run_dir: Run folder.
            tensorboard: Whether TensorBoard logs are written too.
            trackers: What else gets the metrics; one that fails is switched off, and the run goes on.
            say: Takes the warning that a tracker failed.

        Raises:
            StorageError: The folder cannot be written to.
        """
        self._folder = Path(run_dir)
        self._path = self._folder / METRICS_FILE
        with writing("Metrics", self._path):
            self._folder.mkdir(parents=True, exist_ok=True)
        boards: list[Tracker] = [TensorBoard(self._folder)] if tensorboard else []
        self._trackers = Trackers([*boards, *trackers], say)
        self._file = self._rewritten(complete_lines(self._path))

    def log(self, step: int, metrics: Mapping[str, float], *, phase: str = "rl") -> None:
        """Write one line, flushed, and give the same numbers to the trackers.

        From the step after one failed, ``logging/trackers_off`` says how many did.

        Args:
            step: Step of the phase, as :meth:`resume` understands it.
            metrics: Numbers by name ``area/name``.
            phase: `sft`, `rl`, … ; steps count within it.

        Raises:
            DataError: A name lacks its area, so it could collide with `phase` and `step`.
            StorageError: The line cannot be written; the file ends with the line before.
        """
        for name in metrics:
            if "/" not in name:
                raise DataError(f"Metric {name!r} of phase {phase!r} must be named area/name, such as 'reward/{name}'.")
        values = {name: float(value) for name, value in metrics.items()}
        if self._trackers.switched_off:
            values["logging/trackers_off"] = float(self._trackers.switched_off)
        line = {"phase": phase, "step": step} | {k: v if math.isfinite(v) else None for k, v in values.items()}
        with writing(f"Metrics of {phase} step {step}", self._path):
            self._file.write(json.dumps(line, allow_nan=False))
        self._trackers.log(step, values, phase)

    def resume(self, step: int, *, phase: str = "rl") -> dict[str, Any]:
        """Drop the lines of `phase` after `step`, which a killed run wrote after its last checkpoint.

        Lines of other phases are kept. TensorBoard hides what it had beyond `step`.

        Returns:
            The last line of `phase` that is left; empty if there is none.
        """
        self._file.close()
        last: dict[str, Any] = {}
        kept = []
        for text in complete_lines(self._path):
            line = json.loads(text)
            if not _is_after(line, phase, step):
                kept.append(text)
                last = line if line["phase"] == phase else last
        self._file = self._rewritten(kept)
        self._trackers.resume(step, phase)
        return last

    def _rewritten(self, lines: Sequence[str]) -> LineFile:
        """The file with these lines and no others, open at its end; a kill leaves the old or the new one."""
        with writing("Metrics", self._path):
            write_text(self._path, "".join(lines))
            return LineFile(self._path)

    def close(self) -> None:
        """Flush and close all files."""
        self._file.close()
        self._trackers.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _is_after(line: Mapping[str, Any], phase: str, step: int) -> bool:
    return bool(line["phase"] == phase and line["step"] > step)
