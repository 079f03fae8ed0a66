"""Where a training phase writes what it measures: the metrics file and the live table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from rewards.hack_detector import Alert
from rlhf_drive.training.alerts import AlertLog
from rlhf_drive.training.live import LiveTable
from rlhf_drive.training.metrics import MetricsWriter

__all__ = ["Journal", "RunJournal", "SilentJournal"]


class Journal(Protocol):
    """Takes the metrics of one phase, step by step."""

    def resume(self, step: int) -> None:
        """The phase goes on after `step`; what was written beyond it is void."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of `step`, counted from 1."""

    def warn(self, alert: Alert) -> None:
        """Something that looks like reward hacking."""

    def note(self, text: str) -> None:
        """Something else that the person who watches should know."""


@dataclass(frozen=True)
class RunJournal:
    """Journal of a run folder: `metrics.jsonl`, what else the recipe logs to, and the live table."""

    writer: MetricsWriter
    """Files."""
    table: LiveTable
    """Terminal."""
    phase: str
    """Name of the phase in the files."""
    alerts: AlertLog | None = None
    """Warnings; None for a phase that is not watched."""

    def resume(self, step: int) -> None:
        """Drop lines and alerts after `step`."""
        self.table.resume(self.writer.resume(step, phase=self.phase))
        if self.alerts is not None:
            self.alerts.resume(step, phase=self.phase)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write and show."""
        self.writer.log(step, metrics, phase=self.phase)
        self.table.update(step, metrics)

    def warn(self, alert: Alert) -> None:
        """Write and print."""
        if self.alerts is not None:
            self.alerts.add(alert, phase=self.phase)
        self.table.note(f"warning, {self.phase} step {alert.step}: {alert.message}")

    def note(self, text: str) -> None:
        """Print."""
        self.table.note(f"{self.phase}: {text}")


class SilentJournal:
    """Journal of a process that is not the main one."""

    def resume(self, step: int) -> None:
        """Nothing is written here."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Nothing is written here."""

    def warn(self, alert: Alert) -> None:
        """Nothing is written here."""

    def note(self, text: str) -> None:
        """Nothing is written here."""
