"""What one RL step learns from: rollouts with advantages, probes, and old and reference log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rewards.carriers import Scores
from rlhf_drive.likelihood import Probes, TokenLogp
from rlhf_drive.objectives import Advantages, Denominators, LossInputs, count_denominators
from rlhf_drive.policies import DecodeTrace
from rlhf_drive.scenes import Scene
from rollout import Rollout

__all__ = ["MicroBatch", "UpdateBatch", "drawn_steps"]


@dataclass(frozen=True)
class MicroBatch:
    """Some groups of a batch, for one backward pass."""

    scenes: list[Scene]
    """Scenes of the groups."""
    rows: Tensor
    """Row numbers in the batch, scene-major."""
    trace: DecodeTrace
    """How these rows came about, with the routing to be replayed."""
    probes: Probes | None
    """Where a surrogate likelihood looks in these rows."""


@dataclass
class UpdateBatch:
    """N = S * G rollouts, scene-major, of which the groups in `kept` are learned from.

    Old log-probabilities and routing come from the first pass of the first iteration where the sampler's do not serve
    (:meth:`keep`); everything else is fixed before the first update.
    """

    step: int
    """RL step."""
    scenes: Sequence[Scene]
    """S scenes."""
    rollout: Rollout
    """How each row came about."""
    scores: Scores
    """What each row is worth."""
    mask: Tensor
    """``[N, T]`` bool, slots of the likelihood: ``K * L`` of one that visits the decode steps, else L."""
    probes: Probes | None
    """Where a surrogate likelihood looks."""
    steps: Tensor | None
    """Decode steps looked at; None means all."""
    old_logp: Tensor | None
    """``[N, T]`` log-probabilities of the policy that sampled; None until the trainer has found them."""
    kept: Tensor
    """Scene numbers of the groups that are learned from."""
    size: int
    """Scenes of a micro-batch."""
    advantages: Tensor
    """``[N]``."""
    denominators: Denominators
    """Counts over the groups in `kept`."""
    ref_logp: Tensor | None = None
    """``[N, T]`` log-probabilities of the reference, where it is needed; 0 in rows of other processes."""
    behaviour_logp: Tensor | None = None
    """``[N, T]`` log-probabilities of the sampler, where `old_logp` are not those and the objective is to know."""
    experts: Tensor | None = None
    """``[K or P, N, layers, A]`` routing of the trainer's first pass, to be replayed in later iterations."""
    _old_is_ours: bool = False

    @property
    def valid(self) -> Tensor:
        """``[N]`` bool, rows that could be scored; on the CPU."""
        return torch.from_numpy(self.scores.valid.copy())

    def learn_from(self, found: Advantages) -> None:
        """Take advantages; groups without spread are left out."""
        device, group = self.mask.device, self.rollout.num_generations
        self.kept = (~found.degenerate).nonzero().flatten()
        self.advantages = found.values.to(device)
        if self.probes is not None:
            self.probes = replace(self.probes, negative=self.advantages < 0)
        rows = _rows_of(self.kept, group)
        longest = int(self.mask.sum(dim=1).max()) if len(self.mask) else 1
        self.denominators = count_denominators(
            self.mask[rows],
            self.valid[rows].to(device),
            max_length=longest,
            micro_batches=-(-len(self.kept) // self.size),
        )

    def micro_batches(self, *, replay: bool = True) -> list[MicroBatch]:
        """The kept groups, `size` scenes at a time; without `replay` no routing is handed on with them."""
        return [self._part(scenes, replay) for scenes in self.kept.split(self.size)] if len(self.kept) else []

    def _part(self, scenes: Tensor, replay: bool) -> MicroBatch:
        rows = _rows_of(scenes, self.rollout.num_generations)
        trace = self.rollout.trace.rows(rows)
        probes = None if self.probes is None else self.probes.rows(rows)
        if not replay:
            trace = replace(trace, experts=None)
        elif self.experts is not None and probes is None:
            trace = replace(trace, experts=self.experts[:, rows])
        elif self.experts is not None and probes is not None:
            probes = replace(probes, experts=self.experts[:, rows])
        return MicroBatch([self.scenes[s] for s in scenes.tolist()], rows, trace, probes)

    def keep(self, rows: Tensor, found: TokenLogp) -> None:
        """Note what the first pass found: log-probabilities where the sampler's do not serve, routing if there is."""
        if self.old_logp is None:
            self.old_logp, self._old_is_ours = torch.full(self.mask.shape, torch.nan, device=self.mask.device), True
        if self._old_is_ours:
            self.old_logp[rows] = found.logp.detach().to(self.old_logp)
        if found.experts is not None:
            if self.experts is None:
                self.experts = found.experts.new_zeros(len(found.experts), len(self.mask), *found.experts.shape[2:])
            self.experts[:, rows] = found.experts

    def loss_inputs(self, part: MicroBatch, found: TokenLogp) -> LossInputs:
        """What the objective sees of a micro-batch."""
        rows, device = part.rows, self.mask.device
        assert self.old_logp is not None
        old, logp, weight = self.old_logp[rows], found.logp, self.step_weight(rows)
        if weight is not None:  # a step that is not looked at has not moved
            logp = torch.where(weight > 0, logp, old)
        return LossInputs(
            logp=logp,
            old_logp=old,
            ref_logp=None if self.ref_logp is None else self.ref_logp[rows],
            advantages=self.advantages[rows],
            mask=self.mask[rows],
            rows=self.valid[rows].to(device),
            group_size=self.rollout.num_generations,
            step_of=self._step_of(),
            entropy=found.entropy,
            weight=weight,
            behaviour_logp=None if self.behaviour_logp is None else self.behaviour_logp[rows],
        )

    def step_weight(self, rows: Tensor | None = None) -> Tensor | None:
        """``[rows, T]`` K/m at the slots of the m of K steps that are looked at, 0 at others; None where all are.

        Args:
            rows: Row numbers; all N by default.
        """
        if self.steps is None:
            return None
        count, _, length = self.rollout.trace.state.shape
        weight = torch.zeros(count, device=self.mask.device)
        weight[self.steps] = count / len(self.steps)
        return weight.repeat_interleave(length).expand(len(self.mask) if rows is None else len(rows), -1)

    def _step_of(self) -> Tensor | None:
        """``[T]`` decode step of each slot; None for likelihoods that look at the plan and not at the steps."""
        count, _, length = self.rollout.trace.state.shape
        if self.mask.shape[1] != count * length:
            return None
        return torch.arange(count, device=self.mask.device).repeat_interleave(length)


def _rows_of(scenes: Tensor, num_generations: int) -> Tensor:
    """Row numbers of the given scenes' groups, scene-major."""
    return (scenes[:, None] * num_generations + torch.arange(num_generations)).flatten()


def drawn_steps(count: int, wanted: int, *, seed: int, step: int, device: torch.device) -> Tensor | None:
    """`wanted` of `count` decode steps, each as likely as any other; a function of (seed, step). None for all of them.

    The same steps serve all iterations of an RL step. Weighted with ``count / wanted`` the sum over their slots has the
    full sum as its mean (sampling without replacement).
    """
    if wanted <= 0 or wanted >= count:
        return None
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    return torch.randperm(count, generator=generator)[:wanted].sort().values.to(device)
