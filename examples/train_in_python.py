"""The whole way from Python: generate scenes, imitate their experts, improve on that with GSPO, compare.

Run it from anywhere; it takes less than a minute on two CPU cores::

    python examples/train_in_python.py
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from rewards import LocalRewardService, RewardSpec, build_reward
from rewards.hack_detector import Alert
from rlhf_drive.compare.baselines import baseline_planners
from rlhf_drive.compare.evaluate import Evaluation, evaluate
from rlhf_drive.compare.planners import PolicyPlanner
from rlhf_drive.compare.report import print_table
from rlhf_drive.config import load_recipe
from rlhf_drive.likelihood import make_likelihood
from rlhf_drive.objectives import AdvantageSettings, ObjectiveSettings, make_advantages, make_objective
from rlhf_drive.policies import Decoding, load_policy
from rlhf_drive.policies.feature_cache import FeatureCache
from rlhf_drive.training.build import build_accelerator, build_policy, sft_settings, trainer_settings, visiting_of
from rlhf_drive.training.collect import Sampling
from rlhf_drive.training.engine import TrainingEngine
from rlhf_drive.training.reference import FrozenReference
from rlhf_drive.training.rl import LoopSettings, train_rl
from rlhf_drive.training.scenes import build_scenes
from rlhf_drive.training.sft import train_sft
from rlhf_drive.training.step_collector import Services
from rlhf_drive.training.trainer import RlTrainer
from rlhf_drive.training.watch import Watch
from rollout import LocalRolloutService


class Printed:
    """Takes the metrics of a phase; a notebook would plot them."""

    def resume(self, step: int) -> None:
        """Training goes on after `step`."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show a line per RL step and per SFT epoch."""
        shown = ("loss/heldout", "reward/total", "reward/best_of_group", "kl/ref_k3")
        if line := "  ".join(f"{name} {metrics[name]:.3f}" for name in shown if name in metrics):
            print(f"step {step:4}  {line}")

    def warn(self, alert: Alert) -> None:
        """Show what looks like reward hacking."""
        print(f"step {alert.step:4}  warning: {alert.message}")

    def note(self, text: str) -> None:
        """Show what else one should know."""
        print(text)


def main(count: int = 60, epochs: int = 20, steps: int = 10, folder: Path | None = None) -> Evaluation:
    """Train on `count` scenes, print a table of the policy before and after RL, and return the comparison."""
    folder = folder or Path(tempfile.mkdtemp(prefix="rlhf-drive-"))
    # A recipe is a convenient source of settings; each of the dataclasses below can also be written out by hand.
    sizes = (f"scenes.count={count}", f"sft.max_epochs={epochs}", "sft.batch_size=16", f"rl.max_steps={steps}")
    recipe = load_recipe("quickstart", sizes)
    store = build_scenes(recipe.scenes, folder / "scenes")
    train, heldout = store.split("train"), store.split("heldout")
    accelerator, features = build_accelerator("cpu"), FeatureCache()

    policy = build_policy(recipe, accelerator.device)
    train_sft(
        policy, train, heldout, sft_settings(recipe), folder / "sft",
        accelerator=accelerator, features=features, journal=Printed(),
    )  # fmt: skip

    # Likelihood x advantage x objective: any of each goes with any of the others.
    gspo = ObjectiveSettings("grpo", "sequence", epsilon=0.02, epsilon_high=0.03, beta=0.01)
    settings = trainer_settings(recipe.rl)
    engine = TrainingEngine(
        policy, learning_rate=settings.learning_rate, weight_decay=settings.weight_decay, accelerator=accelerator
    )
    trainer = RlTrainer(
        engine, make_likelihood("trace"), make_advantages(AdvantageSettings()), make_objective(gspo), gspo,
        settings, features=features, reference=FrozenReference(policy), folder=folder / "rl",
    )  # fmt: skip
    decoding = Decoding(steps=8, order="causal", temperature=1.0, top_k=0)
    sampling = Sampling(decoding, num_generations=8, scenes_per_step=16, scenes_per_chunk=16, previous_plan="none")
    rollouts = LocalRolloutService(policy, seed=0, features=features)
    with LocalRewardService(build_reward([RewardSpec("pdms")])) as rewards:
        train_rl(
            trainer, Services(rollouts, rewards), train, folder / "rl",
            sampling=sampling, visiting=visiting_of(recipe.rl),
            settings=LoopSettings(seed=0, save_steps=steps, keep_checkpoints=1, max_invalid_fraction=0.05),
            journal=Printed(), watch=Watch(),
        )  # fmt: skip
        trained = {"before RL": folder / "sft" / "policy", "after RL": folder / "rl" / "policy"}
        planners = [PolicyPlanner(name, load_policy(p), decoding, 4, 0, features) for name, p in trained.items()]
        result = evaluate([*planners, *baseline_planners(["human", "constant_velocity"])], heldout, rewards)
    Console(width=100).print(print_table(result))
    return result


if __name__ == "__main__":
    main()
