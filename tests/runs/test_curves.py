"""Panels hold what was asked for; the picture's lines are the runs' values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_drive.errors import DataError
from rlhf_drive.runs.curves import COLORS, DEFAULT_METRICS, draw_curves, panels_of


def _run(seeds: int, steps: int, offset: float = 0.0) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = [
        {"phase": "sft", "step": step, "loss/heldout": 4.0 - step, "optim/grad_norm": 9.0} for step in (1, 2)
    ]
    for seed in range(seeds):
        lines += [
            {
                "phase": f"rl-seed{seed}", "step": step, "reward/total": offset + seed + step / 10,
                "optim/grad_norm": 1.0,
            }
            for step in range(1, steps + 1)
        ]  # fmt: skip
    return lines


def test_by_default_shared_metrics_are_drawn_for_rl_and_by_name_for_both() -> None:
    runs = {"one": _run(2, 3), "two": [line for line in _run(1, 3) if line["phase"] != "sft"]}
    known = [name for name in DEFAULT_METRICS if name in ("loss/heldout", "reward/total", "optim/grad_norm")]
    panels = panels_of(runs, known, named=False)
    assert [(panel.metric, panel.kind) for panel in panels] == [
        ("loss/heldout", "sft"), ("reward/total", "rl"), ("optim/grad_norm", "rl"),
    ]  # fmt: skip
    assert {run: list(phases) for run, phases in panels[1].runs.items()} == {
        "one": ["rl-seed0", "rl-seed1"], "two": ["rl-seed0"],
    }  # fmt: skip
    named = panels_of(runs, ["optim/grad_norm"], named=True)
    assert [(panel.metric, panel.kind) for panel in named] == [("optim/grad_norm", "sft"), ("optim/grad_norm", "rl")]
    with pytest.raises(DataError, match="none of the metrics"):
        panels_of(runs, ["kl/ref_k3"], named=False)


@pytest.mark.parametrize(("smooth", "first"), [(1, [0.6, 0.7, 0.8]), (2, [0.6, 0.65, 0.75]), (None, [0.6, 0.7, 0.8])])
def test_lines_are_seeds_thin_and_their_mean_thick(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smooth: int | None, first: list[float]
) -> None:
    from matplotlib.axes import Axes

    drawn: list[tuple[str, float, list[float]]] = []
    plot = Axes.plot

    def note(self: Any, steps: Any, values: Any, *rest: Any, **style: Any) -> Any:
        drawn.append((style["color"], style["lw"], np.asarray(values).tolist()))
        return plot(self, steps, values, *rest, **style)

    monkeypatch.setattr(Axes, "plot", note)
    runs = {"a$b": _run(2, 3), "two": _run(1, 3, 5.0)}
    draw_curves(list(runs), panels_of(runs, ["reward/total"], named=True), tmp_path / "x" / "a.png", smooth=smooth)
    thick = {color: values for color, width, values in drawn if width > 2}
    thin = [values for color, width, values in drawn if width < 2 and color == COLORS[0]]
    # Seeds 0 and 1 are step / 10 and 1 + step / 10: their mean is 0.5 + step / 10.
    assert thick[COLORS[0]] == pytest.approx(first)
    assert len(thin) == 2
    assert np.mean(thin, axis=0) == pytest.approx(first)
    assert thick[COLORS[1]] == pytest.approx([value + 4.5 for value in first])
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["a.png"]


def test_the_picture_grows_with_its_panels(tmp_path: Path) -> None:
    from matplotlib.image import imread

    runs = {"one": [{"phase": "rl-seed0", "step": 1, **{f"a/{i}": 1.0 for i in range(7)}}]}
    sizes = []
    for count in (1, 2, 7):
        panels = panels_of(runs, [f"a/{i}" for i in range(count)], named=True)
        draw_curves(["one"], panels, tmp_path / "a.png")
        height, width, _ = imread(tmp_path / "a.png").shape
        sizes.append((round((width / 110 - 0.4) / 4.6), round((height / 110 - 0.7) / 2.9)))
    assert sizes == [(1, 1), (2, 1), (3, 3)]


def test_a_picture_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    panels = panels_of({"one": _run(1, 2)}, ["reward/total"], named=True)
    with pytest.raises(DataError, match=r"cannot be written.*--out"):
        draw_curves(["one"], panels, tmp_path / "file" / "a.png")
