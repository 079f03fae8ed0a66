"""Fixtures shared by the whole suite."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


def _folder(variable: str, default: Path) -> Path:
    folder = Path(os.environ.get(variable, default))
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent; set {variable} to the folder that holds this data")
    return folder


@pytest.fixture(scope="session")
def navsim_golden() -> Path:
    """Folder with the scorer's golden vectors (`golden/`, `golden_pdm_closed/`)."""
    return _folder("RLHF_DRIVE_NAVSIM_VECTORS", SHARED / "navsim")


@pytest.fixture(scope="session")
def recorded_scenes() -> Path:
    """Folder of recorded driving scenarios."""
    return _folder("RLHF_DRIVE_RECORDED_SCENES", SHARED / "scenes")
