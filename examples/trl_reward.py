"""TRL's reward functions here, and our rewards in TRL.

Run it from anywhere::

    python examples/trl_reward.py

`keeps_speed` has TRL's form and works unchanged as a term of a recipe::

    reward:
      terms:
        - {name: pdms, weight: 0.8, options: {}}
        - {name: trl, weight: 0.2, options: {function: "examples/trl_reward.py:keeps_speed"}}

The other way round, `as_trl_reward` makes a function that `trl.GRPOTrainer(reward_funcs=…)` takes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from rewards import LocalRewardService, RewardSpec, Scores, build_reward
from rewards.pdm_closed import attach_references
from rewards.plan_text import format_plan, parse_plan
from rlhf_drive.integrations import as_trl_reward, prompt_rows
from rlhf_drive.scenes import NUM_POSES, POSE_DT_S, Trajectories
from rlhf_drive.scenes.generator import generate_scenes


def keeps_speed(completions: list[str], speed_mps: list[float], **columns: Any) -> list[float | None]:
    """1 for a plan whose mean speed is the present one, falling to 0 at 10 m/s off; a standing car is not judged."""
    rewards: list[float | None] = []
    for text, speed in zip(completions, speed_mps, strict=True):
        path = np.vstack([np.zeros((1, 2)), parse_plan(text)[:, :2]])
        mean = np.linalg.norm(np.diff(path, axis=0), axis=1).sum() / (NUM_POSES * POSE_DT_S)
        rewards.append(None if speed < 0.5 else max(0.0, 1.0 - abs(mean - speed) / 10.0))
    return rewards


def main(count: int = 3, seed: int = 0) -> tuple[Scores, list[float | None]]:
    """Score plans with `keeps_speed` in our service, then texts with our reward as TRL would; return both."""
    scenes = [attach_references(scene) for scene in generate_scenes(count, seed=seed)]
    plans = np.stack([scene.reference.human_poses * factor for scene in scenes for factor in (1.0, 0.5)])
    terms = [
        RewardSpec("pdms", weight=0.8),
        RewardSpec("trl", weight=0.2, options={"function": f"{Path(__file__).resolve()}:keeps_speed"}),
    ]
    with LocalRewardService(build_reward(terms)) as service:
        scores = service.score(scenes, Trajectories(plans, np.arange(2 * count) // 2))
    print("TRL's function in our service: pdms, keeps_speed, total")
    for row in range(2 * count):
        pdms, speed = scores.component("pdms")[row], scores.components[row, -1]
        print(f"  {scenes[row // 2].kind:20}{pdms:8.3f}{speed:8.3f}{scores.total[row]:8.3f}")

    reward = as_trl_reward(build_reward([RewardSpec("pdms")]), {scene.token: scene for scene in scenes})
    rows = prompt_rows(scenes)  # Dataset.from_list(rows) is a GRPOTrainer's train_dataset
    completions = [format_plan(plans[0]), format_plan(plans[1]), "I would rather not say."]
    first = [rows[0]["prompt"]] * 3, [rows[0]["scene"]] * 3
    values = reward(prompts=first[0], completions=completions, scene=first[1])
    print("Our reward as TRL calls it:")
    for text, value in zip(completions, values, strict=True):
        print(f"  {'not scored' if value is None else f'{value:.3f}':12}{text[:60]}")
    return scores, values


if __name__ == "__main__":
    main()
