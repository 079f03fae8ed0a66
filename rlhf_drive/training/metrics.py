"""Metrics of a run: one JSON line per step in `metrics.jsonl`, and TensorBoard logs beside it.

A line is flat: ``{"phase": "rl", "step": 3, "reward/pdms": 0.71, …}``. Floats are written with all their digits, so two
runs are equal exactly when their lines are; a value that is not finite is written as null.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from rlhf_drive.errors import DataError

__all__ = ["METRICS_FILE", "MetricsWriter", "read_metrics"]

METRICS_FILE = "metrics.jsonl"
"""Name of the file in the run folder."""


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

    def __init__(self, run_dir: str | Path, tensorboard: bool) -> None:
        """Open the files of `run_dir`, which is made if need be; lines already there are kept."""
        self._folder = Path(run_dir)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._path = self._folder / METRICS_FILE
        self._tensorboard = tensorboard
        self._boards: dict[str, Any] = {}
        self._purge: dict[str, int] = {}
        _rewrite(self._path, _complete_lines(self._path))
        self._file: IO[str] = self._path.open("a", encoding="utf-8")

    def log(self, step: int, metrics: Mapping[str, float], *, phase: str = "rl") -> None:
        """Write one line, flushed, and the same numbers to TensorBoard.

        Args:
            step: Step of the phase, as :meth:`resume` understands it.
            metrics: Numbers by name ``area/name``.
            phase: `sft`, `rl`, … ; steps count within it.

        Raises:
            DataError: A name lacks its area, so it could collide with `phase` and `step`.
        """
        for name in metrics:
            if "/" not in name:
                raise DataError(f"Metric {name!r} of phase {phase!r} must be named area/name, such as 'reward/{name}'.")
        values = {name: float(value) for name, value in metrics.items()}
        line = {"phase": phase, "step": step} | {k: v if math.isfinite(v) else None for k, v in values.items()}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        if self._tensorboard:
            board = self._board(phase)
            for name, value in values.items():
                board.add_scalar(name, value, step)

    def resume(self, step: int, *, phase: str = "rl") -> None:
        """Drop the lines of `phase` after `step`, which a killed run wrote after its last checkpoint.

        Lines of other phases are kept. TensorBoard hides what it had beyond `step`.
        """
        self._file.close()
        kept = [line for line in _complete_lines(self._path) if not _is_after(json.loads(line), phase, step)]
        _rewrite(self._path, kept)
        self._file = self._path.open("a", encoding="utf-8")
        if phase in self._boards:
            self._boards.pop(phase).close()
        self._purge[phase] = step + 1

    def close(self) -> None:
        """Flush and close all files."""
        self._file.close()
        for board in self._boards.values():
            board.close()
        self._boards.clear()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _board(self, phase: str) -> Any:
        """TensorBoard writer of a phase, opened at its first line."""
        if phase not in self._boards:
            from torch.utils.tensorboard import SummaryWriter

            folder = self._folder / "tensorboard" / phase
            self._boards[phase] = SummaryWriter(str(folder), purge_step=self._purge.get(phase))
        return self._boards[phase]


def read_metrics(run_dir: str | Path, *, phase: str | None = None) -> list[dict[str, Any]]:
    """Lines of a run in the order they were written; those of one phase, or all.

    Raises:
        DataError: The run folder has no metrics.
    """
    path = Path(run_dir) / METRICS_FILE
    if not path.is_file():
        raise DataError(f"{path} does not exist, so {run_dir} is not the folder of a run that logged. Check the path.")
    lines = [json.loads(line) for line in _complete_lines(path)]
    return [line for line in lines if phase is None or line["phase"] == phase]


def _is_after(line: Mapping[str, Any], phase: str, step: int) -> bool:
    return bool(line["phase"] == phase and line["step"] > step)


def _complete_lines(path: Path) -> list[str]:
    """Whole lines of the file; a last one without its end, cut off by a kill, is left out."""
    if not path.exists():
        return []
    return [line for line in path.read_text("utf-8").splitlines(keepends=True) if line.endswith("\n")]


def _rewrite(path: Path, lines: list[str]) -> None:
    """Replace the file in one step, so that a kill leaves the old or the new one."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
