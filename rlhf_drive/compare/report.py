"""What an evaluation leaves behind: `report.json`, one self-contained `report.html`, a summary and a terminal table."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_drive.compare.alerts import read_alerts
from rlhf_drive.compare.analysis import Bootstrap, Comparison, analyse, shown_components, without_ec
from rlhf_drive.compare.baselines import BASELINES
from rlhf_drive.compare.evaluate import Evaluation
from rlhf_drive.compare.markup import LABELS
from rlhf_drive.compare.page import Picture, render_page
from rlhf_drive.compare.statistics import TIE
from rlhf_drive.errors import DataError
from rlhf_drive.scenes import Scene
from rlhf_drive.scenes.picture import draw_scene, plan_colors

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["differing_scenes", "print_table", "summary", "write_report"]


def write_report(
    evaluation: Evaluation,
    run_dir: str | Path,
    *,
    scenes: Sequence[Scene],
    comparisons: Sequence[Comparison],
    policies: Sequence[str] | None = None,
    pictures: int = 8,
    bootstrap: Bootstrap | None = None,
    title: str = "Policy comparison",
) -> Path:
    """Write ``report.json`` and ``report.html`` into a run folder; alerts that training left there are shown.

    Args:
        evaluation: Planners on the same scenes.
        run_dir: Created if absent; files of an earlier report are replaced.
        scenes: The evaluated scenes, for the pictures; in the order of ``evaluation.tokens``.
        comparisons: Paired questions; the first is the headline, and its scenes are pictured.
        policies: Order of the planners in tables; default: as evaluated.
        pictures: How many scenes to draw at most.
        bootstrap: Interval settings.
        title: Heading of the page.

    Returns:
        Path of ``report.html``.

    Raises:
        UnknownNameError: A planner named here was not evaluated.
        DataError: `scenes` are not the evaluated ones, or the file of alerts cannot be read.

    Example:
        ``write_report(evaluation, run_dir, scenes=scenes, comparisons=[Comparison("gspo", ("gspo",), "sft")])``
    """
    if tuple(scene.token for scene in scenes) != evaluation.tokens:
        raise DataError("The scenes given to a report must be the evaluated ones, in the same order.")
    folder = Path(run_dir)
    table = analyse(evaluation, comparisons, bootstrap)
    order = list(policies) if policies is not None else list(evaluation.planners)
    for part in (table, *table["secondary"]):
        part["policies"] = {name: part["policies"][name] for name in order if evaluation.result(name)}
    table["alerts"] = read_alerts(folder)
    colors = plan_colors(order)
    drawn = _pictures(evaluation, scenes, comparisons[0], pictures, colors) if comparisons else []
    page = render_page(table, drawn, title=title, colors=colors, baselines=tuple(BASELINES))
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "report.json", json.dumps(_finite(table), indent=1, allow_nan=False) + "\n")
    _write(folder / "report.html", page)
    return folder / "report.html"


def _write(path: Path, text: str) -> None:
    """Replace a file as a whole, so that a reader never sees half of it."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _finite(value: Any) -> Any:
    """Plain data with every number that is not finite as None: JSON has no NaN."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def differing_scenes(evaluation: Evaluation, policy: str, reference: str, count: int) -> list[int]:
    """Indices of scenes whose drawn plans (first samples) differ most in the headline: largest gains, then losses.

    Half of `count` each, as far as there are; one scene per cluster before a cluster comes twice. Ties are left out.
    """
    delta = np.nan_to_num(evaluation.plan_column(policy) - evaluation.plan_column(reference), nan=0.0)

    def ranked(values: np.ndarray[Any, np.dtype[np.float64]]) -> list[int]:
        order = [int(i) for i in np.argsort(-values, kind="stable") if values[i] > TIE]
        first = {evaluation.clusters[i]: i for i in reversed(order)}
        return sorted(order, key=lambda i: first[evaluation.clusters[i]] != i)

    gains, losses = ranked(delta), ranked(-delta)
    wanted = max((count + 1) // 2, count - len(losses))
    gains = gains[:wanted]
    return gains + losses[: count - len(gains)]


def _pictures(
    evaluation: Evaluation, scenes: Sequence[Scene], comparison: Comparison, count: int, colors: Mapping[str, str]
) -> list[Picture]:
    policy, reference = comparison.policies[0], comparison.reference
    names = [name for name in (reference, policy, "human") if name in evaluation.planners]
    result = []
    for i in differing_scenes(evaluation, policy, reference, count):
        plans = {name: evaluation.result(name).plans[i] for name in (reference, policy)}
        scores = {
            name: dict(zip(evaluation.components, 100.0 * evaluation.result(name).plan_scores[i], strict=True))
            for name in names
        }
        png = draw_scene(scenes[i], plans, colors=colors, size_px=620)
        gain = 100.0 * float(evaluation.plan_column(policy)[i] - evaluation.plan_column(reference)[i])
        result.append(Picture(png, evaluation.tokens[i], evaluation.kinds[i], gain, scores))
    return result


def summary(
    evaluation: Evaluation,
    sft_name: str,
    rl_names: Sequence[str],
    minutes: float,
    *,
    bootstrap_samples: int = 10_000,
    seed: int = 0,
) -> dict[str, Any]:
    """The run in a few numbers, points of 100: what `summary.json` holds.

    Args:
        evaluation: Must hold all named planners.
        sft_name: The policy before RL.
        rl_names: RL training seeds of one policy; averaged per scene, and each listed under ``seeds``.
        minutes: Wall-clock time of the run.
        bootstrap_samples: Resamples of the 95 % intervals.
        seed: Of the resampling.

    Returns:
        With H the headline, ``pdms`` or ``epdms``: ``{"sft": {H}, "rl": {H}, "gain": {H, "ci95": [lo, hi]}, "minutes",
        …}`` and, beyond that, ``win_rate``, ``tie_rate``, ``seeds``, ``challenging`` (the same figures),
        ``components``, ``baselines``, ``valid``, ``scenes``, ``clusters``, ``scorer``. Where the plans were scored by
        others too, ``metrics``: for each headline h of theirs ``{policy: {"all", "challenging"}, "gain": {h, "ci95",
        "challenging": {h, "ci95"}}, "scorer"}`` and, if h has EC, ``"ec"`` with the same keys. A bound that one cluster
        alone cannot give is None.

    Raises:
        UnknownNameError: A planner was not evaluated.
        DataError: No RL policy is named.
    """
    comparison = Comparison("rl", tuple(rl_names), sft_name)
    table = analyse(evaluation, [comparison], Bootstrap(bootstrap_samples, 0.95, seed))
    policies, gains, headline = table["policies"], table["comparisons"][0], table["headline"]
    result = {
        **_figures(table, sft_name, rl_names, "all"),
        "minutes": round(minutes, 2),
        "seeds": [
            {
                "name": single["name"],
                headline: policies[single["name"]]["all"][headline]["mean"],
                "gain": _gain(single["all"], headline),
                "challenging": {
                    headline: policies[single["name"]]["challenging"][headline]["mean"],
                    "gain": _gain(single["challenging"], headline),
                },
            }
            for single in gains["seeds"]
        ],
        "challenging": {**_figures(table, sft_name, rl_names, "challenging"), "scenes": table["challenging"]},
        "components": {
            name: {component: policy["all"][component]["mean"] for component in table["components"]}
            for name, policy in policies.items()
        },
        "baselines": {
            name: {subset: policy[subset][headline]["mean"] for subset in ("all", "challenging")}
            for name, policy in policies.items()
            if name in BASELINES
        },
        "valid": {name: policy["valid"] for name, policy in policies.items()},
        "scenes": table["scenes"],
        "clusters": table["clusters"],
        "scorer": table["scorer"],
    }
    if table["secondary"]:
        result["metrics"] = metrics = {}
        for other in table["secondary"]:
            metrics[other["scorer"] if other["headline"] in metrics else other["headline"]] = _metric(other)
    return dict(_finite(_rounded(result)))


def _figures(table: Mapping[str, Any], sft: str, rl: Sequence[str], subset: str) -> dict[str, Any]:
    policies, gains, headline = table["policies"], table["comparisons"][0][subset], table["headline"]
    return {
        "sft": {headline: policies[sft][subset][headline]["mean"]},
        "rl": {headline: sum(policies[name][subset][headline]["mean"] for name in rl) / len(rl)},
        "gain": _gain(gains, headline),
        "win_rate": gains[headline]["win_rate"],
        "tie_rate": gains[headline]["tie_rate"],
    }


def _metric(table: Mapping[str, Any]) -> dict[str, Any]:
    """A further score of the same plans: per policy, and the paired gain; EC beside it."""
    headline = table["headline"]
    result = {**_one_column(table, headline), "scorer": table["scorer"]}
    return result | ({"ec": _one_column(table, "ec")} if "ec" in table["components"] else {})


def _one_column(table: Mapping[str, Any], component: str) -> dict[str, Any]:
    subsets, gains = ("all", "challenging"), table["comparisons"][0]
    means = {
        name: {subset: policy[subset][component]["mean"] for subset in subsets}
        for name, policy in table["policies"].items()
    }
    gain = {**_gain(gains["all"], component), "challenging": _gain(gains["challenging"], component)}
    return {**means, "gain": gain}


def _gain(differences: Mapping[str, Any], component: str) -> dict[str, Any]:
    difference = differences[component]
    return {component: difference["mean"], "ci95": [difference["low"], difference["high"]]}


def _rounded(value: Any) -> Any:
    """Plain data with floats to 4 decimals."""
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value


def print_table(evaluation: Evaluation, *, title: str = "Held-out scenes, points of 100") -> Table:
    """Terminal table: every component by planner, the headline on challenging scenes, share of plans scored.

    Of further scorers the headline and EC follow.

    Returns:
        A rich table; ``rich.console.Console().print(print_table(evaluation))`` shows it.
    """
    from rich.markup import escape
    from rich.table import Table

    main, headline = [(evaluation, name) for name in shown_components(evaluation)], _label(evaluation.headline)
    others = [
        (other, name) for other in evaluation.secondary for name in (other.headline, "ec") if name in other.components
    ]
    # Numbers are never cut; where the terminal is narrow, names wrap.
    table = Table(title=escape(title), title_justify="left", box=None, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("policy", overflow="fold", min_width=8)
    for text in (*(_label(name) for _, name in main), f"{headline} hard", "scored", *(_label(n) for _, n in others)):
        table.add_column(escape(text), justify="right", min_width=6 if text == "scored" else 5)
    for name, result in evaluation.planners.items():
        cells = [_mean_text(part.column(name, component)) for part, component in main]
        cells += [_mean_text(evaluation.column(name)[evaluation.challenging]), f"{result.valid.mean():.1%}"]
        cells += [_mean_text(part.column(name, component)) for part, component in others]
        table.add_row(escape(name), *cells)
    table.caption, table.caption_justify = escape("\n".join(_caption(evaluation, headline))), "left"
    return table


def _caption(evaluation: Evaluation, headline: str) -> list[str]:
    lines = [f"{headline} hard: challenging scenes, where constant velocity fails"]
    for part in (evaluation, *evaluation.secondary):
        lines.append(f"{_label(part.headline)} by {part.scorer}")
        if names := without_ec(part):
            lines.append(f"without EC, so not to be compared with the others: {', '.join(names)}")
    return lines


def _label(component: str) -> str:
    return LABELS.get(component, (component, ""))[0]


def _mean_text(values: np.ndarray[Any, np.dtype[np.float64]]) -> str:
    known = values[np.isfinite(values)]
    return f"{100 * known.mean():.1f}" if len(known) else "–"
