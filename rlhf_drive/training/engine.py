"""Policy and optimizer of a training run: forward, backward and step, on one process or on many."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from rlhf_drive.errors import ConfigError, TrainingError, did_you_mean
from rlhf_drive.policies import Policy
from rlhf_drive.training import profile
from rlhf_drive.training.ranks import Ranks
from rlhf_drive.training.shards import cut_like, whole, whole_values
from rlhf_drive.training.wrapped import Call, add_up_gradients, divide_weights

__all__ = ["STRATEGIES", "EngineState", "TrainingEngine", "Turn"]

T = TypeVar("T")

STRATEGIES = ("ddp", "fsdp2")
"""How several processes share a policy: each holds all weights, or each a piece of every weight."""


@dataclass(frozen=True)
class EngineState:
    """Weights and optimizer as one process would hold them, on the CPU; the same for any number of processes."""

    weights: Mapping[str, Tensor]
    """The policy's state dict, whole."""
    optimizer: Mapping[str, Any]
    """``optimizer.state_dict()``, whole: `state` by parameter number, and `param_groups`."""


@dataclass(frozen=True)
class Turn(Generic[T]):
    """One micro-batch of this process, in its place among all micro-batches of an update."""

    part: T
    """The micro-batch."""
    counts: bool
    """False where the process has none left and only keeps the others company: run it, and leave its numbers out of
    every sum. The engine takes its loss times 0."""
    last: bool
    """Whether gradients are added up over processes with this one."""


