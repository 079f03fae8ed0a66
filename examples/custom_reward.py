"""A reward of your own: write a function, name it in a recipe, and see what it does to a few plans.

Run it from anywhere::

    python examples/custom_reward.py

A recipe uses the same function by its place; keyword-only parameters are its options::

    reward:
      terms:
        - {name: pdms, weight: 0.8, options: {}}
        - {name: examples/custom_reward.py:smooth_speed, weight: 0.2, options: {tolerance_mps2: 1.0}}
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rewards import LocalRewardService, RewardInputs, RewardSpec, Scores, build_reward, reward
from rewards.pdm_closed import attach_references
from rlhf_drive.scenes import NUM_POSES, POSE_DT_S, Scene, Trajectories
from rlhf_drive.scenes.generator import generate_scenes


@reward("smooth_speed")
def smooth_speed(inputs: RewardInputs, *, tolerance_mps2: float = 1.0, scale_mps2: float = 2.0) -> NDArray[np.float64]:
    """How steadily a plan drives: ``exp(-max(0, a - tolerance) / scale)`` with `a` the mean of ``|dv/dt|``.

    Args:
        inputs: N plans and their scenes.
        tolerance_mps2: Mean change of speed that costs nothing (m/s²).
        scale_mps2: Excess at which the reward has fallen to 1/e (m/s²).

    Returns:
        ``[N]`` in 0..1. Row n depends on plan n and its scene alone, as it must.
    """
    poses_NT3 = inputs.trajectories.poses
    speed_now_S = np.array([scene.observation.speed_mps for scene in inputs.scenes])
    path_NT2 = np.concatenate([np.zeros_like(poses_NT3[:, :1, :2]), poses_NT3[:, :, :2]], axis=1)
    speed_NT = np.linalg.norm(np.diff(path_NT2, axis=1), axis=2) / inputs.trajectories.dt_s
    speed_NT = np.concatenate([speed_now_S[inputs.trajectories.scene_index][:, None], speed_NT], axis=1)
    change_N = np.abs(np.diff(speed_NT, axis=1)).mean(axis=1) / inputs.trajectories.dt_s
    return np.asarray(np.exp(-np.maximum(0.0, change_N - tolerance_mps2) / scale_mps2))


def plans_for(scene: Scene) -> dict[str, NDArray[np.float64]]:
    """Plans ``[8, 3]`` by name: the human's, the human's path at a pulsing speed, straight on at the present speed."""
    human = scene.reference.human_poses
    pulsing = human.copy()
    pulsing[0:-1:2, :2] = 0.6 * human[1::2, :2] + 0.4 * np.concatenate([np.zeros((1, 2)), human[1:-1:2, :2]])
    straight = np.zeros((NUM_POSES, 3))
    straight[:, 0] = scene.observation.speed_mps * POSE_DT_S * np.arange(1, NUM_POSES + 1)
    return {"human": human, "pulsing": pulsing, "straight on": straight}


def main(count: int = 4, seed: int = 0) -> Scores:
    """Score three plans in each of `count` generated scenes, print a table and return the scores."""
    scenes = [attach_references(scene) for scene in generate_scenes(count, seed=seed)]
    plans = [plans_for(scene) for scene in scenes]
    poses = np.stack([pose for of_scene in plans for pose in of_scene.values()])
    trajectories = Trajectories(poses, np.repeat(np.arange(count), len(plans[0])))

    terms = [
        RewardSpec("pdms", weight=0.8),
        RewardSpec(f"{Path(__file__).resolve()}:smooth_speed", weight=0.2, options={"tolerance_mps2": 1.0}),
    ]
    with LocalRewardService(build_reward(terms)) as service:
        scores = service.score(scenes, trajectories)

    print(f"{'scene':24}{'plan':14}" + "".join(f"{name:>13}" for name in (*scores.names, "total")))
    names = [name for of_scene in plans for name in of_scene]
    for row, plan in enumerate(names):
        kind = scenes[trajectories.scene_index[row]].kind
        values = "".join(f"{value:13.3f}" for value in (*scores.components[row], scores.total[row]))
        print(f"{kind:24}{plan:14}{values}  {scores.failures.get(row, '')}".rstrip())
    return scores


if __name__ == "__main__":
    main()
