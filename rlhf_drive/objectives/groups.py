"""Groups of rewards: what each holds, with rows that could not be scored left out of everything."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_drive.errors import ConfigError, DataError

__all__ = ["STD_EPS", "AdvantageInputs", "Advantages", "Groups"]

STD_EPS = 1e-4
"""Added to a standard deviation before dividing, as in TRL."""


@dataclass(frozen=True)
class AdvantageInputs:
    """Rewards of N = S * G rollouts, scene-major: rows n // G belong together."""

    rewards: Tensor
    """``[N]``; anything, NaN included, where not valid."""
    valid: Tensor
    """``[N]`` bool, rows that could be scored."""
    num_generations: int
    """G, rollouts per scene."""
    terms: Tensor | None = None
    """``[N, C]`` terms the reward is made of, NaN where a term does not apply to a row; None if nobody needs them."""
    term_weights: Tensor | None = None
    """``[C]`` weights of the terms; None means 1."""

    def __post_init__(self) -> None:
        rewards, valid, group = self.rewards, self.valid, self.num_generations
        if group < 2:
            raise ConfigError(f"rollout.num_generations = {group}: a group needs at least 2 rollouts to compare them.")
        if rewards.ndim != 1 or rewards.shape != valid.shape or len(rewards) % group:
            raise DataError(
                f"Advantages need rewards and valid of shape [S * {group}]; got {list(rewards.shape)} and "
                f"{list(valid.shape)}."
            )
        bad = torch.nonzero(valid & ~rewards.isfinite()).flatten().tolist()
        if bad:
            raise DataError(
                f"Rows {bad[:5]} are marked valid but their reward is not finite ({rewards[bad[0]].item()}); a rollout "
                "that could not be scored must be marked invalid."
            )
        terms, weights = self.terms, self.term_weights
        if terms is not None and (terms.ndim != 2 or len(terms) != len(rewards)):
            raise DataError(f"Advantages of {len(rewards)} rows need terms [N, C]; got {list(terms.shape)}.")
        if weights is not None and (terms is None or weights.shape != terms.shape[1:]):
            shape = None if terms is None else list(terms.shape)
            raise DataError(f"term_weights {list(weights.shape)} do not fit terms {shape}; one weight per term.")


@dataclass(frozen=True)
class Groups:
    """Values of S groups of G rows. Statistics are over the kept rows of a group; of none, they are 0."""

    values: Tensor
    """``[S, G]``, 0 where not kept."""
    kept: Tensor
    """``[S, G]`` bool."""

    @classmethod
    def of(cls, values: Tensor, kept: Tensor, num_generations: int) -> Groups:
        """Groups of ``[N]`` values; those not kept may be anything."""
        return cls(torch.where(kept, values, 0.0).view(-1, num_generations), kept.view(-1, num_generations))

    @property
    def counts(self) -> Tensor:
        """``[S, 1]`` kept rows."""
        return self.kept.sum(1, keepdim=True)

    @property
    def centred(self) -> Tensor:
        """``[S, G]`` values minus the mean of their group, 0 where not kept."""
        return torch.where(self.kept, self.values - self.values.sum(1, keepdim=True) / self.counts.clamp(min=1), 0.0)

    @property
    def std(self) -> Tensor:
        """``[S, 1]`` unbiased standard deviation within each group."""
        return (self.centred.square().sum(1, keepdim=True) / (self.counts - 1).clamp(min=1)).sqrt()

    @property
    def best(self) -> Tensor:
        """``[S]`` highest value; NaN of none."""
        highest = torch.where(self.kept, self.values, -torch.inf).amax(1)
        return torch.where(self.counts.squeeze(1) > 0, highest, torch.nan)

    @property
    def worst(self) -> Tensor:
        """``[S]`` lowest value; NaN of none."""
        return -Groups(-self.values, self.kept).best

    @property
    def spread(self) -> Tensor:
        """``[S]`` highest minus lowest value; 0 where fewer than two rows are kept."""
        return (self.best - self.worst).nan_to_num(nan=0.0)


@dataclass(frozen=True)
class Advantages:
    """Advantages of N rollouts in S groups."""

    values: Tensor
    """``[N]``; 0 for invalid rows and for all rows of a degenerate group."""
    degenerate: Tensor
    """``[S]`` bool, groups that teach nothing: fewer than two valid rows, or no spread."""
    spread: Tensor
    """``[S]`` largest minus smallest valid reward; 0 where no row is valid."""
    best: Tensor
    """``[S]`` largest valid reward; NaN where no row is valid."""
    worst: Tensor
    """``[S]`` smallest valid reward; NaN where no row is valid."""

    def metrics(self) -> dict[str, float]:
        """Statistics of the groups.

        ``groups/degenerate_frac`` is the share that teaches nothing. Part of it are ``groups/all_best_frac``, groups in
        which every rollout reached the batch's highest reward (nothing left to learn), and ``groups/all_worst_frac``,
        those in which each got its lowest (too hard as yet). ``groups/spread`` is the mean of highest minus lowest.
        """
        scored = ~self.best.isnan()
        best, worst, flat = self.best[scored], self.worst[scored], self.degenerate[scored]
        count = max(len(self.spread), 1)
        top, bottom = (best.max(), worst.min()) if len(best) else (torch.tensor(0.0), torch.tensor(0.0))
        return {
            "groups/degenerate_frac": float(self.degenerate.float().mean()),
            "groups/spread": float(self.spread.mean()),
            "groups/all_best_frac": float((flat & (best == top)).sum()) / count,
            "groups/all_worst_frac": float((flat & (worst == bottom)).sum()) / count,
        }
