from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from rewards.carriers import Failure, ScorerInfo, Scores
from rlhf_drive.compare.baselines import baseline_planners
from rlhf_drive.compare.evaluate import evaluate
from rlhf_drive.errors import DataError, UnknownNameError
from rlhf_drive.scenes import Scene, Trajectories

FINAL_X = ScorerInfo("pdms", "final x")


@dataclass(frozen=True)
class Straight:
    """Sample g of every scene drives straight at ``speeds[g]`` m/s."""

    name: str
    speeds: Sequence[float]

    def plan(self, scenes: Sequence[Scene]) -> Trajectories:
        poses = np.zeros((len(self.speeds), 8, 3))
        poses[:, :, 0] = np.outer(self.speeds, 0.5 * np.arange(1, 9))
        return Trajectories(np.tile(poses, (len(scenes), 1, 1)), np.repeat(np.arange(len(scenes)), len(self.speeds)))


class FinalX:
    """PDMS = final x / 100; a plan beyond 100 m cannot be scored; a user's term `half` is half of it."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def score(
        self, scenes: Sequence[Scene], trajectories: Trajectories, previous: Trajectories | None = None
    ) -> Scores:
        self.calls.append(len(trajectories))
        x = trajectories.poses[:, -1, 0] / 100.0
        valid = x <= 1.0
        x = np.where(valid, x, np.nan)
        failures = {
            int(n): Failure("plan", "invalid_plan", f"plan of {scenes[trajectories.scene_index[n]].token} too long")
            for n in np.flatnonzero(~valid)
        }
        return Scores(("pdms", "half"), np.stack([x, x / 2], axis=1), 0.75 * x, valid, FINAL_X, failures)


def test_samples_are_averaged_per_scene(make_scene) -> None:
    result = evaluate([Straight("a", [5.0, 10.0])], [make_scene("x"), make_scene("y")], FinalX())
    # 5 m/s and 10 m/s end at 20 m and 40 m after 4 s.
    np.testing.assert_allclose(result.column("a"), [0.3, 0.3])
    np.testing.assert_allclose(result.column("a", "half"), [0.15, 0.15])
    np.testing.assert_allclose(result.result("a").reward, [0.225, 0.225])
    assert result.result("a").samples == 2


def test_the_first_sample_is_kept_with_its_own_scores(make_scene) -> None:
    result = evaluate([Straight("a", [5.0, 10.0])], [make_scene("x"), make_scene("y")], FinalX()).result("a")
    np.testing.assert_allclose(result.plans[:, -1, 0], [20.0, 20.0])
    np.testing.assert_allclose(result.plan_scores, [[0.2, 0.1], [0.2, 0.1]])


def test_batches_change_nothing_but_the_progress(make_scene) -> None:
    scenes = [make_scene(f"s{i}", speed=float(i)) for i in range(7)]
    planners = [*baseline_planners(["human"]), Straight("a", [5.0, 10.0])]
    steps: list[tuple[str, int, int]] = []
    whole, service = evaluate(planners, scenes, FinalX()), FinalX()
    parts = evaluate(planners, scenes, service, batch_size=3, on_progress=lambda *step: steps.append(step))
    np.testing.assert_array_equal(parts.column("human"), whole.column("human"))
    np.testing.assert_allclose(parts.column("human"), [0.04 * i for i in range(7)])
    np.testing.assert_array_equal(parts.result("a").plans, whole.result("a").plans)
    assert service.calls == [3, 3, 1, 6, 6, 2]
    assert steps[:4] == [("human", 3, 7), ("human", 6, 7), ("human", 7, 7), ("a", 3, 7)]


def test_a_failed_sample_is_left_out_of_the_mean_and_counted(make_scene) -> None:
    result = evaluate([Straight("a", [5.0, 30.0])], [make_scene("x")], FinalX()).result("a")
    np.testing.assert_allclose(result.scores, [[0.2, 0.1]])
    np.testing.assert_array_equal(result.valid, [0.5])
    assert result.failures == {"x": "plan of x too long"}


def test_a_scene_without_any_scored_sample_is_nan_not_zero(make_scene) -> None:
    result = evaluate([Straight("a", [30.0, 40.0])], [make_scene("x")], FinalX()).result("a")
    assert np.isnan(result.scores).all()
    assert np.isnan(result.reward).all()
    np.testing.assert_array_equal(result.valid, [0.0])


def test_scene_facts_are_carried_over(make_scene) -> None:
    scenes = [make_scene("x", kind="cut_in", cluster="c1", challenging=True), make_scene("y", speed=2.0)]
    result = evaluate([Straight("a", [1.0])], scenes, FinalX())
    assert (result.tokens, result.kinds, result.clusters) == (("x", "y"), ("cut_in", "straight"), ("c1", "y"))
    assert result.challenging.tolist() == [True, False]
    np.testing.assert_array_equal(result.human[1], scenes[1].reference.human_poses)
    assert (result.components, result.scorer) == (("pdms", "half"), "PDMS (final x, log replay)")


def test_rows_that_are_not_scene_major_are_refused(make_scene) -> None:
    class Wrong:
        name = "wrong"

        def plan(self, scenes: Sequence[Scene]) -> Trajectories:
            return Trajectories(np.zeros((4, 8, 3)), np.array([0, 1, 0, 1]))

    with pytest.raises(DataError, match="'wrong' must return the same number of rows for each of 2 scenes"):
        evaluate([Wrong()], [make_scene("x"), make_scene("y")], FinalX())


def test_repeated_names_and_empty_sets_are_refused(make_scene) -> None:
    twice = [Straight("a", [1.0]), Straight("a", [2.0])]
    with pytest.raises(DataError, match="'a' occurs 2 times"):
        evaluate(twice, [make_scene("x")], FinalX())
    with pytest.raises(DataError, match="unique scene tokens; 'x' occurs 2 times"):
        evaluate(twice[:1], [make_scene("x"), make_scene("x")], FinalX())
    with pytest.raises(DataError, match="at least one scene token"):
        evaluate(twice[:1], [], FinalX())


def test_unknown_names_are_answered_with_near_ones(make_scene) -> None:
    result = evaluate([Straight("gspo", [1.0])], [make_scene("x")], FinalX())
    with pytest.raises(UnknownNameError, match="Did you mean 'gspo'"):
        result.result("gsp0")
    with pytest.raises(UnknownNameError, match="Did you mean 'pdms'"):
        result.column("gspo", "pdm")


class Counted(Straight):
    """Counts how often it plans."""

    def __init__(self, name: str, speeds: Sequence[float]) -> None:
        super().__init__(name, speeds)
        object.__setattr__(self, "calls", [])

    def plan(self, scenes: Sequence[Scene]) -> Trajectories:
        self.calls.append(len(scenes))
        return super().plan(scenes)


class Shortness(FinalX):
    """EPDMS = 1 - final x / 100, for any plan."""

    def score(
        self, scenes: Sequence[Scene], trajectories: Trajectories, previous: Trajectories | None = None
    ) -> Scores:
        value = 1.0 - trajectories.poses[:, -1, 0] / 100.0
        valid = np.ones(len(value), dtype=bool)
        return Scores(("epdms",), value[:, None], value, valid, ScorerInfo("epdms", "short", "off"))


def test_plans_are_made_once_and_scored_by_each(make_scene) -> None:
    planner = Counted("a", [5.0, 30.0])
    scenes = [make_scene(name) for name in "uvwxy"]
    result = evaluate([planner], scenes, FinalX(), extra=[Shortness()], batch_size=2)
    (other,) = result.secondary
    assert planner.calls == [2, 2, 1]
    assert (result.headline, other.headline, other.secondary) == ("pdms", "epdms", ())
    assert other.scorer == "EPDMS (short, human filter off, log replay)"
    # 5 m/s ends at 20 m, 30 m/s at 120 m, which the first scorer does not take.
    np.testing.assert_allclose(result.column("a"), 5 * [0.2])
    np.testing.assert_allclose(other.column("a"), 5 * [(0.8 - 0.2) / 2])
    assert (result.result("a").valid.mean(), other.result("a").valid.mean()) == (0.5, 1.0)
    assert (result.tokens, other.tokens) == (("u", "v", "w", "x", "y"),) * 2


def test_failures_are_counted_by_kind_over_all_batches(make_scene) -> None:
    scenes = [make_scene(name) for name in "uvwxy"]
    result = evaluate([Straight("a", [5.0, 30.0, 40.0])], scenes, FinalX(), batch_size=2).result("a")
    assert result.failure_kinds == {"invalid_plan": 10}
    assert len(result.failures) == 5


def test_monitors_see_every_sample_whether_it_could_be_scored_or_not(make_scene) -> None:
    scenes = [make_scene("x", speed=5.0), make_scene("y", speed=0.0)]
    still = evaluate([Straight("a", [0.0, 5.0, 30.0, 40.0])], scenes, FinalX(), batch_size=1).result("a").monitors
    # Only the human of x moves; one of four plans there stands.
    assert still["monitor/standstill"] == 0.25
    assert still["monitor/final_reversal"] == 0.0
    human = evaluate(baseline_planners(["human"]), scenes, FinalX()).result("human").monitors
    assert human["monitor/longitudinal_jerk_ratio"] == 1.0


def test_scenes_without_a_human_have_no_human_plan(make_scene) -> None:
    scenes = [make_scene("x").with_reference(human_poses=np.zeros((0, 3))), make_scene("y", speed=2.0)]
    result = evaluate([Straight("a", [1.0])], scenes, FinalX())
    assert np.isnan(result.human[0]).all()
    np.testing.assert_array_equal(result.human[1], scenes[1].reference.human_poses)
    with pytest.raises(DataError, match="Scene 'x' holds no human drive"):
        evaluate(baseline_planners(["human"]), scenes, FinalX())


def test_headline_is_the_aggregate_else_the_total(make_scene) -> None:
    class Own(FinalX):
        def score(
            self, scenes: Sequence[Scene], trajectories: Trajectories, previous: Trajectories | None = None
        ) -> Scores:
            scores = super().score(scenes, trajectories)
            return Scores(("mine",), scores.components[:, :1], scores.total, scores.valid, scores.scorer)

    result = evaluate([Straight("a", [5.0])], [make_scene("x")], Own())
    assert result.headline == "reward"
    np.testing.assert_allclose(result.column("a"), [0.15])
    np.testing.assert_allclose(result.plan_column("a"), [0.15])
    both = evaluate([Straight("a", [5.0, 10.0])], [make_scene("x")], FinalX())
    np.testing.assert_allclose(both.plan_column("a"), [0.2])
