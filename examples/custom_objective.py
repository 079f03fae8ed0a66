"""A loss and an advantage of your own: write two functions, name them in a recipe, train a few steps with them.

Run it from anywhere; it takes less than a minute on two CPU cores::

    python examples/custom_objective.py

A recipe uses the same functions by their place, with the KL and entropy terms of the recipe beside them::

    rl:
      advantages: examples/custom_objective.py:rank
      loss_type: examples/custom_objective.py:spo
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from rlhf_drive.config import load_recipe
from rlhf_drive.objectives import AdvantageInputs, Denominators, LossInputs, LossOutputs
from rlhf_drive.training.metrics import read_metrics
from rlhf_drive.training.pipeline import run

EPSILON = 0.2
"""Distance of the ratio from 1 at which the loss is lowest."""


def rank(inputs: AdvantageInputs) -> Tensor:
    """Share of the group's other plans that a plan beats, less the share that beats it; ``[N]`` in -1..1.

    How much better does not count, so that one crash does not decide alone what a group teaches. A group of equal plans
    gets zeros, and is left out.
    """
    rewards, valid = (values.view(-1, inputs.num_generations) for values in (inputs.rewards, inputs.valid))
    beaten = torch.sign(rewards[:, :, None] - rewards[:, None, :])
    both = valid[:, :, None] & valid[:, None, :]
    others = (valid.sum(dim=1, keepdim=True) - 1).clamp(min=1)
    return (torch.where(both, beaten, 0.0).sum(dim=2) / others).flatten()


def spo(inputs: LossInputs, denominators: Denominators) -> LossOutputs:
    """``-mean_t [r A - |A| / (2 epsilon) (r - 1)^2]`` (SPO, 2401.16025): a parabola around ratio 1, and no clip.

    Rows that are not learned from and tokens that are not scored count nowhere; a token counts as often as `weight`
    says; the mean is over the tokens of the whole batch, of which this call may see a part.
    """
    seen = inputs.mask & inputs.learned_rows()[:, None]
    count = seen.float() if inputs.weight is None else seen * inputs.weight
    ratio = torch.where(count > 0, inputs.logp - inputs.old_logp, 0.0).exp()
    advantages = torch.where(inputs.learned_rows(), inputs.advantages, 0.0)[:, None]
    penalty = advantages.abs() / (2 * EPSILON) * (ratio - 1).square()
    total = max(denominators.tokens, 1.0)
    loss = -(count * (ratio * advantages - penalty)).sum() / total
    return LossOutputs(loss, {"own/penalty": (count * penalty).sum().detach() / total})


def main(count: int = 40, epochs: int = 10, steps: int = 4, folder: Path | None = None) -> Path:
    """Imitate, then train `steps` RL steps with both functions; prints a line per step and returns the run folder."""
    folder = folder or Path(tempfile.mkdtemp(prefix="rlhf-drive-"))
    own = Path(__file__).resolve()
    recipe = load_recipe(
        "quickstart",
        [
            f"output_dir={folder}", f"scenes.count={count}", f"sft.max_epochs={epochs}", "sft.batch_size=16",
            f"rl.loss_type={own}:spo", f"rl.advantages={own}:rank", "rl.importance_sampling_level=token",
            f"rl.max_steps={steps}", "rl.learning_rate=1e-4", "rl.monitor_steps=0", "rollout.scenes_per_step=16",
            "compare.samples=1", "compare.metrics=[pdms]", "compare.pictures=0",
        ],
    )  # fmt: skip
    run_folder = run(recipe)
    for line in read_metrics(run_folder, phase="rl-seed0"):
        names = ("reward/total", "loss/policy", "own/penalty", "ratio/max", "groups/degenerate_frac")
        print(f"step {line['step']}  " + "  ".join(f"{name} {line[name]:.4f}" for name in names if name in line))
    return run_folder


if __name__ == "__main__":
    main()
