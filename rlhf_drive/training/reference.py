"""The reference policy that RL is kept close to: a frozen copy, or the live policy with its adapters switched off."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor

from rlhf_drive.errors import CheckpointError, ConfigError
from rlhf_drive.policies import Policy
from rlhf_drive.training.shards import whole

__all__ = ["AdapterReference", "FrozenReference", "ReferencePolicy", "sync_due"]


def sync_due(steps_done: int, sync_steps: int) -> bool:
    """Whether the reference moves after this step, as TRL's callback decides: every `sync_steps` steps.

    Args:
        steps_done: Steps done, this one included.
        sync_steps: TRL's ``ref_model_sync_steps``, at least 1.

    Raises:
        ConfigError: `sync_steps` is below 1.
    """
    if sync_steps < 1:
        raise ConfigError(f"rl.ref_model_sync_steps = {sync_steps} must be at least 1.")
    return steps_done % sync_steps == 0


class ReferencePolicy(Protocol):
    """Gives the reference for evaluation; the caller sees to ``torch.no_grad``."""

    def using(self) -> AbstractContextManager[Policy]:
        """The policy to evaluate, valid within the block."""
        ...

    def sync(self, policy: Policy, alpha: float) -> None:
        """Move the reference towards `policy` (TRL's ``sync_ref_model``): ``ref = alpha * policy + (1 - alpha) * ref``.

        Args:
            policy: The live policy.
            alpha: TRL's ``ref_model_mixup_alpha``, in [0, 1].

        Raises:
            ConfigError: This kind of reference cannot move, or `alpha` is out of range.
        """
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint must keep; empty while the reference is the policy that the run started from."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what :meth:`state_dict` gave.

        Raises:
            CheckpointError: It belongs to another policy.
        """
        ...


class FrozenReference:
    """A copy of the policy as it is now, without gradients, in evaluation mode. Costs the policy's memory.

    Each process has a whole one, also where the live policy's weights are divided: make it before they are.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = copy.deepcopy(policy).requires_grad_(False).eval()
        self._moved = False

    @contextmanager
    def using(self) -> Iterator[Policy]:
        """The frozen copy."""
        yield self._policy

    @torch.no_grad()
    def sync(self, policy: Policy, alpha: float) -> None:
        """``ref = alpha * policy + (1 - alpha) * ref`` for all parameters; buffers stay, as in TRL. Collective."""
        if not 0.0 <= alpha <= 1.0:
            raise ConfigError(f"rl.ref_model_mixup_alpha = {alpha} must lie in 0 … 1.")
        live = dict(policy.named_parameters())
        for name, parameter in self._policy.named_parameters():
            # lerp, unlike a scaled sum, leaves a frozen weight as it is, to the bit.
            parameter.lerp_(whole(live[name]).to(parameter), alpha)
        self._moved = True

    def state_dict(self) -> dict[str, Tensor]:
        """All weights once it has moved; nothing before, since the start policy is known."""
        return dict(self._policy.state_dict()) if self._moved else {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Weights of a reference that has moved; nothing happens if there are none."""
        if not state:
            return
        try:
            self._policy.load_state_dict(dict(state))
        except RuntimeError as error:
            reason = " ".join(str(error).split()).rstrip(". ")
            raise CheckpointError(
                f"The reference policy of the checkpoint does not fit: {reason}. Resume with the run's own recipe."
            ) from None
        self._moved = True


class AdapterReference:
    """The live policy with its adapters switched off: the start policy for free, since RL moves only adapters."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    @contextmanager
    def using(self) -> Iterator[Policy]:
        """The live policy; within the block its adapters are off."""
        from rlhf_drive.policies.adapters import disable_adapter

        with disable_adapter(self._policy):
            yield self._policy

    def sync(self, policy: Policy, alpha: float) -> None:
        """Refused: the base weights are the live policy's own."""
        raise ConfigError(
            "rl.sync_ref_model cannot move a reference that is the policy without its adapters: mixing would change "
            "the live policy. Set rl.sync_ref_model to false, or rl.lora_rank to 0."
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing: the policy's own checkpoint holds it."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Nothing is expected."""
        if state:
            raise CheckpointError(
                "The checkpoint holds weights of a separate reference policy, but adapters are trained here. Resume "
                "with the run's own recipe."
            )
