"""What RL sees of one scene: a group of sampled plans, how probable each was, and what each scored.

Run it from anywhere, with a policy that was trained (a checkpoint folder, such as ``RUN/sft/policy``) or a fresh one::

    python examples/inspect_rollouts.py --policy runs/quickstart/sft/policy --scene 3 --out rollouts.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from rewards import LocalRewardService, RewardSpec, Scores, build_reward
from rewards.pdm_closed import attach_references
from rlhf_drive.config import load_recipe
from rlhf_drive.likelihood import trace_logp
from rlhf_drive.policies import Decoding, Policy, load_policy
from rlhf_drive.scenes import Scene
from rlhf_drive.scenes.generator import generate_scenes
from rlhf_drive.scenes.picture import draw_scene
from rlhf_drive.scenes.store import SceneStore
from rlhf_drive.training.build import build_policy
from rollout import LocalRolloutService, Rollout


def sample_and_score(policy: Policy, scene: Scene, group: int, steps: int) -> tuple[Rollout, Scores]:
    """A group of plans for one scene, and their PDMS."""
    rollout = LocalRolloutService(policy, seed=0).sample([scene], group, Decoding(steps, "causal", 1.0, 0), step=0)
    with LocalRewardService(build_reward([RewardSpec("pdms")])) as rewards:
        return rollout, rewards.score([scene], rollout.trajectories)


def main(
    policy: Path | None = None,
    store: Path | None = None,
    index: int = 0,
    group: int = 8,
    steps: int = 8,
    out: Path = Path("rollouts.png"),
) -> tuple[Rollout, Scores]:
    """Print a line per sampled plan, write a picture of all of them, and return what was sampled and scored.

    Args:
        policy: Checkpoint folder; fresh weights without one.
        store: Scene store, whose held-out scenes are counted; generated scenes without one.
        index: Which scene.
        group: Plans to sample.
        steps: Decode steps.
        out: Where the PNG goes.
    """
    model = load_policy(policy) if policy else build_policy(load_recipe("quickstart"), torch.device("cpu"))
    model.eval()
    if store:
        scene = SceneStore.open(store).split("heldout")[index]
    else:
        scene = attach_references(next(generate_scenes(1, seed=0, start=index)))
    rollout, scores = sample_and_score(model, scene, group, steps)

    # The probability of a plan is the product over its draws; with the weights that sampled, the ratio to it is 1.
    with torch.no_grad():
        logp_NT, drawn_NT = trace_logp(model, model.encode([scene.observation]), rollout.trace)
    sampled_N = rollout.trace.logp.sum(dim=(0, 2))
    ratio_N = (logp_NT.sum(dim=1) - sampled_N).exp()
    print(f"scene {scene.token}: {group} plans of {int(drawn_NT[0].sum())} tokens in {len(rollout.trace.time)} steps")
    print("plan   log p   ratio  end x   end y  " + "".join(f"{name:>6}" for name in scores.names) + "  advantage")
    advantage = scores.total - np.nanmean(scores.total)
    for n in np.argsort(-np.nan_to_num(scores.total, nan=-1.0), kind="stable"):
        x, y = rollout.trajectories.poses[n, -1, :2]
        parts = "".join(f"{value:6.2f}" for value in scores.components[n])
        print(f"{n:4}  {sampled_N[n]:6.1f}  {ratio_N[n]:6.4f}  {x:5.1f}  {y:6.1f}  {parts}  {advantage[n]:+9.2f}")

    best = int(np.nanargmax(scores.total)) if scores.valid.any() else 0
    order = [best, *(n for n in range(group) if n != best)]
    title = f"{scene.token}\nbest of {group}: {100 * scores.total[best]:.0f} PDMS"
    out.write_bytes(draw_scene(scene, {"policy": rollout.trajectories.poses[order]}, title=title))
    print(f"Picture: {out}")
    return rollout, scores


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Sample a group of plans for one scene and show what they score.")
    parser.add_argument("--policy", type=Path, help="checkpoint folder; default: fresh weights")
    parser.add_argument("--store", type=Path, help="scene store; default: generated scenes")
    parser.add_argument("--scene", type=int, default=0, help="which scene")
    parser.add_argument("--group", type=int, default=8, help="plans to sample")
    parser.add_argument("--out", type=Path, default=Path("rollouts.png"), help="where the picture goes")
    options = parser.parse_args()
    main(options.policy, options.store, options.scene, options.group, out=options.out)
