"""What an objective takes and gives: pure functions from log-probabilities and advantages to a loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rlhf_drive.errors import DataError
from rlhf_drive.objectives.aggregate import Denominators

__all__ = ["LossInputs", "LossOutputs", "Objective", "merge_metrics"]


@dataclass(frozen=True)
class LossInputs:
    """N rollouts with T token slots each (``K*L`` for a decode trace, ``L`` for a one-pass likelihood)."""

    logp: Tensor
    """``[N, T]`` live log-probabilities, with gradient; values where `mask` is False are ignored."""
    old_logp: Tensor
    """``[N, T]`` log-probabilities of the policy that sampled."""
    ref_logp: Tensor | None
    """``[N, T]`` log-probabilities of the frozen reference; None switches the KL term and its metrics off."""
    advantages: Tensor
    """``[N]``, or ``[N, T]`` where the tokens of a row differ; zero for rows of a group without spread, which still
    count in the KL and in the denominators."""
    mask: Tensor
    """``[N, T]`` bool, scored tokens."""
    rows: Tensor | None = None
    """``[N]`` bool, rows that are learned from; a row left out counts nowhere. None means all."""
    group_size: int = 1
    """G: rows come in groups of so many, one scene each."""
    step_of: Tensor | None = None
    """``[T]`` long, decode step of each slot; None means that all slots belong to one step."""
    entropy: Tensor | None = None
    """``[N, T]`` nats, entropy of each scored slot's distribution, with gradient; needed for an entropy bonus."""
    weight: Tensor | None = None
    """``[N, T]`` float, how often a slot counts where only m of K decode steps were looked at: K/m in those, 0 in the
    others, whose log-probabilities are not read. `mask` and the denominators are those of all steps, so that the loss
    is unbiased. None means once."""
    behaviour_logp: Tensor | None = None
    """``[N, T]`` log-probabilities of the weights that really sampled, where those are older than `old_logp`'s (or
    computed in another precision). None means that they are `old_logp`'s own, and that nothing is corrected."""

    def __post_init__(self) -> None:
        shape = tuple(self.logp.shape)
        names = ("old_logp", "ref_logp", "mask", "entropy", "weight", "behaviour_logp")
        given = {name: getattr(self, name) for name in names}
        wanted = {name: shape for name, value in given.items() if value is not None}
        wanted["advantages"] = shape if self.advantages.ndim == 2 else shape[:1]
        wanted.update({"rows": shape[:1]} if self.rows is not None else {})
        wanted.update({"step_of": shape[1:]} if self.step_of is not None else {})
        found = {name: tuple(getattr(self, name).shape) for name in wanted}
        wrong = [f"{name} {list(found[name])}" for name in wanted if found[name] != wanted[name]]
        if len(shape) != 2 or wrong:
            raise DataError(
                f"A loss over logp {list(shape)} needs old_logp, ref_logp, mask, entropy, weight, behaviour_logp of "
                f"that shape [N, T], advantages [N] or [N, T], rows [N] and step_of [T]; got "
                f"{', '.join(wrong) or 'logp of another rank'}."
            )
        for name, flags in (("mask", self.mask), ("rows", self.rows)):
            if flags is not None and flags.dtype != torch.bool:
                raise DataError(f"LossInputs.{name} must be a bool tensor, got {flags.dtype}; compare with > 0 first.")

    def learned_rows(self) -> Tensor:
        """``[N]`` bool, `rows` with None spelled out."""
        if self.rows is not None:
            return self.rows
        return torch.ones(self.logp.shape[0], dtype=torch.bool, device=self.logp.device)


@dataclass(frozen=True)
class LossOutputs:
    """A loss to minimise and what it saw."""

    loss: Tensor
    """Scalar, this micro-batch's share of the batch's loss: call ``backward`` as it is, without dividing."""
    metrics: Mapping[str, Tensor]
    """Detached scalars by ``area/name``, this micro-batch's share; put together by `merge_metrics`."""


class Objective(Protocol):
    """A policy objective: pure, so that the same inputs give the same loss on any split of the batch.

    A function of one's own has this form too; see `make_objective`.
    """

    def __call__(self, inputs: LossInputs, denominators: Denominators) -> LossOutputs:
        """This micro-batch's share of the loss; `denominators` are counts over the whole optimisation batch."""
        ...


def merge_metrics(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """Metrics of the full batch from those of its micro-batches.

    Means are divided by the batch's own counts and therefore add up; ``*/min`` and ``*/max`` take the extreme.

    Example:
        >>> halves = [{"ratio/mean": torch.tensor(0.5), "ratio/max": torch.tensor(1.0)}] * 2
        >>> merge_metrics(halves)
        {'ratio/mean': 1.0, 'ratio/max': 1.0}
    """
    if not parts:
        return {}
    merged: dict[str, float] = {}
    for name in parts[0]:
        values = torch.stack([part[name].float() for part in parts])
        if name.endswith("/min"):
            merged[name] = float(values.min())
        elif name.endswith("/max"):
            merged[name] = float(values.max())
        else:
            merged[name] = float(values.sum())
    return merged