class TrainingEngine:
    """Owns the optimizer of a policy and runs its forward and backward passes.

    All that depends on how weights and gradients are spread over processes is in here. An update reads::

        for turn in engine.turns(micro_batches):
            loss = engine.forward(lambda policy: loss_of(policy, turn.part))
            engine.backward(loss)
        norm = engine.step(max_norm)

    Every loss is its micro-batch's *share* of the batch's loss (denominators are global): gradients are summed over
    micro-batches and processes, never averaged. Every trained weight must take part in every micro-batch.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        learning_rate: float,
        weight_decay: float,
        betas: tuple[float, float] = (0.9, 0.999),
        accelerator: Accelerator,
        ranks: Ranks | None = None,
        strategy: str = "ddp",
    ) -> None:
        """Take charge of a policy; adapters must be in it and frozen weights frozen.

        Args:
            policy: Trained in place. With `fsdp2` on several processes its weights are pieces from now on: for saving
                and sampling there is :meth:`whole_policy`.
            learning_rate: Of AdamW.
            weight_decay: AdamW's decoupled decay.
            betas: Of AdamW.
            accelerator: Device and backward.
            ranks: The processes; those that `torch.distributed` knows by default.
            strategy: One of `STRATEGIES`; makes no difference to one process.

        Raises:
            ConfigError: There is no such strategy.
        """
        if strategy not in STRATEGIES:
            raise ConfigError(f"Unknown parallel.strategy {strategy!r}. {did_you_mean(strategy, STRATEGIES)}")
        self.policy, self.accelerator, self.ranks = policy, accelerator, ranks or Ranks()
        self._ddp: DistributedDataParallel | None = None
        self._fsdp: FSDPModule | None = None
        self._copy: Policy | None = None
        if self.ranks.count > 1 and strategy == "ddp":
            self._ddp = add_up_gradients(policy, accelerator)
        elif self.ranks.count > 1:
            self._copy = copy.deepcopy(policy).to("meta").eval()
            self._fsdp = divide_weights(policy, self.ranks.count)
        self.parameters = [p for p in policy.parameters() if p.requires_grad]
        """Those that are trained."""
        self.optimizer = torch.optim.AdamW(self.parameters, lr=learning_rate, weight_decay=weight_decay, betas=betas)
        self._set_foreach()
        self._turn: Turn[Any] | None = None

    @property
    def divided(self) -> bool:
        """Whether weights are pieces. All processes must then call each layer equally often, in the same order."""
        return self._fsdp is not None

    def share(self, parts: Sequence[T]) -> list[T]:
        """What falls to this process: every `count`-th, so that all have as many to within one."""
        return list(parts[self.ranks.index :: self.ranks.count])

    def collect(self, mine: Sequence[T]) -> list[T]:
        """Everybody's, in the order before :meth:`share` dealt them out; on every process. Collective.

        Args:
            mine: One small plain value for each part that fell to this process, in order; tensors on the CPU.
        """
        dealt = self.ranks.gather(list(mine))
        return [dealt[i % len(dealt)][i // len(dealt)] for i in range(sum(len(values) for values in dealt))]

    def turns(self, parts: Sequence[T]) -> Iterator[Turn[T]]:
        """The micro-batches of this process, and as many stand-ins as keep the others from waiting for ever.

        Args:
            parts: Those of the whole update, the same on every process.
        """
        mine = self.share(parts)
        wanted = -(-len(parts) // self.ranks.count) if self.divided else min(1, len(parts))
        stand_ins = wanted - len(mine)
        queue = [(part, True) for part in mine] + [(parts[-1], False) for _ in range(stand_ins)]
        try:
            for i, (part, counts) in enumerate(queue):
                self._turn = Turn(part, counts, last=i + 1 == len(queue))
                yield self._turn
        finally:
            self._turn = None

    def forward(self, function: Callable[[Policy], T]) -> T:
        """``function(policy)``, with the weights in place that it needs.

        Args:
            function: Gives a loss, or a tuple that begins with one: gradients flow through that loss alone. Every call
                of the policy that the loss depends on must be made in here, once per :meth:`backward`.
        """
        grad = torch.is_grad_enabled()
        if self._fsdp is not None:
            # Its hooks take apart what they are given; a plain function they leave alone.
            found: T = Call.unpack(*self._fsdp(lambda policy: function(policy)))  # type: ignore[operator]
            if not grad:
                self._fsdp.reshard()  # else the root's weights would stay whole, and as they are now, for ever
            return found
        if self._ddp is None or not grad:
            return function(self.policy)
        if self._turn is not None and not self._turn.last:
            with self._ddp.no_sync():
                found = Call.unpack(*self._ddp(function))
            return found
        found = Call.unpack(*self._ddp(function))
        return found

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's gradients; over processes after the last one, under FSDP2 (whose gradients are divided
        too) after each."""
        with profile.part("backward"):
            self.accelerator.backward(loss if self._turn is None or self._turn.counts else loss * 0.0)

    def step(self, max_norm: float, check: Callable[[Tensor], None] | None = None) -> Tensor:
        """Update the weights, and drop the gradients.

        Args:
            max_norm: Gradients are scaled down to this norm.
            check: Called with the norm before anything is changed; what it raises leaves all as it was.

        Returns:
            Norm of all gradients before clipping, the same on every process.

        Raises:
            TrainingError: On several processes, a weight took no part.
        """
        if self.ranks.count > 1 and (idle := self._idle()):
            raise TrainingError(
                f"No gradient reached {', '.join(idle[:5])}{' …' if len(idle) > 5 else ''}: on several processes every "
                "trained weight must take part in every micro-batch. Freeze it, or train in one process."
            )
        norm = whole(torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None]))
        if check is not None:
            check(norm)
        with profile.part("optimizer"):
            torch.nn.utils.clip_grads_with_norm_(self.parameters, max_norm, norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _idle(self) -> list[str]:
        return [name for name, p in self.policy.named_parameters() if p.requires_grad and p.grad is None]

    def _set_foreach(self) -> None:
        """Update all pieces in one call an operation: one by one, each costs a `DTensor` more than the arithmetic. How
        one process does it is left to torch."""
        if self.divided:
            for group in self.optimizer.param_groups:
                group["foreach"] = True

    def set_learning_rate(self, value: float) -> None:
        """For the next step."""
        for group in self.optimizer.param_groups:
            group["lr"] = value

    def state(self) -> EngineState | None:
        """What a checkpoint keeps; on the main process, None on the others. All processes must call it."""
        weights, optimizer = dict(self.policy.state_dict()), self.optimizer.state_dict()
        if self.divided:
            weights = self._gathered(weights)
            state = {number: self._gathered(values) for number, values in optimizer["state"].items()}
            groups = [{**group, "foreach": None} for group in optimizer["param_groups"]]
            optimizer = {"state": state, "param_groups": groups}
        return EngineState(weights, optimizer) if self.ranks.main else None

    def _gathered(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Whole tensors, one after the other, on the CPU of the main process; nothing on the others."""
        found = {}
        for name, value in values.items():
            joined = whole_values({name: value})[name]
            if self.ranks.main:
                found[name] = joined.cpu() if isinstance(joined, Tensor) else joined
        return found

    @torch.no_grad()
    def restore(self, state: EngineState) -> None:
        """Go on from :meth:`state`, of a run with any number of processes; every process gets the whole state."""
        if not self.divided:
            self.policy.load_state_dict(dict(state.weights))
            self.optimizer.load_state_dict(dict(state.optimizer))
            return
        own = self.policy.state_dict()
        self.policy.load_state_dict({name: cut_like(value, own[name]) for name, value in state.weights.items()})
        cut = {
            number: {
                name: cut_like(value, self.parameters[number]) if isinstance(value, Tensor) and value.ndim else value
                for name, value in values.items()
            }
            for number, values in state.optimizer["state"].items()
        }
        self.optimizer.load_state_dict({**state.optimizer, "state": cut})
        self._set_foreach()

    @torch.no_grad()
    def whole_policy(self) -> Policy:
        """A policy that holds all weights, to publish or to sample from: the live one where it does. Collective.

        Else a copy, the same object at every call, up to date until the next update. It costs the policy's memory.
        """
        if self._copy is None:
            return self.policy
        if self._copy.device.type == "meta":
            self._copy.to_empty(device=self.policy.device)
        target = dict(self._copy.named_parameters()) | dict(self._copy.named_buffers())
        for name, tensor in (*self.policy.named_parameters(), *self.policy.named_buffers()):
            target[name].copy_(whole(tensor))
        for name in ("precision", "trained_on"):
            if hasattr(self.policy, name):
                setattr(self._copy, name, getattr(self.policy, name))
        return self._copy
