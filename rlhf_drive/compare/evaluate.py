"""Planners drive frozen scenes and are scored by the reward service, by several scorers if asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rewards.carriers import Scores
from rewards.monitors import plan_monitors
from rewards.plan_motion import human_plan
from rewards.two_frame import FrameScorer, score_frames
from rlhf_drive.compare.two_frame import TwoFramePlanner, plan_previous
from rlhf_drive.errors import DataError, UnknownNameError, did_you_mean
from rlhf_drive.scenes import NUM_POSES, Scene, Trajectories

__all__ = ["Evaluation", "FrameScorer", "Planner", "PlannerResult", "TwoFramePlanner", "evaluate"]

OnProgress = Callable[[str, int, int], None]


class Planner(Protocol):
    """Anything that plans: a policy with its decoding settings, or a baseline."""

    @property
    def name(self) -> str:
        """Name under which its results are reported; unique among the planners of an evaluation."""

    def plan(self, scenes: Sequence[Scene]) -> Trajectories:
        """``S * samples`` trajectories, scene-major, the same number for every scene.

        Must depend on each scene alone, not on which scenes share the call: evaluation runs in batches.
        """


@dataclass(frozen=True)
class PlannerResult:
    """One planner on S scenes; scores in 0..1, C components named by `Evaluation.components`."""

    scores: NDArray[np.float64]
    """``[S, C]`` components, each averaged over the samples that it could be computed for; NaN where there is none."""
    reward: NDArray[np.float64]
    """``[S]`` the recipe's total reward, averaged over the valid samples; NaN where there is none."""
    valid: NDArray[np.float64]
    """``[S]`` share of samples that could be scored."""
    plans: NDArray[np.float64]
    """``[S, T, 3]`` the first sample of each scene, t=0 ego frame."""
    plan_scores: NDArray[np.float64]
    """``[S, C]`` components of that first sample; NaN where it could not be scored."""
    samples: int
    """G: samples per scene."""
    failures: Mapping[str, str] = field(default_factory=dict)
    """Scene token to the reason of its first failed sample."""
    failure_kinds: Mapping[str, int] = field(default_factory=dict)
    """Number of failed samples by kind, such as `timeout`."""
    monitors: Mapping[str, float] = field(default_factory=dict)
    """:func:`rewards.monitors.plan_monitors` of all samples; shares in 0..1, ratios to the human."""


@dataclass(frozen=True)
class Evaluation:
    """Several planners on the same S scenes, scored by one scorer."""

    tokens: tuple[str, ...]
    """``[S]`` scene tokens."""
    kinds: tuple[str, ...]
    """``[S]`` situation kind of each scene."""
    clusters: tuple[str, ...]
    """``[S]`` cluster of each scene; scenes of one cluster are not independent."""
    challenging: NDArray[np.bool_]
    """``[S]`` constant velocity fails and the human does not."""
    human: NDArray[np.float64]
    """``[S, T, 3]`` what the human drove, t=0 ego frame; NaN where the scene does not hold it."""
    components: tuple[str, ...]
    """C component names: columns of `PlannerResult.scores`."""
    planners: Mapping[str, PlannerResult]
    """Result by planner name, in the order evaluated."""
    scorer: str
    """Name, version and settings of the scorer."""
    secondary: tuple[Evaluation, ...] = ()
    """The same plans scored by others, in the order given; numbers of different scorers are never mixed."""

    @property
    def headline(self) -> str:
        """The one number that stands for a plan: `pdms`, else `epdms`, else `reward`, the total itself."""
        return next((name for name in ("pdms", "epdms") if name in self.components), "reward")

    def result(self, name: str) -> PlannerResult:
        """Result of planner `name`.

        Raises:
            UnknownNameError: No such planner was evaluated.
        """
        if name not in self.planners:
            raise UnknownNameError(f"No planner {name!r} was evaluated. {did_you_mean(name, self.planners)}")
        return self.planners[name]

    def column(self, name: str, component: str | None = None) -> NDArray[np.float64]:
        """``[S]`` one component of one planner, 0..1; without a component the headline.

        Raises:
            UnknownNameError: No such planner or component.
        """
        component = self.headline if component is None else component
        if component == "reward" and component not in self.components:
            return self.result(name).reward
        if component not in self.components:
            raise UnknownNameError(f"Unknown component {component!r}. {did_you_mean(component, self.components)}")
        return np.asarray(self.result(name).scores[:, self.components.index(component)])

    def plan_column(self, name: str) -> NDArray[np.float64]:
        """``[S]`` the headline of the first sample in every scene, 0..1; where that is the total, its scene's mean."""
        if self.headline not in self.components:
            return self.column(name)
        return np.asarray(self.result(name).plan_scores[:, self.components.index(self.headline)])


