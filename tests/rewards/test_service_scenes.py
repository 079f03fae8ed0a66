"""The whole way on generated scenes: references attached, stored, read back and scored by the real scorer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from rewards import PDMS_COMPONENTS, LocalRewardService, RewardSpec, build_reward, check_invalid
from rewards.pdm_closed import attach_references
from rewards.pdms import score_pdms
from rewards.prepare import prepare_scene
from rlhf_drive.errors import RewardError
from rlhf_drive.registry import load_function
from rlhf_drive.scenes import Scene, Trajectories
from rlhf_drive.scenes.generator import generate_scenes
from rlhf_drive.scenes.store import SceneStore, write_scenes

EXAMPLE = Path(__file__).parents[2] / "examples/custom_reward.py"
GROUP = 6


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [attach_references(scene) for scene in generate_scenes(5, seed=11)]


@pytest.fixture(scope="module")
def plans(scenes: list[Scene]) -> Trajectories:
    """Six plans a scene: the human's, then ever noisier ones."""
    noise = np.random.default_rng(2).normal(size=(len(scenes), GROUP, 8, 3)).cumsum(axis=2) * [0.4, 0.15, 0.01]
    human = np.stack([scene.reference.human_poses for scene in scenes])
    poses = human[:, None] + noise * np.arange(GROUP)[:, None, None]
    return Trajectories(poses.reshape(-1, 8, 3), np.repeat(np.arange(len(scenes)), GROUP))


SPECS = [RewardSpec("pdms", 0.8), RewardSpec(f"{EXAMPLE}:smooth_speed", 0.2, {"tolerance_mps2": 0.5})]


def test_service_gives_what_the_scorer_gives(scenes: list[Scene], plans: Trajectories) -> None:
    scores = LocalRewardService(build_reward(SPECS)).score(scenes, plans)
    assert str(scores.scorer) == "PDMS (NAVSIM v1.1, log replay)"
    for s, scene in enumerate(scenes):
        result = score_pdms(prepare_scene(scene.reference), plans.poses[s * GROUP : (s + 1) * GROUP])
        for name in PDMS_COMPONENTS:
            np.testing.assert_array_equal(scores.component(name)[s * GROUP : (s + 1) * GROUP], getattr(result, name))
    smooth = scores.component("smooth_speed")
    np.testing.assert_allclose(scores.total, 0.8 * scores.component("pdms") + 0.2 * smooth, rtol=1e-15)
    assert scores.valid.all()
    assert np.ptp(scores.component("pdms")) > 0.3  # the plans differ, so equality above says something


def test_workers_batches_and_storage_change_no_bit(scenes: list[Scene], plans: Trajectories, tmp_path: Path) -> None:
    write_scenes(tmp_path / "store", scenes, split_of={s.token: "train" for s in scenes}, info={}, shard_size=2)
    stored = list(SceneStore.open(tmp_path / "store"))
    reward = build_reward(SPECS)
    expected = LocalRewardService(reward, workers=1).score(scenes, plans)
    with LocalRewardService(reward, workers=3) as service:
        np.testing.assert_array_equal(service.score(stored, plans).components, expected.components)
        assert service.stats.prepared == len(scenes)
        np.testing.assert_array_equal(service.score(scenes, plans).components, expected.components)
        assert service.stats.prepared == len(scenes)  # the same scene from memory and from disk is one scene
        order = np.random.default_rng(0).permutation(len(plans))
        for part in np.array_split(order, 4):
            scores = service.score(scenes, Trajectories(plans.poses[part], plans.scene_index[part]))
            np.testing.assert_array_equal(scores.components, expected.components[part])
            np.testing.assert_array_equal(scores.total, expected.total[part])


def test_broken_scene_and_broken_plan_are_lost_alone(scenes: list[Scene], plans: Trajectories) -> None:
    broken = scenes[1].with_reference(pdm_reference_v1=np.zeros((0, 3)))
    poses = plans.poses.copy()
    poses[2, 3, 1] = np.nan
    service = LocalRewardService(build_reward(SPECS))
    expected = service.score(scenes, plans)
    scores = service.score([scenes[0], broken, *scenes[2:]], replace(plans, poses=poses))
    assert sorted(scores.failures) == [2, *range(GROUP, 2 * GROUP)]
    assert scores.failures[2].reason == f"scene {scenes[0].token!r}: the plan holds a value that is not finite"
    assert scores.failures[GROUP].reason.startswith(
        f"scene {scenes[1].token!r} cannot be prepared: DataError: SceneReference.pdm"
    )
    np.testing.assert_array_equal(scores.components[scores.valid], expected.components[scores.valid])
    assert service.stats.failures == 1 + GROUP
    with pytest.raises(RewardError, match=r"7 of 30 rollouts \(23\.3%\)"):
        check_invalid(scores, 0.2)


@pytest.mark.parametrize("length", [1e3, 1e9, 1e200])
def test_plan_that_leads_far_away_is_scored_or_invalid(scenes: list[Scene], plans: Trajectories, length: float) -> None:
    poses = np.zeros((1, 8, 3))
    poses[0, :, 0] = length * np.arange(1, 9)
    scores = LocalRewardService(build_reward([RewardSpec("pdms")])).score(scenes[:1], Trajectories(poses, np.zeros(1)))
    assert not scores.valid[0] or scores.component("dac")[0] == 0.0


@pytest.fixture(scope="module")
def example() -> ModuleType:
    import sys

    return sys.modules[load_function(f"{EXAMPLE}:main").__module__]


def test_example_reward_by_hand(scenes: list[Scene], example: ModuleType) -> None:
    history = np.zeros((4, 8))
    still = replace(scenes[0], observation=replace(scenes[0].observation, ego_history=history))
    poses = np.zeros((2, 8, 3))
    poses[1, :, 0] = 2.0 * np.arange(1, 9)
    inputs = example.RewardInputs([still], Trajectories(poses, np.zeros(2)), {})
    # Row 1 jumps from 0 to 4 m/s and stays there: mean |dv/dt| = 4 m/s / 8 intervals / 0.5 s = 1 m/s².
    assert example.smooth_speed(inputs).tolist() == [1.0, 1.0]
    assert example.smooth_speed(inputs, tolerance_mps2=0.5).tolist() == pytest.approx([1.0, np.exp(-0.25)], abs=1e-12)


def test_example_runs_and_tells_plans_apart(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    scores = example.main(count=3, seed=1)
    smooth = scores.component("smooth_speed").reshape(3, 3)  # human, pulsing, straight on
    assert (smooth[:, 1] < 0.9 * smooth[:, 0]).all()
    np.testing.assert_array_equal(smooth[:, 2], 1.0)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 9
    assert lines[0].split() == ["scene", "plan", *scores.names, "total"]
    assert float(lines[5].split()[-1]) == pytest.approx(scores.total[4], abs=5e-4)
