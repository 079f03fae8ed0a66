"""An evaluation as tables: per policy, per comparison, per situation kind. Scores in points of 100, shares in 0..1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rewards.plan_motion import reversing
from rlhf_drive.compare.evaluate import Evaluation
from rlhf_drive.compare.statistics import Difference, mean_interval, pooled_difference
from rlhf_drive.errors import DataError
from rlhf_drive.scenes import NUM_POSES, POSE_DT_S

__all__ = ["Bootstrap", "Comparison", "analyse", "plan_statistics", "shown_components", "without_ec"]

Array = NDArray[np.float64]
Table = dict[str, Any]

_ORDER = {
    "pdms": ("pdms", "nc", "dac", "ep", "ttc", "c", "ddc"),
    "epdms": ("epdms", "nc", "dac", "ddc", "tlc", "ep", "ttc", "lk", "hc", "ec"),
    "reward": ("reward",),
}
"""Columns of a scorer's tables, by headline."""


@dataclass(frozen=True)
class Comparison:
    """A question for the report: how much better is a policy than its reference?

    Example: ``Comparison("gspo", ("gspo/seed0", "gspo/seed1"), "sft")``.
    """

    name: str
    """Heading of the comparison."""
    policies: tuple[str, ...]
    """Planner names: one policy, or its training seeds, which are averaged per scene before pairing."""
    reference: str
    """Planner name it is compared with."""

    def __post_init__(self) -> None:
        if not self.policies:
            raise DataError(f"Comparison {self.name!r} names no policy to compare with {self.reference!r}.")


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are drawn."""

    samples: int = 10_000
    """Resamples."""
    confidence: float = 0.95
    """Coverage aimed at."""
    seed: int = 0
    """Of the resampling."""


def shown_components(evaluation: Evaluation) -> list[str]:
    """Columns of the tables: the headline first, its parts, then a user's terms; `reward` last where it differs."""
    order = _ORDER[evaluation.headline]
    names = [name for name in order if name in evaluation.components or name == evaluation.headline]
    names += [name for name in evaluation.components if name not in order]
    same = all(np.allclose(r.reward, evaluation.column(n), equal_nan=True) for n, r in evaluation.planners.items())
    return names if same or "reward" in names else [*names, "reward"]


def without_ec(evaluation: Evaluation) -> list[str]:
    """Planners without plans of the previous frame, where others have them: their EPDMS leaves EC and its weight out,
    so that it is another number than the others'."""
    if "ec" not in evaluation.components:
        return []
    known = {name: bool(np.isfinite(evaluation.column(name, "ec")).any()) for name in evaluation.planners}
    return [name for name, has_ec in known.items() if not has_ec and any(known.values())]


def _points(evaluation: Evaluation, name: str, component: str) -> Array:
    """``[S]`` one column in points of 100."""
    return 100.0 * evaluation.column(name, component)


