"""Warnings of a run: one JSON line each in `alerts.jsonl`, read again by the report."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

from rewards.hack_detector import ALERTS_FILE, Alert
from rlhf_drive.disk import LineFile, write_text, writing

__all__ = ["AlertLog"]


class AlertLog:
    """Appends alerts to a run folder; a line is ``{"phase": "rl-seed0", "step": 20, "name": …, "message": …}``."""

    def __init__(self, run_dir: str | Path) -> None:
        """Open the file of `run_dir`; that it is there and empty says that the run was watched and nothing seen."""
        self._path = Path(run_dir) / ALERTS_FILE
        with writing("Warnings", self._path):
            self._path.touch()

    def add(self, alert: Alert, *, phase: str) -> None:
        """Write one line.

        Raises:
            StorageError: It cannot be written; the file ends with the line before.
        """
        line = {"phase": phase, "step": alert.step, "name": alert.name, "message": alert.message}
        with writing(f"A warning of {phase} step {alert.step}", self._path), closing(LineFile(self._path)) as file:
            file.write(json.dumps(line))

    def resume(self, step: int, *, phase: str) -> None:
        """Drop the alerts of `phase` after `step`, and a line that a killed run left unfinished."""
        kept = []
        for line in self._path.read_text("utf-8").splitlines(keepends=True):
            entry = json.loads(line) if line.endswith("\n") else None
            if entry is not None and (entry["phase"] != phase or entry["step"] <= step):
                kept.append(line)
        with writing("Warnings", self._path):
            write_text(self._path, "".join(kept))
