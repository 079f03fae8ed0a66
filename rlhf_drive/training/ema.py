"""Exponential moving average of a policy's weights, for evaluation and publication."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rlhf_drive.errors import CheckpointError, ConfigError, TrainingError
from rlhf_drive.training.shards import cut_like, joined, piece

__all__ = ["EmaWeights"]


class EmaWeights:
    """``ema <- decay * ema + (1 - decay) * weights`` after each update, from ``ema_0 = weights_0``.

    After n updates ``ema_n = decay^n w_0 + (1 - decay) sum_i decay^(n-i) w_i``. There is no bias correction: RL starts
    from a trained policy, so the start is a good member of the average, and its share ``decay^n`` fades by itself.

    Averaged are the weights that are trainable at the start and stored floating-point buffers, in float32 whatever
    their own dtype (in bfloat16 steps below 0.4 % would be lost). Frozen weights and other buffers stay the policy's.

    Where processes divide the weights, each averages its pieces; states are whole all the same.

    Args:
        policy: The policy whose weights are averaged.
        decay: In (0, 1); about ``1 / (1 - decay)`` updates are remembered.

    Raises:
        ConfigError: `decay` is out of range.
    """

    def __init__(self, policy: nn.Module, decay: float) -> None:
        if not 0.0 < decay < 1.0:
            raise ConfigError(f"rl.ema_decay = {decay} must lie between 0 and 1; 0 in a recipe means no average.")
        self.decay = decay
        self.updates = 0
        self._applied = False
        self._like = _averaged(policy)
        self._master = {name: piece(value.detach()).float().clone() for name, value in self._like.items()}

    @torch.no_grad()
    def update(self, policy: nn.Module) -> None:
        """Take in the present weights; call it after each optimizer step, or each step that kept its updates.

        Raises:
            TrainingError: The averages are swapped into a policy just now.
        """
        if self._applied:
            raise TrainingError("EmaWeights.update inside `applied` would average the average; update outside of it.")
        self.updates += 1
        present = dict(_named(policy))
        for name, master in self._master.items():
            # lerp leaves a weight that does not move as it is, to the bit.
            master.lerp_(piece(present[name].detach()).to(master), 1.0 - self.decay)

    @contextmanager
    def applied(self, policy: nn.Module) -> Iterator[None]:
        """Within the block `policy` has the averages, in its own dtype; after it its own weights again, bit for bit."""
        present = dict(_named(policy))
        own = {name: piece(present[name].detach()).clone() for name in self._master}
        nested, self._applied = self._applied, True
        try:
            _copy(self._master, present)
            yield
        finally:
            _copy(own, present)
            self._applied = nested

    def state_dict(self) -> dict[str, Tensor]:
        """Averages by name, float32, and the count of updates: enough to continue bit for bit. Collective where the
        weights are divided."""
        averages = {name: joined(master, self._like[name]) for name, master in self._master.items()}
        return {**averages, "updates": torch.tensor(self.updates)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what :meth:`state_dict` gave.

        Raises:
            CheckpointError: It belongs to other weights; the first few that differ are named.
        """
        stored = {name: value for name, value in state.items() if name != "updates"}
        differing = sorted(set(stored) ^ set(self._master))
        differing += sorted(n for n in set(stored) & set(self._master) if stored[n].shape != self._like[n].shape)
        if differing or "updates" not in state:
            raise CheckpointError(
                f"The averaged weights belong to another policy, or other weights were trained: "
                f"{', '.join(differing[:5]) or 'updates'} differ. Resume with the run's own recipe."
            )
        for name, master in self._master.items():
            master.copy_(piece(cut_like(stored[name], self._like[name])))
        self.updates = int(state["updates"])


def _named(policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from policy.named_parameters()
    yield from policy.named_buffers()


def _averaged(policy: nn.Module) -> dict[str, Tensor]:
    """Trainable weights and stored floating-point buffers by name."""
    stored = policy.state_dict(keep_vars=True)
    learned = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    return learned | {n: b for n, b in policy.named_buffers() if n in stored and b.is_floating_point()}


@torch.no_grad()
def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    for name, value in source.items():
        piece(target[name]).copy_(value)
