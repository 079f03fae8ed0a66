"""Scenes with and without a previous frame, scored together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from rewards.carriers import Failure, ScorerInfo, Scores
from rewards.epdms import prepare_epdms, score_epdms
from rewards.pdm_closed import attach_references
from rewards.two_frame import has_previous_frame, score_frames
from rlhf_drive.errors import DataError
from rlhf_drive.scenes import Scene, Trajectories
from rlhf_drive.scenes.generator import generate_scenes


class EndsAlike:
    """Total = final x / 100, plans beyond 100 m fail; EC = 1 where the previous plan ends at the same x."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, bool]] = []

    def score(
        self, scenes: Sequence[Scene], trajectories: Trajectories, previous: Trajectories | None = None
    ) -> Scores:
        self.calls.append((len(trajectories), previous is not None))
        x = trajectories.poses[:, -1, 0]
        ec = np.full(len(x), np.nan) if previous is None else (previous.poses[:, -1, 0] == x).astype(float)
        total = np.where(x <= 100.0, x / 100.0, np.nan)
        failures = {
            int(n): Failure("plan", "invalid_plan", scenes[trajectories.scene_index[n]].token)
            for n in np.flatnonzero(np.isnan(total))
        }
        info = ScorerInfo("epdms", "test")
        return Scores(("ec",), ec[:, None], total, np.isfinite(total), info, failures)


def rows(scenes: int, *final_x: float) -> Trajectories:
    poses = np.zeros((len(final_x), 8, 3))
    poses[:, -1, 0] = final_x
    return Trajectories(poses, np.arange(len(final_x)) // (len(final_x) // scenes))


def unknown(scene: Scene) -> Scene:
    return scene.with_reference(prev_ego_init=np.zeros(0))


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return list(generate_scenes(4, seed=11))


@pytest.mark.parametrize(
    ("gap_us", "near"),
    [(0, False), (50_000, False), (50_001, True), (500_000, True), (549_999, True), (550_000, False)],
)
def test_previous_frame_counts_where_epdms_can_compare_with_it(scenes: list[Scene], gap_us: int, near: bool) -> None:
    scene = scenes[0].with_reference(prev_t0_us=scenes[0].reference.t0_us - gap_us)
    assert has_previous_frame(scene) is near
    assert not has_previous_frame(unknown(scene))
    prepared = prepare_epdms(attach_references(scene).reference)
    plans = scene.reference.human_poses[None]
    if near:
        assert np.isfinite(score_epdms(prepared, plans, plans).ec).all()
    else:
        with pytest.raises(DataError):
            score_epdms(prepared, plans, plans)


def test_previous_plans_go_only_where_there_is_a_previous_frame(scenes: list[Scene]) -> None:
    mixed = [unknown(scenes[0]), scenes[1], scenes[2], unknown(scenes[3])]
    service = EndsAlike()
    now = rows(4, 10.0, 140.0, 20.0, 21.0, 30.0, 150.0, 40.0, 41.0)
    before = rows(4, 10.0, 0.0, 20.0, 21.0, 0.0, 150.0, 0.0, 0.0)
    scores = score_frames(service, mixed, now, before)
    nan = np.nan
    np.testing.assert_array_equal(scores.component("ec"), [nan, nan, 1.0, 1.0, 0.0, 1.0, nan, nan])
    np.testing.assert_allclose(scores.total, [0.10, nan, 0.20, 0.21, 0.30, nan, 0.40, 0.41])
    reasons = {row: failure.reason for row, failure in scores.failures.items()}
    assert reasons == {1: scenes[0].token, 5: scenes[2].token}
    assert service.calls == [(4, True), (4, False)]


def test_scenes_that_are_alike_take_one_call(scenes: list[Scene]) -> None:
    service, plans = EndsAlike(), rows(4, 1.0, 2.0, 3.0, 4.0)
    score_frames(service, scenes, plans, plans)
    score_frames(service, [unknown(scene) for scene in scenes], plans, plans)
    score_frames(service, scenes, plans, None)
    assert service.calls == [(4, True), (4, False), (4, False)]