def _mean(values: Array) -> float:
    """Mean of the finite values; NaN where there is none."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")


def plan_statistics(plans: Array, human: Array) -> dict[str, float]:
    """What plans look like, apart from their scores.

    Args:
        plans: ``[S, T, 3]`` poses in the t=0 ego frame.
        human: ``[S, T, 3]`` the human's; NaN where it is not known.

    Returns:
        ``final_reversal`` share whose last step reverses (:func:`rewards.plan_motion.reversing`), ``mean_speed_mps``
        path length per time, ``ade_m`` and ``fde_m`` mean and final distance to the human where it is known. Plans
        that are not finite are left out.
    """
    known = np.isfinite(plans).all(axis=(1, 2))
    if not known.any():
        return dict.fromkeys(("final_reversal", "mean_speed_mps", "ade_m", "fde_m"), float("nan"))
    plans, human = plans[known], human[known]
    steps = np.diff(np.concatenate([np.zeros((len(plans), 1, 2)), plans[:, :, :2]], axis=1), axis=1)
    error = np.hypot(*np.moveaxis(plans[:, :, :2] - human[:, :, :2], -1, 0))
    return {
        "final_reversal": float(reversing(plans).mean()),
        "mean_speed_mps": float(np.hypot(steps[..., 0], steps[..., 1]).sum(axis=1).mean() / (NUM_POSES * POSE_DT_S)),
        "ade_m": _mean(error.mean(axis=1)),
        "fde_m": _mean(error[:, -1]),
    }


def _policy_table(evaluation: Evaluation, name: str, subsets: Mapping[str, NDArray[np.bool_]], how: Bootstrap) -> Table:
    result = evaluation.result(name)
    clusters = np.array(evaluation.clusters)
    table: Table = {
        "samples": result.samples,
        "valid": float(result.valid.mean()),
        "failures": dict(result.failures),
        "failure_kinds": dict(result.failure_kinds),
        "monitors": dict(result.monitors),
    }
    for subset, mask in subsets.items():
        table[subset] = {
            component: asdict(
                mean_interval(_points(evaluation, name, component)[mask], clusters[mask].tolist(), **asdict(how))
            )
            for component in shown_components(evaluation)
        }
    points, kinds = _points(evaluation, name, evaluation.headline), np.array(evaluation.kinds)
    table["kinds"] = {kind: _mean(points[kinds == kind]) for kind in _kinds(evaluation)}
    table["plan"] = plan_statistics(result.plans, evaluation.human)
    return table


def _kinds(evaluation: Evaluation) -> list[str]:
    return sorted(set(evaluation.kinds))


def _comparison_table(
    evaluation: Evaluation, comparison: Comparison, subsets: Mapping[str, NDArray[np.bool_]], how: Bootstrap
) -> Table:
    clusters, kinds, headline = np.array(evaluation.clusters), np.array(evaluation.kinds), evaluation.headline

    def differences(component: str, mask: NDArray[np.bool_]) -> tuple[Difference, tuple[Difference, ...]]:
        runs = np.stack([_points(evaluation, name, component)[mask] for name in comparison.policies])
        reference = _points(evaluation, comparison.reference, component)[mask]
        result = pooled_difference(runs, reference, clusters[mask].tolist(), **asdict(how))
        return result.pooled, result.seeds

    table: Table = {"name": comparison.name, "policies": list(comparison.policies), "reference": comparison.reference}
    seeds: list[Table] = [{"name": name} for name in comparison.policies]
    for subset, mask in subsets.items():
        table[subset] = {}
        for component in shown_components(evaluation):
            pooled, single = differences(component, mask)
            table[subset][component] = asdict(pooled)
            for seed, difference in zip(seeds, single, strict=True):
                seed.setdefault(subset, {})[component] = asdict(difference)
    table["seeds"] = seeds
    table["kinds"] = {kind: asdict(differences(headline, kinds == kind)[0]) for kind in _kinds(evaluation)}
    return table


def analyse(evaluation: Evaluation, comparisons: Sequence[Comparison], how: Bootstrap | None = None) -> Table:
    """All numbers of a report as plain data; `report.json` is this with NaN written as null.

    Args:
        evaluation: Planners on the same scenes.
        comparisons: The paired questions to answer.
        how: Bootstrap settings.

    Raises:
        UnknownNameError: A comparison names a planner that was not evaluated.
    """
    how, headline = how or Bootstrap(), evaluation.headline
    subsets = {"all": np.ones(len(evaluation.tokens), dtype=np.bool_), "challenging": evaluation.challenging}
    kinds = np.array(evaluation.kinds)
    return {
        "format": 2,
        "units": "scores in points of 100, differences likewise; rates and shares in 0..1; metres, seconds",
        "scorer": evaluation.scorer,
        "headline": headline,
        "without_ec": without_ec(evaluation),
        "scenes": len(evaluation.tokens),
        "clusters": len(set(evaluation.clusters)),
        "challenging": int(evaluation.challenging.sum()),
        "kinds": {kind: int((kinds == kind).sum()) for kind in _kinds(evaluation)},
        "bootstrap": asdict(how),
        "components": shown_components(evaluation),
        "policies": {name: _policy_table(evaluation, name, subsets, how) for name in evaluation.planners},
        "comparisons": [_comparison_table(evaluation, comparison, subsets, how) for comparison in comparisons],
        "per_scene": {
            "token": list(evaluation.tokens),
            "kind": list(evaluation.kinds),
            "cluster": list(evaluation.clusters),
            "challenging": evaluation.challenging.tolist(),
            headline: {name: _points(evaluation, name, headline).tolist() for name in evaluation.planners},
        },
        "secondary": [analyse(other, comparisons, how) for other in evaluation.secondary],
    }
