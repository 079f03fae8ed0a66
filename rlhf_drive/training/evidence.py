"""What is kept of a micro-batch in case something in it is not finite."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rlhf_drive.objectives import LossInputs
from rlhf_drive.training.not_finite import Evidence
from rlhf_drive.training.update_batch import MicroBatch, UpdateBatch

__all__ = ["evidence_of"]


def evidence_of(
    batch: UpdateBatch, part: MicroBatch, inputs: LossInputs, loss: Tensor, metrics: Mapping[str, float]
) -> Evidence:
    """What is kept of a micro-batch if something in it is not finite."""
    group = batch.rollout.num_generations
    return Evidence(
        step=batch.step,
        scene_tokens=[scene.token for scene in part.scenes for _ in range(group)],
        rows=part.rows,
        tensors={
            "loss": loss,
            "logp": inputs.logp,
            "old_logp": inputs.old_logp,
            "ref_logp": inputs.ref_logp,
            "mask": inputs.mask,
            "advantages": inputs.advantages,
            "rewards": torch.from_numpy(batch.scores.total)[part.rows],
            "tokens": part.trace.tokens,
            "states": part.trace.state,
        },
        metrics=metrics,
    )
