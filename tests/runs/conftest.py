"""Run folders written by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from rlhf_drive.config import dump_recipe, load_recipe

Line = Mapping[str, Any]
MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """``make_run(name, lines, done=…, checkpoints={stage: steps}, overrides=…)``: a folder of the recipe quickstart."""

    def make(
        name: str = "quickstart",
        lines: Sequence[Line] | None = None,
        *,
        done: Sequence[str] = (),
        checkpoints: Mapping[str, Sequence[int]] | None = None,
        overrides: Sequence[str] = ("rl.seeds=[0]", "rl.max_steps=9"),
    ) -> Path:
        path = tmp_path / "runs" / name
        path.mkdir(parents=True)
        (path / "recipe.yaml").write_text(dump_recipe(load_recipe("quickstart", overrides)))
        stages = {"id": "0123456789abcdef", "seconds": 5.0, "done": {stage: {} for stage in done}}
        (path / "stages.json").write_text(json.dumps(stages))
        if lines is not None:
            (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        for stage, steps in (checkpoints or {}).items():
            for step in steps:
                (path / stage / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
        return path

    return make


def rl(step: int, seed: int = 0, **metrics: float | None) -> dict[str, Any]:
    """A line of an RL phase; ``reward_total=…`` stands for ``reward/total``."""
    named = {name.replace("_", "/", 1): value for name, value in metrics.items()}
    return {"phase": f"rl-seed{seed}", "step": step, **named}


@pytest.fixture
def line() -> Callable[..., dict[str, Any]]:
    """:func:`rl`."""
    return rl
