"""Small trainers built as recipes build them, rewards with spread, and a look at what the objective is given."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rewards.carriers import Failure, ScorerInfo, Scores
from rlhf_drive.config import Recipe
from rlhf_drive.objectives import AdvantageInputs, Advantages, Denominators, LossInputs, LossOutputs
from rlhf_drive.policies import Policy
from rlhf_drive.policies.feature_cache import FeatureCache
from rlhf_drive.scenes import Scene
from rlhf_drive.training.build import build_accelerator, build_policy, build_trainer, decoding_of
from rlhf_drive.training.trainer import RlTrainer
from rollout import LocalRolloutService, Rollout

FEATURES = FeatureCache()
GROUP = 4
PROCESS_OVERRIDES: Mapping[str, tuple[str, ...]] = {
    "masked": ("rollout.order=random", "rollout.steps=3"),
    "flow": (
        "process={name: flow, beta_scale: 3.0, beta_power: 0.9, distance_scale_m: 4.0}", "rollout.order=all",
        "compare.order=all", "rollout.steps=3",
    ),
    "autoregressive": ("process.name=autoregressive", "rollout.steps=16", "compare.steps=16"),
}  # fmt: skip
"""What must change in a quickstart recipe for another process."""

PLAIN = {
    "learning_rate": 1e-3, "max_grad_norm": 1e9, "beta": 0.0, "importance_sampling_level": "token", "epsilon": 0.2,
    "epsilon_high": 0.2, "router": "free", "num_iterations": 1, "micro_batch_scenes": 4, "likelihood_draws": 2,
    "warmup_ratio": 0.0,
}  # fmt: skip
"""Keys of the section that most tests start from: an update that nothing bounds."""


def start_policy(recipe: Recipe, *, close_routing: bool = False) -> Policy:
    """The recipe's policy with a head that listens to the decoder.

    Args:
        recipe: Sizes and process.
        close_routing: Whether all experts are about equally likely, so that a small change flips most of them and
            moves hardly any gate.
    """
    policy = build_policy(recipe, torch.device("cpu")).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in policy.head.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        if close_routing:
            for router in routers(policy):
                router.mul_(1e-3)
    return policy


def routers(policy: Policy) -> list[Tensor]:
    """The weights of all routers."""
    return [parameter for name, parameter in policy.named_parameters() if name.endswith("router.weight")]


def make_trainer(
    recipe: Recipe, policy: Policy | None = None, *, weights: Mapping[str, float] | None = None, **changes: object
) -> RlTrainer:
    """A trainer of the recipe with some keys of its section changed; a copy of `policy` is trained, or a fresh one."""
    policy = start_policy(recipe) if policy is None else copy.deepcopy(policy)
    return build_trainer(
        replace(recipe.rl, **changes), policy, seed=0, accelerator=build_accelerator("cpu"), features=FEATURES,
        folder=Path(recipe.output_dir), reward_weights=weights,
    )  # fmt: skip


def sample(
    recipe: Recipe, policy: Policy, scenes: Sequence[Scene], *, step: int = 0, keep_experts: bool = False
) -> Rollout:
    """`GROUP` plans for each scene."""
    service = LocalRolloutService(policy, seed=0, features=FEATURES)
    return service.sample(scenes, GROUP, decoding_of(recipe.rollout), step=step, keep_experts=keep_experts)


def leftness(rollout: Rollout) -> NDArray[np.float64]:
    """``[N]`` a reward with spread: how far left the plan ends."""
    return np.tanh(rollout.trajectories.poses[:, -1, 1] / 40.0)


def scores_of(
    total: NDArray[np.float64], valid: NDArray[np.bool_] | None = None, **terms: NDArray[np.float64]
) -> Scores:
    """Scores of the given rewards; rows that are not valid hold NaN. Further terms get a column each."""
    valid = np.ones(len(total), dtype=bool) if valid is None else valid
    columns = [np.where(valid, column, np.nan) for column in (total, *terms.values())]
    failures = {int(i): Failure("r", "raised", "test") for i in np.flatnonzero(~valid)}
    return Scores(
        ("r", *terms), np.stack(columns, axis=1), columns[0], valid, ScorerInfo("r", "test"), failures
    )  # fmt: skip


@dataclass
class WatchedObjective:
    """A trainer's objective that remembers what it was given."""

    inner: Callable[[LossInputs, Denominators], LossOutputs]
    seen: list[LossInputs] = field(default_factory=list)
    denominators: list[Denominators] = field(default_factory=list)

    def __call__(self, inputs: LossInputs, denominators: Denominators) -> LossOutputs:
        self.seen.append(inputs)
        self.denominators.append(denominators)
        return self.inner(inputs, denominators)


def watch_objective(trainer: RlTrainer) -> WatchedObjective:
    """From now on the trainer's objective remembers what it was given."""
    watched = WatchedObjective(trainer.objective)
    trainer.objective = watched
    return watched


def watch_advantages(trainer: RlTrainer) -> list[tuple[AdvantageInputs, Advantages]]:
    """A list that fills with what the trainer's advantages were computed from, and what came out."""
    seen: list[tuple[AdvantageInputs, Advantages]] = []
    inner = trainer.advantages

    def advantages(inputs: AdvantageInputs) -> Advantages:
        found = inner(inputs)
        seen.append((inputs, found))
        return found

    trainer.advantages = advantages
    return seen


def watch_gradients(trainer: RlTrainer) -> list[Tensor]:
    """A list that fills with the flat gradient, as it was before clipping where the limit is high, of each update."""
    seen: list[Tensor] = []

    def before(*_: object) -> None:
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in trainer.parameters]
        seen.append(torch.cat([part.detach().flatten() for part in parts]).clone())

    trainer.optimizer.register_step_pre_hook(before)
    return seen


def move_after_updates(trainer: RlTrainer, scale: float, *, only_routers: bool = False) -> None:
    """Let each update leave ``weights before the first one + scale * noise``, always the same, whatever the gradient:
    two trainers can then be compared away from the policy that sampled without comparing rounding."""
    generator = torch.Generator().manual_seed(11)
    chosen = routers(trainer.policy) if only_routers else trainer.parameters
    targets = [(p, p.detach() + scale * torch.randn(p.shape, generator=generator)) for p in chosen]
    others = [(p, p.detach().clone()) for p in trainer.parameters]

    @torch.no_grad()
    def after(*_: object) -> None:
        for parameter, value in (*others, *targets):
            parameter.copy_(value)

    trainer.optimizer.register_step_post_hook(after)


def weights_of(policy: Policy) -> dict[str, Tensor]:
    """A copy of the policy's state."""
    return {name: value.detach().clone() for name, value in policy.state_dict().items()}


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Whether two states are equal bit for bit."""
    return set(left) == set(right) and all(torch.equal(left[name], right[name]) for name in left)


@torch.no_grad()
def spoil(trainer: RlTrainer) -> None:
    """Move the policy far away."""
    generator = torch.Generator().manual_seed(5)
    for parameter in trainer.parameters:
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
