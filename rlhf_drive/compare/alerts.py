"""The alerts that training wrote into its run folder, one JSON object a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rewards.hack_detector import ALERTS_FILE
from rlhf_drive.errors import DataError

__all__ = ["read_alerts"]


def read_alerts(run_dir: str | Path) -> list[dict[str, Any]] | None:
    """Alerts in the order written; None where there is no such file, so that nothing was watched.

    A last line without its end, which a run that was stopped may leave, is left out.

    Raises:
        DataError: A line is no JSON object with the four keys; the message names file and line.
    """
    path = Path(run_dir) / ALERTS_FILE
    if not path.exists():
        return None
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [_alert(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def _alert(line: str, where: str) -> dict[str, Any]:
    try:
        alert = json.loads(line)
        return {
            "phase": str(alert["phase"]),
            "step": int(alert["step"]),
            "name": str(alert["name"]),
            "message": str(alert["message"]),
        }
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{where} is no alert: {error!r}. It must be a JSON object with phase, step, name and message; mend it."
        ) from error