def evaluate(
    planners: Sequence[Planner],
    scenes: Sequence[Scene],
    service: FrameScorer,
    *,
    extra: Sequence[FrameScorer] = (),
    two_frame: bool = False,
    on_progress: OnProgress | None = None,
    batch_size: int = 64,
) -> Evaluation:
    """Let every planner drive every scene once, and score the plans.

    Args:
        planners: With unique names; results keep their order.
        scenes: S frozen scenes, the same for all planners.
        service: Scores plans; failed rows come back invalid and are left out of a scene's mean.
        extra: Further scorers of the same plans; their results are in `Evaluation.secondary`.
        two_frame: Whether planners also plan for the frame 0.5 s earlier, which EC needs. One that cannot (it is no
            :class:`TwoFramePlanner`, or returns None) has no EC, and neither has a scene without such a frame.
        on_progress: Called as ``on_progress(planner_name, scenes_done, S)`` after every batch.
        batch_size: Scenes planned and scored at once.

    Raises:
        DataError: No scenes, repeated names or tokens, or a planner that does not return the same number of rows for
            every scene, or other rows for the previous frame than for this one.

    Example:
        ``evaluate(baseline_planners(["human", "stand_still"]), scenes, LocalRewardService(reward))``
    """
    _check_unique("planner name", [planner.name for planner in planners])
    _check_unique("scene token", [scene.token for scene in scenes])
    services = [service, *extra]
    results: list[dict[str, PlannerResult]] = [{} for _ in services]
    scored: list[Scores] = []
    for planner in planners:
        plans, parts = [], []
        for start in range(0, len(scenes), batch_size):
            batch = scenes[start : start + batch_size]
            trajectories = planner.plan(batch)
            _check_rows(planner.name, trajectories, len(batch))
            previous = plan_previous(planner.name, planner, batch, trajectories) if two_frame else None
            scored = [score_frames(scoring, batch, trajectories, previous) for scoring in services]
            parts.append([_scene_results(batch, trajectories, scores) for scores in scored])
            plans.append(trajectories.poses)
            if on_progress is not None:
                on_progress(planner.name, start + len(batch), len(scenes))
        joined = [_joined(planner.name, batches) for batches in zip(*parts, strict=True)]
        monitors = _monitors(scenes, np.concatenate(plans))
        for by_name, result in zip(results, joined, strict=True):
            by_name[planner.name] = replace(result, monitors=monitors)
    first, *others = [_evaluation(scenes, scores, named) for scores, named in zip(scored, results, strict=True)]
    return replace(first, secondary=tuple(others))


def _evaluation(scenes: Sequence[Scene], scores: Scores, planners: Mapping[str, PlannerResult]) -> Evaluation:
    """Results on S scenes; columns and scorer are those of any of the scores they come from."""
    unknown = np.full((NUM_POSES, 3), np.nan)
    humans = [human_plan(scene) for scene in scenes]
    return Evaluation(
        tokens=tuple(scene.token for scene in scenes),
        kinds=tuple(scene.kind for scene in scenes),
        clusters=tuple(scene.cluster for scene in scenes),
        challenging=np.array([scene.challenging for scene in scenes], dtype=np.bool_),
        human=np.array([unknown if human is None else human for human in humans]),
        components=scores.names,
        planners=planners,
        scorer=str(scores.scorer),
    )


def _monitors(scenes: Sequence[Scene], poses: NDArray[np.float64]) -> dict[str, float]:
    """Of all plans over all scenes; rows are scene-major."""
    return plan_monitors(scenes, Trajectories(poses, np.repeat(np.arange(len(scenes)), len(poses) // len(scenes))))


def _check_unique(what: str, names: Sequence[str]) -> None:
    if not names:
        raise DataError(f"An evaluation needs at least one {what}; got none.")
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise DataError(f"An evaluation needs unique {what}s; {name!r} occurs {count} times.")


def _check_rows(name: str, trajectories: Trajectories, s: int) -> None:
    """Refuse plans that are not the same number of 4-second plans for each of S scenes."""
    samples = len(trajectories) // s
    if samples == 0 or not np.array_equal(trajectories.scene_index, np.repeat(np.arange(s), samples)):
        raise DataError(f"Planner {name!r} must return the same number of rows for each of {s} scenes, scene-major.")
    if trajectories.poses.shape[1] != NUM_POSES:
        raise DataError(f"Planner {name!r} returned {trajectories.poses.shape[1]} poses per plan, not {NUM_POSES}.")


def _scene_results(scenes: Sequence[Scene], trajectories: Trajectories, scores: Scores) -> PlannerResult:
    """Rows of one batch averaged per scene."""
    s, samples = len(scenes), len(trajectories) // len(scenes)
    valid = scores.valid.reshape(s, samples)
    components = scores.components.reshape(s, samples, len(scores.names))
    failures: dict[str, str] = {}
    for row in sorted(scores.failures):
        failures.setdefault(scenes[row // samples].token, str(scores.failures[row]))
    return PlannerResult(
        scores=_finite_mean(components),
        reward=_finite_mean(np.where(valid, scores.total.reshape(s, samples), np.nan)),
        valid=valid.mean(axis=1),
        plans=trajectories.poses.reshape(s, samples, NUM_POSES, 3)[:, 0],
        plan_scores=components[:, 0],
        samples=samples,
        failures=failures,
        failure_kinds=Counter(failure.kind for failure in scores.failures.values()),
    )


def _finite_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over axis 1 of the finite entries; NaN where there is none."""
    finite = np.isfinite(values)
    count = finite.sum(axis=1)
    total = np.where(finite, values, 0.0).sum(axis=1)
    return np.asarray(np.where(count > 0, total / np.maximum(count, 1), np.nan))


def _joined(name: str, batches: Sequence[PlannerResult]) -> PlannerResult:
    counts = {batch.samples for batch in batches}
    if len(counts) != 1:
        raise DataError(f"Planner {name!r} returned {sorted(counts)} samples per scene in different batches.")
    failures = {token: reason for batch in batches for token, reason in batch.failures.items()}
    return PlannerResult(
        scores=np.concatenate([batch.scores for batch in batches]),
        reward=np.concatenate([batch.reward for batch in batches]),
        valid=np.concatenate([batch.valid for batch in batches]),
        plans=np.concatenate([batch.plans for batch in batches]),
        plan_scores=np.concatenate([batch.plan_scores for batch in batches]),
        samples=counts.pop(),
        failures=failures,
        failure_kinds=dict(sum((Counter(batch.failure_kinds) for batch in batches), Counter[str]())),
    )
