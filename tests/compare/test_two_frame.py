"""Plans of the previous frame: which planners have them, and which scenes they are scored in."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from rewards.carriers import EPDMS_COMPONENTS, Failure, ScorerInfo, Scores
from rewards.two_frame import has_previous_frame
from rlhf_drive.compare.baselines import baseline_planners
from rlhf_drive.compare.evaluate import evaluate
from rlhf_drive.compare.report import print_table, summary
from rlhf_drive.compare.two_frame import plan_previous
from rlhf_drive.errors import DataError
from rlhf_drive.scenes import Scene, Trajectories, to_ego_frame, to_world_frame

INFO = ScorerInfo("epdms", "test", "on")


class Epdms:
    """EPDMS = final x / 100; EC = 1 where the previous plan ends at the same x, NaN without one. Plans beyond 100 m
    fail, and so does every scene whose previous frame is not known if a plan of it is given."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, bool]] = []

    def score(
        self, scenes: Sequence[Scene], trajectories: Trajectories, previous: Trajectories | None = None
    ) -> Scores:
        self.calls.append((len(trajectories), previous is not None))
        x = trajectories.poses[:, -1, 0]
        columns = {name: np.ones(len(x)) for name in EPDMS_COMPONENTS}
        columns["epdms"] = np.where(x <= 100.0, x / 100.0, np.nan)
        columns["ec"] = np.full(len(x), np.nan)
        if previous is not None:
            columns["ec"] = (previous.poses[:, -1, 0] == x).astype(float)
            for n, i in enumerate(trajectories.scene_index):
                columns["epdms"][n] = columns["epdms"][n] if has_previous_frame(scenes[i]) else np.nan
        valid = np.isfinite(columns["epdms"])
        failures = {int(n): Failure("scorer", "raised", f"row at {x[n]:.0f} m") for n in np.flatnonzero(~valid)}
        stacked = np.stack(list(columns.values()), axis=1)
        return Scores(EPDMS_COMPONENTS, stacked, columns["epdms"], valid, INFO, failures)


def rows(*final_x: float) -> Trajectories:
    poses = np.zeros((len(final_x), 8, 3))
    poses[:, -1, 0] = final_x
    return Trajectories(poses, np.arange(len(final_x)))


def unknown(scene: Scene) -> Scene:
    return scene.with_reference(prev_ego_init=np.zeros(0))


def test_other_rows_of_the_previous_frame_are_refused(make_scene) -> None:
    class Wrong:
        def plan_previous(self, scenes: Sequence[Scene]) -> Trajectories:
            return rows(1.0)

    with pytest.raises(DataError, match="'w' returned 1 plans of the previous frame for 2 plans"):
        plan_previous("w", Wrong(), [make_scene("a"), make_scene("b")], rows(1.0, 2.0))
    assert plan_previous("o", object(), [make_scene("a")], rows(1.0)) is None


def moved(scene: Scene, speed: float) -> Scene:
    """The previous frame lies 0.5 s back, 1 m to the left and turned, at another speed."""
    state = np.array(scene.reference.ego_init)
    state[:3] = to_world_frame(np.array([-0.5 * speed, 1.0, 0.2]), scene.reference.ego_init[:3])
    state[3] = speed
    return scene.with_reference(prev_ego_init=state)


def test_baselines_plan_in_the_previous_frame(make_scene) -> None:
    scene = moved(make_scene(speed=4.0), 3.0)
    human, straight, still, closed = baseline_planners(["human", "constant_velocity", "stand_still", "pdm_closed"])
    assert closed.plan_previous([scene]) is None
    np.testing.assert_allclose(straight.plan_previous([scene]).poses[0, :, 0], 1.5 * np.arange(1, 9))
    np.testing.assert_array_equal(still.plan_previous([scene]).poses, np.zeros((1, 8, 3)))
    # The human is at the origin of now after 0.5 s, and at its own poses 0.5 s later than that.
    world = to_world_frame(human.plan_previous([scene]).poses[0], scene.reference.prev_ego_init[:3])
    expected = np.concatenate([np.zeros((1, 3)), scene.reference.human_poses[:7]])
    np.testing.assert_allclose(to_ego_frame(world, scene.reference.ego_init[:3]), expected, atol=1e-9)


def test_baselines_leave_unknown_frames_open(make_scene) -> None:
    scenes = [unknown(make_scene("a")), make_scene("b")]
    for planner in baseline_planners(["human", "constant_velocity"]):
        finite = np.isfinite(planner.plan_previous(scenes).poses).all(axis=(1, 2))
        assert finite.tolist() == [False, True]


def test_evaluation_has_ec_where_planner_and_scene_have_two_frames(make_scene) -> None:
    scenes = [make_scene("a", speed=0.0), make_scene("b", speed=2.0), unknown(make_scene("c", speed=2.0))]
    reference = np.tile(scenes[0].reference.ego_init[:3], (41, 1))
    scenes = [scene.with_reference(pdm_reference_v1=reference) for scene in scenes]
    planners = baseline_planners(["constant_velocity", "pdm_closed"])
    result = evaluate(planners, scenes, Epdms(), two_frame=True)
    np.testing.assert_array_equal(result.column("constant_velocity", "ec"), [1.0, 1.0, np.nan])
    assert np.isnan(result.column("pdm_closed", "ec")).all()
    assert result.result("constant_velocity").valid.tolist() == [1.0, 1.0, 1.0]
    single = evaluate(planners, scenes, Epdms())
    assert np.isnan(single.column("constant_velocity", "ec")).all()


def test_missing_ec_is_a_dash_and_is_said(make_scene) -> None:
    scenes = [make_scene("a"), make_scene("b")]
    reference = np.tile(scenes[0].reference.ego_init[:3], (41, 1))
    scenes = [scene.with_reference(pdm_reference_v1=reference) for scene in scenes]
    result = evaluate(baseline_planners(["human", "pdm_closed"]), scenes, Epdms(), two_frame=True)
    table = print_table(result)
    cells = {str(column.header): list(column.cells) for column in table.columns}
    # The human at 5 m/s is at 20 m after 4 s; the plan of the previous frame, the same place, ends at 17.5 m.
    assert cells["EC"] == ["0.0", "–"]
    assert "without EC, so not to be compared with the others: pdm_closed" in str(table.caption)
    assert "EPDMS by EPDMS (test, human filter on, log replay)" in str(table.caption)
    # Where nobody has EC all are alike, and nothing is said.
    assert "without EC" not in str(print_table(evaluate(baseline_planners(["human"]), scenes, Epdms())).caption)


def test_summary_of_an_epdms_run_speaks_of_epdms(make_scene) -> None:
    scenes = [make_scene("a", speed=5.0), make_scene("b", speed=10.0)]
    result = evaluate(baseline_planners(["human", "stand_still"]), scenes, Epdms(), two_frame=True)
    assert result.headline == "epdms"
    run = summary(result, "stand_still", ["human"], 1.0, bootstrap_samples=50)
    assert run["sft"] == {"epdms": 0.0}
    assert run["rl"] == {"epdms": 30.0}
    assert run["gain"] == {"epdms": 30.0, "ci95": [20.0, 40.0]}
    assert run["seeds"][0]["epdms"] == 30.0
    assert "metrics" not in run
    assert "pdms" not in str(run).replace("epdms", "")
