"""What processes have that train but do not sample: their part in pushing weights that are divided among all."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future

from rlhf_drive.errors import RolloutError
from rlhf_drive.policies import Decoding, Policy
from rlhf_drive.scenes import Scene
from rollout.carriers import Rollout
from rollout.service import RolloutStats
from rollout.weights import WeightChanges, join_weights

__all__ = ["Follower"]


class Follower:
    """A rollout service in name: it takes part where the main process's service makes weights whole (FSDP2).

    Where each process has all weights it does nothing. Every process must push the same policies in the same order.
    """

    def __init__(self) -> None:
        self._changes = WeightChanges()

    @property
    def stats(self) -> RolloutStats:
        """Nothing was done."""
        return RolloutStats(workers=0)

    def push_weights(self, policy: Policy, version: int) -> None:
        """Give the main process this process's part of the weights."""
        frozen, trained = self._changes.take(policy)
        join_weights(policy, (*(frozen or ()), *trained))

    def submit(
        self,
        scenes: Sequence[Scene],
        num_generations: int,
        decoding: Decoding,
        *,
        step: int,
        keep_experts: bool = False,
    ) -> Future[Rollout]:
        """Refused: only the main process asks for plans."""
        raise RolloutError("This process does not sample; the main process asks the rollout workers for all.")

    def sample(
        self,
        scenes: Sequence[Scene],
        num_generations: int,
        decoding: Decoding,
        *,
        step: int,
        keep_experts: bool = False,
    ) -> Rollout:
        """Refused: only the main process asks for plans."""
        return self.submit(scenes, num_generations, decoding, step=step, keep_experts=keep_experts).result()

    def close(self) -> None:
        """Nothing was started."""
