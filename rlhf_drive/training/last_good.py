"""A failed step leaves a checkpoint of the state before it, so that a run can go on from there with other settings."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from rlhf_drive.errors import StorageError
from rlhf_drive.training.checkpoint import CheckpointStore
from rlhf_drive.training.engine import TrainingEngine
from rlhf_drive.training.generators import generator_states
from rlhf_drive.training.snapshot import Snapshot
from rlhf_drive.training.together import on_main

__all__ = ["LastGoodStep"]


class LastGoodStep:
    """The state after the last whole step.

    Example::

        last = LastGoodStep(checkpoints, engine, hold_weights=settings.limits.on_limit == "stop")
        for step in range(first, max_steps):
            last.note(step, values, tensors)
            try:
                metrics = trainer.step(…)
            except TrainingError as error:
                raise TrainingError(f"{error} {last.save()}") from error
    """

    def __init__(self, store: CheckpointStore, engine: TrainingEngine, *, hold_weights: bool) -> None:
        """Watch an engine.

        Args:
            store: Where the checkpoint goes.
            engine: Its optimizer's steps are counted.
            hold_weights: Whether weights and optimizer are copied at each step, in the memory that these take. Without
                that, a checkpoint can be left only by a step that fails before its first update.
        """
        self.store, self.engine, self.hold_weights = store, engine, hold_weights
        self._noted: tuple[int, Mapping[str, Any], Mapping[str, Tensor], Mapping[str, Any]] | None = None
        self._snapshot: Snapshot | None = None
        self._moved = False
        engine.optimizer.register_step_post_hook(self._saw_update)

    def _saw_update(self, *_: object) -> None:
        self._moved = True

    def note(self, step: int, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """A step is about to begin.

        Args:
            step: Steps done.
            values: As for :meth:`CheckpointStore.save`.
            tensors: As for :meth:`CheckpointStore.save`. Copied if weights are held; else they may change only after
                an update.
        """
        if self.hold_weights:
            self._snapshot = None  # not two at a time
            self._snapshot = Snapshot(self.engine.policy, self.engine.optimizer)
            tensors = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        self._noted = (step, copy.deepcopy(dict(values)), tensors, generator_states())
        self._moved = False

    def save(self) -> str:
        """Leave the checkpoint, if that can be done. All processes must call it.

        Returns:
            A sentence that says what there is to go on from.
        """
        if self._noted is None:
            return ""
        step, values, tensors, generators = self._noted
        there = on_main(self.engine.ranks, self.store.steps)
        if step not in there:
            if self._moved and self._snapshot is None:
                newest = f"The newest checkpoint is that of step {there[-1]}." if there else "There is no checkpoint."
                return f"The step had changed weights already. {newest}{self._advice() if there else ''}"
            if step == 0:
                return "No step was done before it."
            if self._snapshot is not None:
                self._snapshot.restore()
            self.engine.optimizer.zero_grad(set_to_none=True)
            try:
                self.store.save(step, self.engine, values, tensors, generators=generators)
            except StorageError as error:
                return f"The state after step {step} is lost: {error}."
        return f"The state after step {step} is kept as a checkpoint.{self._advice()}"

    def _advice(self) -> str:
        command = self.store.resume_command
        return f" Change recipe.yaml in the run folder, then go on with: {command}" if command else ""
