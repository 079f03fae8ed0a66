"""The last stage of a run: policies and baselines drive the held-out scenes, and a report compares them."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from rewards.carriers import Scores
from rewards.from_recipe import build_service, metric_config, reward_config
from rewards.service import RewardService, check_invalid
from rlhf_drive.compare.analysis import Bootstrap, Comparison
from rlhf_drive.compare.baselines import baseline_planners
from rlhf_drive.compare.evaluate import Evaluation, Planner, evaluate
from rlhf_drive.compare.planners import PolicyPlanner
from rlhf_drive.compare.report import print_table, summary, write_report
from rlhf_drive.config import Recipe
from rlhf_drive.errors import DataError
from rlhf_drive.policies import Policy, load_policy
from rlhf_drive.policies.feature_cache import FeatureCache
from rlhf_drive.scenes import Scene, Trajectories
from rlhf_drive.scenes.store import SceneStore
from rlhf_drive.training.build import decoding_of
from rlhf_drive.training.run_folder import RunFolder
from rlhf_drive.training.terminal import print_info, print_rich, progress

__all__ = ["compare_policies", "unseen"]


def compare_policies(
    recipe: Recipe,
    folder: RunFolder,
    store: SceneStore,
    features: FeatureCache,
    *,
    device: torch.device,
    started: float,
) -> None:
    """Drive the held-out scenes with a recipe's policies and baselines; write the report and say what came of it.

    Args:
        recipe: With section `compare`; a pipeline's own policies are those of its run folder.
        folder: Run folder.
        store: Scenes.
        features: Cache of network inputs.
        device: Where policies plan.
        started: ``time.monotonic()`` at the run's beginning.

    Raises:
        DataError: The policies have trained on all held-out scenes.
        RewardError: More plans than the recipe tolerates cannot be scored.
    """
    section = recipe.compare
    policies = _policies(recipe, folder.path, device)
    scenes = unseen(store.split("heldout"), policies)
    planners: list[Planner] = [
        PolicyPlanner(name, policy, decoding_of(section), section.samples, section.seed, features)
        for name, policy in policies.items()
    ]
    planners += baseline_planners(section.baselines)
    reward = recipe.reward
    trained = reward_config(reward)
    # The recipe's own terms are reported too, unless another scorer is asked for first, or they need the frame
    # before, which not every planner has; the metric takes EC in wherever it can.
    own = reward.scorer == section.metrics[0] and not trained.build().two_frame
    configs = [trained if own else metric_config(section.metrics[0], reward)]
    configs += [metric_config(metric, reward) for metric in section.metrics[1:]]
    with ExitStack() as stack:
        services = [
            _Tolerant(
                stack.push(build_service(config, reward, address=recipe.ray.address)),
                reward.max_invalid_fraction,
            )
            for config in configs
        ]
        with progress("compare") as on_progress:
            evaluation = evaluate(
                planners, scenes, services[0], extra=services[1:], two_frame="epdms" in section.metrics,
                on_progress=lambda name, done, total: on_progress(done, total, name),
            )  # fmt: skip
    _report(recipe, folder, evaluation, scenes, started)


def _report(recipe: Recipe, folder: RunFolder, evaluation: Evaluation, scenes: Sequence[Scene], started: float) -> None:
    section, path = recipe.compare, folder.path
    bootstrap = Bootstrap(section.bootstrap_samples, section.confidence, section.seed)
    seeds = tuple(name for name in evaluation.planners if name.startswith("rl-seed"))
    comparisons = _comparisons(list(section.policies), seeds, list(evaluation.planners))
    write_report(
        evaluation, path, scenes=scenes, comparisons=comparisons, pictures=section.pictures, bootstrap=bootstrap,
        title=recipe.name,
    )  # fmt: skip
    print_rich(print_table(evaluation))
    minutes = (time.monotonic() - started) / 60.0
    if seeds and "sft" in evaluation.planners:
        result = summary(
            evaluation, "sft", seeds, minutes, bootstrap_samples=section.bootstrap_samples, seed=section.seed
        )
        result["sft_training"] = folder.done("sft")
        (path / "summary.json").write_text(json.dumps(result, indent=2) + "\n")
        gain, head = result["gain"], evaluation.headline
        low, high = gain["ci95"]
        interval = "no interval: too few clusters" if low is None else f"95 % interval [{low:+.2f}, {high:+.2f}]"
        better, equal = result["win_rate"], result["tie_rate"]
        shares = f"better on {better:.0%} of the scenes, equal on {equal:.0%}, worse on {1 - better - equal:.0%}"
        print_info(f"RL gain over SFT: {gain[head]:+.2f} {head.upper()} points, {interval}; {shares}")


def _policies(recipe: Recipe, run: Path, device: torch.device) -> dict[str, Policy]:
    """Policies to compare, by name, in the order of the report."""
    folders = {name: Path(path) for name, path in recipe.compare.policies.items()}
    if recipe.job == "pipeline":
        folders["sft"] = run / "sft" / "policy"
        folders |= {f"rl-seed{seed}": run / f"rl-seed{seed}" / "policy" for seed in recipe.rl.seeds}
    return {name: load_policy(folder, device=device) for name, folder in folders.items()}


def unseen(scenes: Sequence[Scene], policies: Mapping[str, Policy]) -> Sequence[Scene]:
    """The scenes that no policy has trained on; what is left out is said, by policy.

    Raises:
        DataError: Nothing is left.
    """
    left = scenes
    for name, policy in policies.items():
        seen = sum(policy.has_trained_on(scene) for scene in scenes)
        if seen:
            print_info(f"compare: leaving out {seen} of {len(scenes)} held-out scenes that {name} has trained on")
            left = [scene for scene in left if not policy.has_trained_on(scene)]
    if not left:
        raise DataError(
            f"All {len(scenes)} held-out scenes belong to clusters that the policies have trained on. Compare on other "
            "scenes, or split them with the seed and share used in training."
        )
    return left


def _comparisons(policies: list[str], seeds: tuple[str, ...], evaluated: list[str]) -> list[Comparison]:
    """The report's questions: RL against SFT first, both against baselines, other policies against the first."""
    found = []
    if seeds:
        found = [Comparison("rl", seeds, name) for name in ("sft", "constant_velocity", "pdm_closed", "human")]
        found.insert(1, Comparison("sft", ("sft",), "constant_velocity"))
    found += [Comparison(name, (name,), policies[0]) for name in policies[1:]]
    return [c for c in found if {*c.policies, c.reference} <= set(evaluated)]


@dataclass(frozen=True)
class _Tolerant:
    """Scores plans, and stops when more of a batch cannot be scored than the recipe tolerates."""

    rewards: RewardService
    max_invalid_fraction: float

    def score(
        self, scenes: Sequence[Scene], trajectories: Trajectories, previous: Trajectories | None = None
    ) -> Scores:
        """Scores of all rows."""
        scores = self.rewards.score(scenes, trajectories, previous)
        check_invalid(scores, self.max_invalid_fraction)
        return scores
